"""Classes are matched by their names: in data, training, checkpoints and every use of them."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from likelihood_model import images, untrained
from PIL import Image

import iddpm_ext
from iddpm_ext import nll
from iddpm_ext.cli import main
from iddpm_ext.likelihood.schedules import find_schedules
from iddpm_ext.training import TrainConfig, train

NAMES = ("boot", "dress", "bag")


def _model() -> Any:
    model = untrained(num_classes=3)
    model.extra = {"class_names": list(NAMES)}
    return model


def _folder(path: Path, classes: dict[str, int], size: int = 8, colour: bool = False) -> Path:
    for k, (name, count) in enumerate(classes.items()):
        (path / name).mkdir(parents=True)
        for i in range(count):
            shape = (size, size, 3) if colour else (size, size)
            level = np.random.default_rng(9 * k + i).integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(level).save(path / name / f"{i}.png")
    return path


def _saved(x: torch.Tensor, path: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        (path / name).mkdir(parents=True, exist_ok=True)
        array = ((x[i, 0] + 1) * 127.5).round().byte().numpy()
        Image.fromarray(array).save(path / name / f"{i}.png")
    return path


# ---- nll and steps


def test_nll_gives_folders_the_labels_of_their_names(tmp_path):
    model, x = _model(), images(4, 8)
    folder = _saved(x, tmp_path, ["bag", "bag", "dress", "dress"])
    right = nll(model, x, labels=[2, 2, 1, 1], budget=8, progress=False).per_image_bpd
    by_number = nll(model, x, labels=[0, 0, 1, 1], budget=8, progress=False).per_image_bpd
    got = nll(model, folder, budget=8, progress=False).per_image_bpd
    assert torch.equal(got, right) and not torch.equal(got, by_number)


def test_class_numbers_of_an_array_are_those_of_the_network(tmp_path):
    model, x = _model(), images(4, 8)
    levels = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", images=levels, labels=np.array([2, 2, 0, 0]))
    right = nll(model, x, labels=[2, 2, 0, 0], budget=8, progress=False).per_image_bpd
    assert torch.equal(
        nll(model, tmp_path / "a.npz", budget=8, progress=False).per_image_bpd, right
    )


@pytest.mark.parametrize("verb", ["nll", "find_schedules"])
def test_classes_that_the_network_has_not_are_refused_by_name(tmp_path, verb):
    folder = _saved(images(4, 8), tmp_path, ["bag", "bag", "hat", "hat"])
    call = nll if verb == "nll" else find_schedules
    with pytest.raises(ValueError, match=rf"{verb}: .* \(boot, dress, bag\), got hat: rename them"):
        call(_model(), folder, progress=False)


def test_nll_refuses_floats_that_may_be_in_another_range(tmp_path):
    levels = ((images(4, 8) + 1) / 2).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", images=levels)
    with pytest.raises(ValueError, match=r"must have a value_range .*\(0,1 or -1,1\?\)"):
        nll(untrained(), tmp_path / "a.npz", budget=8, progress=False)


def test_what_reading_changes_is_a_warning_of_nll(tmp_path):
    levels = np.random.default_rng(0).integers(0, 65536, (2, 8, 8), dtype=np.uint16)
    np.save(tmp_path / "a.npy", levels)
    with pytest.warns(UserWarning, match="nll: images are rounded to the 256 levels"):
        nll(untrained(), tmp_path / "a.npy", budget=8, progress=False)
    Image.new("L", (16, 16), 40).save(tmp_path / "b.png")
    with pytest.warns(UserWarning, match="nll: images of 16x16 are resized and cropped to 8x8"):
        nll(untrained(), tmp_path, budget=8, progress=False)


def test_the_commands_take_what_the_readers_take(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    iddpm_ext.save(_model(), "model.safetensors")
    x = images(4, 8)
    unit = ((x + 1) / 2).permute(0, 2, 3, 1).numpy()
    np.savez("unit.npz", images=unit, labels=np.array([2, 2, 0, 0]))
    options = ["--data", "unit.npz", "--batch-size", "16"]
    assert main(["nll", "model.safetensors", *options, "--budget", "8"]) == 1
    options += ["--value-range", "0,1"]
    assert main(["nll", "model.safetensors", *options, "--budget", "8"]) == 0
    written = json.loads(Path("nll/nll.json").read_text())["per_image_bpd"]
    right = nll(_model(), x, labels=[2, 2, 0, 0], budget=8, batch_size=16, progress=False)
    # (x + 1) / 2 of float32 is another rounding of the level, which the reader rounds back.
    assert written == right.per_image_bpd.tolist()
    few = ["--n", "2", "--candidates", "4", "--most", "2", "--out", "b.safetensors"]
    assert main(["steps", "model.safetensors", *options, *few]) == 0


# ---- training


def _config(data: Path, out: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "data": str(data), "out": str(out), "model_channels": 32, "channel_mult": (1,),
        "num_res_blocks": 1, "attention_resolutions": (), "diffusion_steps": 50, "batch_size": 4,
        "steps": 1, "sample_every": 0, "progress": False,
    }  # fmt: skip
    return TrainConfig(**{**settings, **changes})


@pytest.mark.parametrize(
    "classes, size, colour, message",
    [
        ({"bee": 2, "cat": 2}, 8, False, r"other classes \(new: bee; gone: dog\)"),
        ({"cat": 2, "dog": 2}, 16, False, "images of 16x16, which were 8x8"),
        ({"cat": 2, "dog": 2}, 8, True, "3 channels, which were 1"),
        ({"cat": 2, "eel": 2}, 4, True, "4x4, which were 8x8; 3 channels, which were 1; other classes"),
    ],
)  # fmt: skip
def test_a_run_on_other_data_is_refused_before_anything_is_written(
    tmp_path, classes, size, colour, message
):
    data, out = _folder(tmp_path / "d", {"cat": 2, "dog": 2}), tmp_path / "out"
    train(_config(data, out, class_cond=True))
    shutil.rmtree(data)
    _folder(data, classes, size, colour)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=rf"train: data must be that of the run in .*, got .*{message}"
    ):
        train(_config(data, out, class_cond=True, steps=2))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_other_classes_are_no_matter_to_a_run_without_them(tmp_path, capsys):
    data, out = _folder(tmp_path / "d", {"cat": 2, "dog": 2}), tmp_path / "out"
    train(_config(data, out))
    _folder(data, {"eel": 2})
    train(_config(data, out, steps=2))
    assert "the data has 6 images now, 4 before: its order begins anew" in capsys.readouterr().err


def test_training_says_what_reading_leaves_out(tmp_path, capsys):
    data = _folder(tmp_path / "d", {"cat": 2, "dog": 2})
    (data / "cat" / "Thumbs.db").write_bytes(b"x")
    train(_config(data, tmp_path / "out"))
    assert "left out, as systems make them: Thumbs.db (1)" in capsys.readouterr().err


def test_why_data_has_no_classes_is_said_where_they_are_wanted(tmp_path):
    data = _folder(tmp_path / "d", {"00000": 2, "00001": 2})
    with pytest.raises(
        ValueError, match=r"class_cond must be off .* 00000, 00001 are taken for parts"
    ):
        train(_config(data, tmp_path / "out", class_cond=True))
    train(_config(data, tmp_path / "out", class_cond=True, classes="folders"))


def test_a_run_can_take_folders_that_look_like_splits(tmp_path, capsys):
    data = _folder(tmp_path / "d", {"train": 2, "test": 2, "other": 2})
    with pytest.raises(
        ValueError, match=r"split must be 'all' to take the folders test, train for no"
    ):
        train(_config(data, tmp_path / "out"))
    train(_config(data, tmp_path / "out", class_cond=True, split="all"))
    assert "6 images of 1x8x8, 3 classes" in capsys.readouterr().err


def test_data_in_another_range_trains_as_value_range_says(tmp_path):
    # Black and white are exact in every arithmetic, so that both runs see the same bits.
    levels = 255 * np.random.default_rng(0).integers(0, 2, (4, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "a.npy", levels)
    np.save(tmp_path / "b.npy", levels.astype(np.float32))
    with pytest.raises(ValueError, match="must have a value_range"):
        train(_config(tmp_path / "b.npy", tmp_path / "b"))
    assert not (tmp_path / "b").exists()
    paths = [
        train(_config(tmp_path / "a.npy", tmp_path / "a", seed=1)),
        train(_config(tmp_path / "b.npy", tmp_path / "b", seed=1, value_range=(0, 255))),
    ]
    a, b = (iddpm_ext.load(path / "model.safetensors").state_dict() for path in paths)
    assert all(torch.equal(b[name], value) for name, value in a.items())


# ---- guidance


def _guided(model: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        iddpm_ext.sample(model, 2, labels=[0, 1], guidance_scale=2.0, progress=False)
        iddpm_ext.sample(model, 2, labels=[0, 1], progress=False)
    return [str(w.message) for w in told if "label_dropout" in str(w.message)]


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10-medium", "cifar10-small"])
def test_bundled_networks_say_that_guidance_was_trained(name):
    assert iddpm_ext.load(name).extra["label_dropout"] == 0.1


def test_guidance_warns_where_no_unlabelled_image_was_ever_seen(tmp_path):
    data = _folder(tmp_path / "d", {"cat": 2, "dog": 2})
    without = train(_config(data, tmp_path / "a", class_cond=True))
    model = iddpm_ext.load(without / "model.safetensors")
    assert model.extra["label_dropout"] == 0 and model.extra["class_names"] == ["cat", "dog"]
    assert len(_guided(model)) == 1
    with_dropout = train(_config(data, tmp_path / "b", class_cond=True, label_dropout=0.1))
    average = iddpm_ext.load(with_dropout / "ema_0.9999.safetensors")
    assert average.extra["label_dropout"] == 0.1 and _guided(average) == []


def test_what_weights_have_seen_once_stays_seen(tmp_path):
    data = _folder(tmp_path / "d", {"cat": 2, "dog": 2})
    first = train(_config(data, tmp_path / "a", class_cond=True, label_dropout=0.2))
    weights = str(first / "model.safetensors")
    resumed = train(_config(data, tmp_path / "a", class_cond=True, steps=2))
    fresh = train(_config(data, tmp_path / "b", class_cond=True, init_from=weights))
    for path in (resumed, fresh):
        assert iddpm_ext.load(path / "model.safetensors").extra["label_dropout"] == 0.2


def test_nothing_is_claimed_of_weights_whose_training_is_not_known(tmp_path):
    data = _folder(tmp_path / "d", {"cat": 2, "dog": 2})
    path = train(_config(data, tmp_path / "a", class_cond=True)) / "model.safetensors"
    model = iddpm_ext.load(path)
    iddpm_ext.save(model, tmp_path / "older.safetensors", extra={"class_names": ["cat", "dog"]})
    older = iddpm_ext.load(tmp_path / "older.safetensors")
    assert _guided(older) == []
    init = str(tmp_path / "older.safetensors")
    path = train(_config(data, tmp_path / "b", class_cond=True, init_from=init))
    assert "label_dropout" not in iddpm_ext.load(path / "model.safetensors").extra


def test_weights_of_other_classes_are_named(tmp_path, capsys):
    data = _folder(tmp_path / "d", {"cat": 2, "dog": 2})
    other = _folder(tmp_path / "e", {"cat": 2, "eel": 2})
    path = train(_config(data, tmp_path / "a", class_cond=True)) / "model.safetensors"
    train(_config(other, tmp_path / "b", class_cond=True, init_from=str(path)))
    assert "has other classes (new: eel; gone: dog)" in capsys.readouterr().err


def test_names_decide_for_a_wrapped_network_too(tmp_path):
    data = _folder(tmp_path / "d", {"ant": 2, "cat": 2, "dog": 2})
    model = iddpm_ext.load(train(_config(data, tmp_path / "a", class_cond=True)))
    other = _folder(tmp_path / "other", {"cat": 2, "dog": 2})
    options: dict[str, Any] = {"steps": 2, "progress": False, "engine": False}
    alone = iddpm_ext.nll(model, str(other), **options)
    for wrapped in (torch.nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert torch.equal(
            iddpm_ext.nll(wrapped, str(other), **options).per_image_bpd, alone.per_image_bpd
        )

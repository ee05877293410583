"""What `load` takes besides our own files and OpenAI's: other suffixes, wrappers, averages, folders."""

from __future__ import annotations

import argparse
import json
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from golden.make_unet import fill_by_formula
from torch.optim.swa_utils import AveragedModel

import iddpm_ext
from iddpm_ext import Diffusion, UNet, UNetConfig, load, load_classifier, save
from iddpm_ext.checkpoint.runs import MANIFEST
from iddpm_ext.evaluation.images import is_checkpoint
from iddpm_ext.networks.classifier import Classifier, ClassifierConfig
from iddpm_ext.training.checkpoints import write_checkpoint

CONFIG = UNetConfig(
    image_size=8, model_channels=32, out_channels=6, num_res_blocks=1, channel_mult=(1, 2),
    attention_resolutions=(4,),
)  # fmt: skip
FLAGS = (
    "--image_size 8 --num_heads 4 --noise_schedule cosine --diffusion_steps 100 "
    "--rescale_timesteps True"
)


@pytest.fixture(scope="module")
def model() -> UNet:
    model = UNet(CONFIG)
    fill_by_formula(model)
    model.diffusion = Diffusion("cosine", 100)
    return model


def states(model: UNet) -> tuple[OrderedDict, OrderedDict]:
    """Weights, and others that stand for their average."""
    weights = model.state_dict()
    return weights, OrderedDict((k, v * 0.5) for k, v in weights.items())


def prefixed(prefix: str, weights: OrderedDict) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in weights.items()}


def assert_holds(found: UNet, weights: OrderedDict) -> None:
    assert found.config == CONFIG
    for name, value in found.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.bin", "model", "MODEL.PT"])
def test_what_save_wrote_is_read_whatever_the_suffix(model, tmp_path, name):
    save(model, tmp_path / name)
    assert_holds(load(tmp_path / name), model.state_dict())
    classifier = Classifier(ClassifierConfig(
        image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1,), num_classes=3,
        attention_resolutions=(8,), num_head_channels=32,
    ))  # fmt: skip
    save(classifier, tmp_path / name)
    assert load_classifier(tmp_path / name).config == classifier.config


@pytest.mark.parametrize("suffix", [".safetensors", "", ".ckpt"])
def test_an_archive_of_pytorch_is_read_whatever_the_suffix(model, tmp_path, suffix):
    torch.save(model.state_dict(), tmp_path / f"a{suffix}")
    assert_holds(load(tmp_path / f"a{suffix}", flags=FLAGS), model.state_dict())


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "diffusion.net."]
)
def test_prefixes_of_wrappers_are_taken_off(model, tmp_path, prefix):
    torch.save(prefixed(prefix, model.state_dict()), tmp_path / "a.pt")
    assert_holds(load(tmp_path / "a.pt", flags=FLAGS), model.state_dict())


def test_lightnings_file_is_read_and_tensors_beside_the_network_are_named(model, tmp_path):
    content = {
        "epoch": 3, "global_step": 7, "pytorch-lightning_version": "2.4.0", "loops": {},
        "state_dict": {**prefixed("model.", model.state_dict()), "betas": torch.zeros(3)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}],
    }  # fmt: skip
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="tensors outside of the network, left: betas$"):
        assert_holds(load(tmp_path / "a.ckpt", flags=FLAGS), model.state_dict())


@pytest.mark.parametrize(
    "form",
    [
        lambda weights, average: {"model": weights, "ema": average, "step": 3},
        lambda weights, average: {"state_dict": weights, "state_dict_ema": average},
        lambda weights, average: {"state_dict": {**prefixed("model.", weights),
                                                 **prefixed("ema_model.", average)}},
        lambda weights, average: {**prefixed("module.", weights), **prefixed("ema.", average)},
        lambda weights, average: {"model": prefixed("module.", weights),
                                  "ema": {**prefixed("online_model.", weights),
                                          **prefixed("ema_model.", average)}},
    ],
)  # fmt: skip
def test_of_weights_and_their_average_the_average_is_taken_and_said(model, tmp_path, form):
    weights, average = states(model)
    torch.save(form(weights, average), tmp_path / "a.pt")
    with pytest.warns(UserWarning, match=r"holds weights several times, .* is taken, part="):
        assert_holds(load(tmp_path / "a.pt", flags=FLAGS), average)


def test_part_takes_the_weights_that_are_meant(model, tmp_path):
    weights, average = states(model)
    torch.save({"model": weights, "ema": average}, tmp_path / "a.pt")
    assert_holds(load(tmp_path / "a.pt", flags=FLAGS, part="model"), weights)
    assert_holds(load(tmp_path / "a.pt", flags=FLAGS, part="ema"), average)
    with pytest.raises(ValueError, match=r"part must be one of 'model', 'ema' for .*, got 'net'"):
        load(tmp_path / "a.pt", flags=FLAGS, part="net")
    torch.save({"net": weights, "net_ema": average, "teacher": weights}, tmp_path / "a.pt")
    with pytest.warns(UserWarning, match="'net_ema' is taken"):
        assert_holds(load(tmp_path / "a.pt", flags=FLAGS), average)


def test_weights_that_could_be_either_are_refused_by_their_names(model, tmp_path):
    torch.save({"first": model.state_dict(), "second": model.state_dict()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"part must name the weights .*: 'first', 'second', got"):
        load(tmp_path / "a.pt", flags=FLAGS)
    save(model, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"part must be None for .*b\.safetensors"):
        load(tmp_path / "b.safetensors", part="model")


def test_mappings_that_hold_one_another_a_million_times_end_at_once(model, tmp_path):
    content: dict[str, object] = {"x": 1}
    for _ in range(3):
        content = {str(i): content for i in range(300)}
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="must hold tensors by name, got '0': dict"):
        load(tmp_path / "a.pt", flags=FLAGS)


@pytest.mark.parametrize("wrap", [
    torch.nn.DataParallel, AveragedModel, torch.compile,
    lambda m: torch.compile(torch.nn.DataParallel(m)),
])  # fmt: skip
def test_save_takes_the_network_out_of_its_wrapper(model, tmp_path, wrap):
    save(wrap(model), tmp_path / "a.safetensors")
    assert_holds(load(tmp_path / "a.safetensors"), model.state_dict())


@pytest.mark.parametrize("old", [False, True])
def test_the_error_of_a_pickle_is_ours_alone(tmp_path, old):
    content = {"state_dict": {}, "hyper_parameters": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not old)
    (tmp_path / "a.ckpt").rename(tmp_path / "a.pt")
    with pytest.raises(ValueError) as caught:
        load(tmp_path / "a.pt")
    text = str(caught.value)
    assert "got an object of 'argparse.Namespace', which is left alone" in text
    assert "torch.save(model.state_dict(), path)" in text and text.endswith("path)")
    shown = "".join(__import__("traceback").format_exception(caught.value))
    assert "weights_only" not in shown.replace("weights_only=True", "") and "\x1b" not in shown
    assert caught.value.__cause__ is None


def test_names_in_a_file_cannot_move_the_terminals_cursor(model, tmp_path):
    weights = {**model.state_dict(), "\x1b[2J\x1b]0;x\x07": torch.zeros(1)}
    torch.save(weights, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="unexpected: ") as caught:
        load(tmp_path / "a.pt", flags=FLAGS)
    assert "\x1b" not in str(caught.value) and r"\x1b[2J" in str(caught.value)


def written_run(folder: Path, model: UNet, step: int, **average: float) -> Path:
    """A checkpoint as training writes it; average: decay's text -> factor of the weights."""
    metadata = iddpm_ext.checkpoint.metadata_of(model, {"step": step})
    tensors = {"model.safetensors": (model.state_dict(), metadata)}
    for decay, factor in average.items():
        values = {name: value * factor for name, value in model.state_dict().items()}
        tensors[f"ema_{decay}.safetensors"] = (values, metadata)
    config = {"ema": [float(decay) for decay in average]}
    return write_checkpoint(folder / "ckpt", step, tensors, {"config": config}, keep=3)


def test_a_runs_folder_is_the_first_average_of_its_newest_sound_checkpoint(model, tmp_path):
    run = tmp_path / "run"
    written_run(run, model, 5, **{"0.5": 0.25, "0.25": 0.125})
    newest = written_run(run, model, 10, **{"0.5": 0.5, "0.25": 0.75})
    average = states(model)[1]
    for place in (run, run / "ckpt", newest):
        found = load(place)
        assert_holds(found, average)
        assert found.extra == {"step": 10}
    assert is_checkpoint(str(run))
    (newest / "ema_0.5.safetensors").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"skipped a checkpoint that is not sound: .*step-10"):
        assert load(run).extra == {"step": 5}
    with pytest.raises(ValueError, match=r"must be a sound checkpoint, got ema_0\.5\.s.* has"):
        load(newest)
    shutil.rmtree(run / "ckpt" / "step-5")
    with pytest.raises(ValueError, match=r"must hold a sound checkpoint, got .*step-10"):
        load(run)


def test_a_manifest_cannot_name_files_outside_of_its_checkpoint(model, tmp_path):
    path = written_run(tmp_path, model, 1, **{"0.5": 1.0})
    manifest = json.loads((path / MANIFEST).read_bytes())
    (path / MANIFEST).write_text(json.dumps({**manifest, "/dev/zero": {"size": 0, "sha256": ""}}))
    with pytest.raises(ValueError, match="/dev/zero is no file in it"):
        load(path)


def test_a_folder_of_diffusers_is_read(model, tmp_path):
    pytest.importorskip("diffusers")
    from iddpm_ext.interop.folder import write_folder

    write_folder(model, tmp_path / "d")
    found = load(tmp_path / "d", dtype=torch.float64)
    assert found.diffusion == model.diffusion
    assert torch.equal(found.out[2].bias, model.out[2].bias.double())
    assert is_checkpoint(str(tmp_path / "d"))
    with pytest.raises(ValueError, match="flags must be None for a folder of diffusers"):
        load(tmp_path / "d", flags=FLAGS)

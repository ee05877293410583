"""Checkpoints: whole round trips, refusal of what contradicts itself, and nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import stat
import struct
from dataclasses import replace

import pytest
import torch
from golden.make_unet import fill_by_formula
from safetensors.torch import load_file, save_file

import iddpm_ext
from iddpm_ext import Diffusion, UNet, UNetConfig
from iddpm_ext.checkpoint import bundled, load, metadata_of, save

CONFIG = UNetConfig(
    image_size=8,
    model_channels=32,
    num_res_blocks=1,
    channel_mult=(1, 2),
    attention_resolutions=(4,),
    num_classes=3,
    dropout=0.1,
)


@pytest.fixture
def model() -> UNet:
    model = UNet(CONFIG)
    fill_by_formula(model)
    model.diffusion = Diffusion("linear", 200, "learned", "x_0", rescale_timesteps=False)
    return model


def rewritten(path, *, tensors=None, **metadata):
    """The file at `path` with some of its tensors or metadata replaced; None removes an entry."""
    stored = load_file(path)
    stored.update(tensors or {})
    stored = {k: v for k, v in stored.items() if v is not None}
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))["__metadata__"]
    header.update(metadata)
    save_file(stored, path, {k: v for k, v in header.items() if v is not None})


def test_round_trip_keeps_weights_configuration_diffusion_and_extra(model, tmp_path):
    path = tmp_path / "model.safetensors"
    extra = {"step_schedules": {"optimal-3": [0, 7, 199]}, "training": {"steps": 5}}
    iddpm_ext.save(model, path, extra=extra)
    back = iddpm_ext.load(str(path))
    assert back.config == model.config
    assert back.diffusion == model.diffusion
    assert back.extra == extra
    assert not back.training
    assert all(p.requires_grad for p in back.parameters())
    assert list(back.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_extra_travels_on_when_not_given_anew(model, tmp_path):
    save(model, tmp_path / "a.safetensors", extra={"note": "first"})
    save(load(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    assert load(tmp_path / "b.safetensors").extra == {"note": "first"}


def test_network_without_diffusion_round_trips(tmp_path):
    save(UNet(CONFIG), tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors").diffusion is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_stored_as_such_and_loaded_as_float32(model, tmp_path, dtype):
    path = tmp_path / "half.safetensors"
    save(model, path, dtype=dtype)
    assert {v.dtype for v in load_file(path).values()} == {dtype}
    for name, value in load(path).state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.state_dict()[name].to(dtype).float())
    assert next(load(path, dtype=torch.float64).parameters()).dtype == torch.float64


def test_loading_draws_nothing_from_the_global_generator(model, tmp_path):
    save(model, tmp_path / "a.safetensors")
    before = torch.random.get_rng_state()
    load(tmp_path / "a.safetensors")
    assert torch.equal(before, torch.random.get_rng_state())


def test_loaded_weights_do_not_depend_on_the_file(model, tmp_path):
    path = tmp_path / "a.safetensors"
    save(model, path)
    back = load(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(back.out[2].bias, model.out[2].bias)


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_file_mode_follows_the_umask(model, tmp_path):
    old = os.umask(0o027)
    try:
        save(model, tmp_path / "a.safetensors")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failing_write_leaves_the_old_file_and_nothing_else(model, tmp_path, monkeypatch, failing):
    path = tmp_path / "a.safetensors"
    save(model, path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with torch.no_grad():
        model.out[2].bias.add_(1)
    with pytest.raises(OSError, match="No space left"):
        save(model, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_symbolic_link_keeps_pointing_at_what_is_written(model, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real.safetensors")
    save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load(tmp_path / "real.safetensors").config == CONFIG


def test_unusable_paths_are_refused_before_any_write(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="save: path must be in an existing folder"):
        save(model, tmp_path / "absent" / "a.safetensors")
    with pytest.raises(IsADirectoryError, match="save: path must name a file"):
        save(model, tmp_path)
    with pytest.raises(ValueError, match="save: path must name a regular file"):
        save(model, os.devnull)
    assert os.listdir(tmp_path) == []


def test_wrong_arguments_of_save_are_refused(model, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(TypeError, match="save: model must be a UNet or a Classifier, got Linear"):
        save(torch.nn.Linear(1, 1), path)
    with pytest.raises(ValueError, match=r"save: dtype must be one of .*got torch.int8"):
        save(model, path, dtype=torch.int8)
    with pytest.raises(ValueError, match="save: extra must be JSON-ready"):
        save(model, path, extra={"x": float("nan")})
    with pytest.raises(ValueError, match="save: extra must be JSON-ready"):
        save(model, path, extra={"x": torch.zeros(1)})
    with pytest.raises(TypeError, match="save: extra must be a mapping, got list"):
        save(model, path, extra=[1])
    assert not path.exists()


def test_differences_from_the_configuration_are_named(model, tmp_path):
    path = tmp_path / "a.safetensors"
    save(model, path)
    rewritten(
        path,
        tensors={
            "out.2.bias": None,
            "stranger": torch.zeros(1),
            "out.0.weight": torch.zeros(64),
            "out.0.bias": torch.zeros(32, dtype=torch.int32),
        },
    )
    with pytest.raises(ValueError, match="contradicts its configuration") as caught:
        load(path)
    text = str(caught.value)
    assert "missing: out.2.bias" in text
    assert "unexpected: stranger" in text
    assert "wrong shape: out.0.weight [64] instead of [32]" in text
    assert "not floating point: out.0.bias torch.int32" in text


def test_configuration_of_another_network_is_refused(model, tmp_path):
    path = tmp_path / "a.safetensors"
    save(model, path)
    other = replace(CONFIG, num_classes=None, num_res_blocks=2)
    rewritten(path, unet=json.dumps(other.to_dict()))
    with pytest.raises(ValueError, match=r"missing: .*, and \d+ more; unexpected: "):
        load(path)


def test_diffusion_that_does_not_fit_the_output_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save(UNet(replace(CONFIG, out_channels=3)), path)
    rewritten(path, diffusion=json.dumps(Diffusion().to_dict()))
    with pytest.raises(ValueError, match=r"contradicts itself: .*variance='learned_range'"):
        load(path)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"unet": None}, "must carry the configuration of its network"),
        ({"unet": "{"}, "must hold valid metadata"),
        ({"unet": "[1]"}, "must hold valid metadata"),
        ({"unet": '{"model_channels": 31}'}, "model_channels must be a multiple of 32 .*got 31"),
        ({"unet": '{"width": 1}'}, r"keys must be fields of UNetConfig, got \['width'\]"),
        ({"unet": '{"num_res_blocks": 1000000000}'}, "cannot have .* tensors"),
        ({"unet": "[" * 100_000}, "must hold valid metadata"),
        ({"diffusion": '{"schedule": "cosine"}'}, "must hold valid metadata.*Diffusion"),
        ({"diffusion": "3"}, "must hold valid metadata"),
        ({"extra": "[]"}, "extra must be an object"),
        ({"format_version": "2"}, "must have format_version 1, got '2'"),
    ],
)
def test_bad_metadata_is_refused(model, tmp_path, metadata, says):
    path = tmp_path / "a.safetensors"
    save(model, path)
    rewritten(path, **metadata)
    with pytest.raises(ValueError, match=says):
        load(path)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5_000, -1])
def test_truncated_file_is_refused(model, tmp_path, keep):
    path = tmp_path / "a.safetensors"
    save(model, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load(path)


def test_pickle_is_refused_and_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load(tmp_path / "a.safetensors")
    torch.save({"x": Bomb()}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="must be a whole PyTorch file of nothing but tensors"):
        load(tmp_path / "b.pt")
    assert not (tmp_path / "ran").exists()


def test_wrong_arguments_of_load_are_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"existing file or folder, a bundled model .*'no-such'"
    ):
        load("no-such")
    with pytest.raises(ValueError, match=r"must be a file, the folder of a run .* got the folder"):
        load(tmp_path)
    with pytest.raises(TypeError, match="name_or_path must be a string or a path, got int"):
        load(3)
    with pytest.raises(ValueError, match=r"dtype must be a floating-point torch\.dtype"):
        load("no-such", dtype=torch.int64)


def test_every_bundled_model_loads_and_knows_its_diffusion():
    for name in bundled():
        assert load(name).diffusion is not None


def test_wrong_diffusion_is_refused_when_set():
    with pytest.raises(ValueError, match=r"UNet: diffusion must have a variance that fits"):
        UNet(replace(CONFIG, out_channels=3)).diffusion = Diffusion()


def test_metadata_is_text_that_another_program_can_read(model):
    metadata = metadata_of(model)
    assert UNetConfig.from_dict(json.loads(metadata["unet"])) == CONFIG
    assert Diffusion.from_dict(json.loads(metadata["diffusion"])) == model.diffusion

"""Every network that loads is trained on: guided-diffusion's, an upsampler, a classifier, a bundled one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.make_unet import fill_by_formula

import iddpm_ext
from iddpm_ext import Classifier, ClassifierConfig, Diffusion, UNet, UNetConfig
from iddpm_ext.checkpoint.runs import read_tensors
from iddpm_ext.cli import main
from iddpm_ext.training import TrainConfig, train

STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Eight images of two classes, dark and bright, 8x8 of three channels."""
    images = np.random.default_rng(0).integers(0, 100, (8, 8, 8, 3), dtype=np.uint8)
    images[4:] += 150
    path = tmp_path_factory.mktemp("data") / "levels.npz"
    np.savez(path, images=images, labels=np.arange(8) // 4)
    return str(path)


def config_of(data: str, out: Path, **changes) -> TrainConfig:
    base = TrainConfig(
        data=data, out=str(out), steps=STEPS, batch_size=4, lr=1e-3, ema=(0.9,), save_every=100,
        log_every=STEPS, sample_every=0, progress=False, device="cpu",
    )  # fmt: skip
    return replace(base, **changes)


def guided() -> UNet:
    return UNet(
        UNetConfig(
            image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1, 2), num_classes=2,
            attention_resolutions=(4,), num_head_channels=16, attention_order="new",
            resblock_updown=True,
        )
    )  # fmt: skip


def upsampler() -> UNet:
    return UNet(
        UNetConfig(
            image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1, 2), num_heads=2,
            attention_resolutions=(), super_resolution=True,
        )
    )  # fmt: skip


def classifier() -> Classifier:
    return Classifier(
        ClassifierConfig(
            image_size=8, model_channels=32, num_classes=2, num_res_blocks=1, channel_mult=(1, 2),
            attention_resolutions=(4,), num_head_channels=16,
        )
    )  # fmt: skip


# What a file of someone's run of the original cannot tell, as settings.
OF_FILES = {
    guided: {"num_head_channels": 16, "attention_order": "new", "class_cond": True},
    upsampler: {"num_heads": 2, "super_resolution": 4},
    classifier: {
        "classifier": True, "num_head_channels": 16, "resblock_updown": True, "num_res_blocks": 1,
        "attention_resolutions": (4,), "channel_mult": (1, 2),
    },
}  # fmt: skip


@pytest.mark.parametrize("make", OF_FILES, ids=lambda make: make.__name__)
def test_a_file_of_the_originals_goes_on_and_resumes_bit_for_bit(data, tmp_path, make):
    model = make()
    fill_by_formula(model)
    torch.save(model.state_dict(), tmp_path / "model000100.pt")
    settings = {
        **OF_FILES[make], "schedule": "linear", "diffusion_steps": 40, "rescale_timesteps": False,
        "init_from": str(tmp_path / "model000100.pt"),
    }  # fmt: skip
    whole = train(config_of(data, tmp_path / "a", **settings))
    half = config_of(data, tmp_path / "b", **settings)
    train(replace(half, steps=STEPS // 2))
    (tmp_path / "model000100.pt").unlink()
    resumed = train(half)
    for file in sorted(path.name for path in whole.glob("*.safetensors")):
        ours, theirs = read_tensors(whole, file), read_tensors(resumed, file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file
    load = iddpm_ext.load_classifier if make is classifier else iddpm_ext.load
    trained = load(tmp_path / "b")
    assert trained.config == model.config
    assert trained.diffusion == Diffusion("linear", 40, rescale_timesteps=False)
    moved = read_tensors(whole, "model.safetensors")["input_blocks.0.0.weight"]
    start = model.state_dict()["input_blocks.0.0.weight"]
    assert 0 < (moved - start).abs().max() < 2 * STEPS * 1e-3


def test_the_network_is_the_files_and_what_contradicts_it_is_refused(data, tmp_path):
    model = guided()
    fill_by_formula(model)
    model.diffusion = Diffusion("linear", 60, prediction="x_0", rescale_timesteps=False)
    iddpm_ext.save(model, tmp_path / "guided.safetensors")
    # Not one flag repeats the file.
    start = config_of(
        data, tmp_path / "run", init_from=str(tmp_path / "guided.safetensors"), steps=1, lr=1e-12
    )
    trained = iddpm_ext.load(train(start) / "model.safetensors")
    assert (trained.config, trained.diffusion) == (model.config, model.diffusion)
    for changes, says in (
        ({"num_res_blocks": 3}, r"num_res_blocks=3 \(there 1\)"),
        ({"attention_resolutions": (2,)}, r"attention_resolutions=\(2,\) \(there \(4,\)\)"),
        ({"super_resolution": 4}, r"super_resolution=4 \(there a network without\)"),
        ({"channels": 1}, r"channels must be those of the array"),
    ):
        with pytest.raises(ValueError, match=says):
            train(replace(start, out=str(tmp_path / "no"), **changes))
    other = replace(start, out=str(tmp_path / "other"), diffusion_steps=50)
    assert iddpm_ext.load(train(other).parent).diffusion == Diffusion(
        "linear", 50, prediction="x_0", rescale_timesteps=False
    )


def test_a_bundled_network_is_trained_on_by_its_name(tmp_path):
    np.savez(
        tmp_path / "grey.npz", np.random.default_rng(0).integers(0, 256, (4, 28, 28), np.uint8)
    )
    bundled = iddpm_ext.load("fashion-mnist")
    settings = config_of(
        str(tmp_path / "grey.npz"), tmp_path / "run", init_from="fashion-mnist", steps=1, lr=1e-12
    )
    if bundled.config.num_classes is not None:
        labels = np.arange(4 * bundled.config.num_classes) % bundled.config.num_classes
        images = np.zeros((len(labels), 28, 28), np.uint8)
        np.savez(tmp_path / "grey.npz", images=images, labels=labels)
    trained = iddpm_ext.load(train(settings) / "model.safetensors")
    assert (trained.config, trained.diffusion) == (bundled.config, bundled.diffusion)
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, bundled.state_dict()[name], rtol=0, atol=1e-6)


def test_an_upsampler_sees_the_data_as_the_original_reduces_it(data, tmp_path, monkeypatch):
    seen = []
    forward = UNet.forward

    def watched(self, x, timesteps, y=None, low_res=None):
        seen.append(low_res)
        return forward(self, x, timesteps, y, low_res)

    monkeypatch.setattr(UNet, "forward", watched)
    settings = config_of(
        data, tmp_path, steps=2, super_resolution=2, model_channels=32, num_res_blocks=1,
        channel_mult=(1,), attention_resolutions=(), diffusion_steps=20,
    )  # fmt: skip
    train(settings)
    images = iddpm_ext.data.open_data(data).images(torch.arange(8))[0]
    # Each of the eight images once in two batches of four, as the means of its 4x4 squares.
    wanted = images.unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(4, 5)).flatten(1)
    got = torch.cat(seen).flatten(1)
    assert got.shape == wanted.shape
    assert (torch.cdist(got, wanted).min(dim=0).values < 1e-5).all()


def test_an_upsampler_is_trained_and_both_stages_sampled_by_commands(data, tmp_path, capsys):
    small = [
        "--data", data, "--model-channels", "32", "--num-res-blocks", "1", "--channel-mult", "1,2",
        "--attention-resolutions", "", "--diffusion-steps", "20", "--steps", "2", "--batch-size", "4",
        "--device", "cpu", "--no-progress",
    ]  # fmt: skip
    base, up = str(tmp_path / "base"), str(tmp_path / "up")
    assert main(["train", *small, "--out", base, "--image-size", "4", "--sample-every", "0"]) == 0
    grid = ["--sample-every", "2", "--sample-count", "4", "--sample-steps", "2"]
    assert main(["train", *small, "--out", up, "--super-resolution", "4", *grid]) == 0
    assert (tmp_path / "up" / "samples" / "step-2.png").exists()
    assert "--low-res" in capsys.readouterr().out
    both = ["sample", base, "--upsampler", up, "--steps", "2", "--n", "2", "--device", "cpu"]
    assert main([*both, "--out", str(tmp_path / "x.npz")]) == 0
    with np.load(tmp_path / "x.npz") as drawn:
        assert drawn["arr_0"].shape == (2, 8, 8, 3)
    wrong = [*small, "--out", str(tmp_path / "no"), "--super-resolution", "8"]
    assert main(["train", *wrong]) == 1
    assert "super_resolution must be below the side of the images, 8" in capsys.readouterr().err


def test_a_classifier_learns_logs_its_accuracy_by_t_and_guides(data, tmp_path, capsys):
    noise = {"schedule": "linear", "diffusion_steps": 40}
    out = tmp_path / "classifier"
    train(
        config_of(
            data, out, classifier=True, steps=40, log_every=10, batch_size=8, lr=3e-3, pool="adaptive",
            model_channels=32, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(),
            **noise,
        )
    )  # fmt: skip
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = records[-1]
    assert {f"accuracy_q{i}" for i in range(4)} <= last.keys() and "vlb_bpd" not in last
    # Dark and bright images: easy but where there is little left of them.
    assert last["accuracy_q0"] == 1.0 and last["loss"] < records[0]["loss"]
    assert last["accuracy_q3"] <= last["accuracy_q0"]
    guide = iddpm_ext.load_classifier(out)
    assert guide.extra["class_names"] == ["0", "1"]

    model = UNet(UNetConfig(
        image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1,), attention_resolutions=(),
    ))  # fmt: skip
    model.diffusion = Diffusion("linear", 40)
    iddpm_ext.save(model, tmp_path / "model.safetensors")
    command = [
        "sample", str(tmp_path / "model.safetensors"), "--labels", "0,1", "--steps", "20", "--n", "2",
        "--classifier", str(out), "--device", "cpu",
    ]  # fmt: skip
    bright = {}
    for scale in ("0", "30"):
        file = tmp_path / f"{scale}.npz"
        assert main([*command, "--classifier-scale", scale, "--out", str(file)]) == 0
        with np.load(file) as drawn:
            bright[scale] = drawn["arr_0"].astype(float).mean(axis=(1, 2, 3))
    assert bright["30"][0] < bright["0"][0] and bright["30"][1] > bright["0"][1]

    model.diffusion = Diffusion("cosine", 40)
    iddpm_ext.save(model, tmp_path / "model.safetensors")
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "no.npz")]) == 1
    assert "classifier must be one for the network's noise" in capsys.readouterr().err


@pytest.mark.parametrize("make", [upsampler, guided])
def test_the_plain_formulation_gives_the_same_gradient_without_our_kernels(
    data, tmp_path, make, monkeypatch
):
    settings = {**OF_FILES[make], "steps": 1, "attention_resolutions": (4,)}
    settings.update(model_channels=32, num_res_blocks=1, channel_mult=(1, 2), diffusion_steps=20)
    moments = {}
    for plain in (False, True):
        if plain:
            for name in ("conv3x3", "qkv_attention", "group_norm_silu"):
                monkeypatch.setattr(f"iddpm_ext.networks.blocks.{name}", None)
        path = train(config_of(data, tmp_path / str(plain), plain=plain, **settings))
        moments[plain] = read_tensors(path, "optim.safetensors")
    for name, value in moments[False].items():
        if name.startswith("exp_avg."):
            scale = max(float(value.abs().max()), 1e-6)
            torch.testing.assert_close(moments[True][name], value, rtol=0, atol=1e-3 * scale)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"classifier": True},
            "num_head_channels must be given for a classifier with pool attention",
        ),
        ({"classifier": True, "class_cond": True}, "class_cond must be left out with classifier"),
        ({"super_resolution": 0}, "super_resolution must be at least 1, got 0"),
        ({"pool": "mean"}, "pool must be one of attention"),
    ],
)
def test_wrong_settings_are_refused(data, tmp_path, changes, says):
    with pytest.raises(ValueError, match=f"train: {says}"):
        config_of(data, tmp_path, **changes)

"""Two-stage sampling: a small image, then its details, as two commands with a file between would."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden.make_unet import fill_by_formula

import iddpm_ext
from iddpm_ext import Diffusion, UNet, UNetConfig, sample, sample_two_stage
from iddpm_ext.cli import main
from iddpm_ext.sampling.two_stage import rounded_to_levels

SEED_OF_THE_SECOND = 5 ^ 1 << 63


def network(side: int, classes: int | None = 4, **changes) -> UNet:
    config = UNetConfig(
        image_size=side, model_channels=32, num_res_blocks=1, channel_mult=(1, 2),
        attention_resolutions=(), num_classes=classes, **changes,
    )  # fmt: skip
    model = UNet(config).eval()
    fill_by_formula(model)
    with torch.no_grad():
        model.out[2].weight.mul_(0.1)
    model.diffusion = Diffusion("linear", 60)
    return model


@pytest.fixture(scope="module")
def stages() -> tuple[UNet, UNet]:
    return network(8), network(16, super_resolution=True)


def test_second_stage_sees_the_first_at_8_bits_with_its_labels(stages):
    base, upsampler = stages
    got = sample_two_stage(base, upsampler, 3, n=3, seed=5, progress=False)
    small = sample(base, 3, n=3, seed=5, labels=got.labels, progress=False)
    assert torch.equal(got.low_res, rounded_to_levels(small))
    assert (got.low_res - small).abs().max() <= 0.5 / 127.5 + 1e-6
    assert not torch.equal(got.low_res, small)
    large = sample(
        upsampler, 3, labels=got.labels, low_res=got.low_res, seed=SEED_OF_THE_SECOND,
        progress=False,
    )  # fmt: skip
    assert torch.equal(got.images, large)
    assert got.images.shape == (3, 3, 16, 16)
    assert got.labels is not None and got.labels.shape == (3,)


def test_levels_are_those_of_a_file(tmp_path):
    x = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    iddpm_ext.save_images(x, tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as arrays:
        read = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(rounded_to_levels(x), read)


def test_each_stage_has_its_own_steps_and_the_noise_of_its_own_seed(stages):
    base, upsampler = stages
    counts = {base: 0, upsampler: 0}
    handles = [
        model.register_forward_pre_hook(lambda m, _: counts.__setitem__(m, counts[m] + 1))
        for model in counts
    ]
    got = sample_two_stage(
        base, upsampler, 3, upsampler_steps=5, labels=[1, 2], seed=5, engine=False, progress=False
    )
    assert (counts[base], counts[upsampler]) == (3, 5)
    for handle in handles:
        handle.remove()
    same_seed = sample(upsampler, 5, labels=[1, 2], low_res=got.low_res, seed=5, engine=False,
                       progress=False)  # fmt: skip
    assert not torch.equal(same_seed, got.images)


def test_labels_go_to_the_stages_that_take_them(stages):
    base, upsampler = stages
    plain, enlarging = network(8, None), network(16, None, super_resolution=True)
    drawn = sample_two_stage(plain, upsampler, 2, n=2, progress=False)
    assert drawn.labels is not None
    assert sample_two_stage(base, enlarging, 2, labels=[3], progress=False).labels.tolist() == [3]
    assert sample_two_stage(plain, enlarging, 2, n=1, progress=False).labels is None


def test_stages_that_do_not_fit_are_refused_before_any_work(stages):
    base, upsampler = stages
    seen: list[object] = []
    handle = base.register_forward_pre_hook(lambda *_: seen.append(1))
    for second, says in (
        (base, "upsampler must be a UNet with super_resolution, got a network without"),
        (torch.nn.Identity(), "upsampler must be a UNet with super_resolution, got Identity"),
        (network(16, 5, super_resolution=True), "must have the 4 classes of the base, got 5"),
        (
            network(16, 4, super_resolution=True, in_channels=1, out_channels=2),
            r"low_res must be \[n, 1, h, w\]",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            sample_two_stage(base, second, 2, n=1, engine=False, progress=False)
    with pytest.raises(ValueError, match="low_res must be given"):
        sample_two_stage(upsampler, upsampler, 2, n=1, progress=False)
    with pytest.raises(ValueError, match="steps must be from 2 to 60, got 61"):
        sample_two_stage(base, upsampler, 2, upsampler_steps=61, n=1, progress=False)
    handle.remove()
    assert not seen


def test_command_line_samples_both_stages(stages, tmp_path, capsys):
    for name, model in zip(("base", "up"), stages, strict=True):
        iddpm_ext.save(model, tmp_path / f"{name}.safetensors")
    common = ["sample", str(tmp_path / "base.safetensors"), "--steps", "2", "--labels", "1,0",
              "--seed", "5"]  # fmt: skip
    both = [*common, "--upsampler", str(tmp_path / "up.safetensors"), "--upsampler-steps", "3"]
    assert main([*both, "--out", str(tmp_path / "both.npz")]) == 0
    base, upsampler = (iddpm_ext.load(tmp_path / f"{n}.safetensors") for n in ("base", "up"))
    expected = sample_two_stage(
        base, upsampler, 2, upsampler_steps=3, labels=[1, 0], seed=5, progress=False
    )
    iddpm_ext.save_images(expected.images, tmp_path / "expected.npz")
    with np.load(tmp_path / "both.npz") as got, np.load(tmp_path / "expected.npz") as wanted:
        assert np.array_equal(got["arr_0"], wanted["arr_0"])
        assert got["arr_1"].tolist() == [1, 0]
    assert (
        main([*both, "--animate", str(tmp_path / "a.gif"), "--out", str(tmp_path / "x.png")]) == 1
    )
    assert "upsampler must be left out with animate" in capsys.readouterr().err


def test_command_line_takes_the_flags_of_an_openai_file(tmp_path):
    model = network(8, None)
    torch.save(model.state_dict(), tmp_path / "model000001.pt")
    flags = (
        "image_size=8 num_heads=4 noise_schedule=linear diffusion_steps=60 rescale_timesteps=True"
    )
    arguments = ["sample", str(tmp_path / "model000001.pt"), "--steps", "2", "--n", "2"]
    assert main([*arguments, "--out", str(tmp_path / "x.npz")]) == 1
    assert main([*arguments, "--flags", flags, "--out", str(tmp_path / "x.npz")]) == 0
    iddpm_ext.save_images(sample(model, 2, n=2, progress=False), tmp_path / "y.npz")
    with np.load(tmp_path / "x.npz") as got, np.load(tmp_path / "y.npz") as wanted:
        assert np.array_equal(got["arr_0"], wanted["arr_0"])

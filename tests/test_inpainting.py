"""Images that a chain is given: masks, strength and RePaint, and callbacks that edit; by every way to run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from engine_networks import make
from PIL import Image
from torch import Tensor

import iddpm_ext
from iddpm_ext import Diffusion, cli, sample
from iddpm_ext.random import STREAM_FORWARD, STREAM_INITIAL, STREAM_REVERSE, NoiseKey, normal

SEED = 9
CHAIN = Diffusion("cosine", 400)


def network():
    model = make(image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1, 2))
    model.diffusion = CHAIN
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return network()


def given(model, n: int = 3) -> tuple[Tensor, Tensor]:
    """Images, and a mask of their lower half."""
    c = model.config
    g = torch.Generator().manual_seed(3)
    x_0 = torch.rand(n, c.in_channels, c.image_size, c.image_size, generator=g) * 2 - 1
    mask = torch.zeros(c.image_size, c.image_size)
    mask[c.image_size // 2 :] = 1
    return x_0, mask


def noised(chain: Diffusion, x_0: Tensor, i: int, key: NoiseKey) -> Tensor:
    """sqrt(ab) x_0 + sqrt(1 - ab) noise of step i, from the betas; x_0 itself below the first."""
    if i < 0:
        return x_0
    bar = float((1 - chain.betas[: i + 1]).prod())
    noise = normal(key, x_0.shape, "cpu").to(x_0.dtype)
    return math.sqrt(bar) * x_0 + math.sqrt(1 - bar) * noise


def forward_key(chain: Diffusion, i: int, n: int, draw: int = 0) -> NoiseKey:
    return NoiseKey(SEED, STREAM_FORWARD, torch.arange(n), int(chain.timesteps[i]), draw)


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "unipc"])
def test_a_mask_is_what_a_callback_that_puts_the_known_part_back_does(model, sampler, engine):
    x_0, mask = given(model)
    chain = CHAIN.respace(6)
    options = {"sampler": sampler, "seed": SEED, "engine": engine, "progress": False}
    x_T = normal(NoiseKey(SEED, STREAM_INITIAL, torch.arange(3), 0), x_0.shape, "cpu")
    start = torch.lerp(noised(chain, x_0, 5, forward_key(chain, 5, 3)), x_T, mask)

    def put(step) -> None:
        i = step.t - 1
        key = None if i < 0 else forward_key(chain, i, 3)
        step.x.copy_(torch.where(mask > 0, step.x, noised(chain, x_0, i, key)))

    expected = sample(model, 6, x_T=start, callback=put, batch_size=3, **options)
    got = sample(model, 6, x_0=x_0, mask=mask, **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert torch.equal(got[..., mask == 0], x_0[..., mask == 0])
    free = sample(model, 6, n=3, **options)
    assert float((free - got)[..., mask > 0].abs().max()) > 1e-3
    parts = sample(model, 6, x_0=x_0, mask=mask.bool()[None], batch_size=2, **options)
    torch.testing.assert_close(parts, got, rtol=0, atol=1e-4)
    walk = list(iddpm_ext.sample_progressive(model, 6, x_0=x_0, mask=mask, **options))
    torch.testing.assert_close(walk[-1].x, got, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("steps", [1, 4])
def test_strength_takes_the_last_steps_of_the_chain_from_noised_images(model, sampler, steps):
    x_0, _ = given(model)
    chain = CHAIN.respace(8)
    key = NoiseKey(SEED, STREAM_INITIAL, torch.arange(3), 0)
    got = sample(model, 8, x_0=x_0, strength=steps / 8, sampler=sampler, seed=SEED, progress=False)
    x = noised(chain, x_0, steps - 1, key)
    seen = []
    for step in iddpm_ext.sample_progressive(
        model, 8, x_0=x_0, strength=steps / 8, sampler=sampler, seed=SEED, progress=False
    ):
        seen.append(step.t)
    assert seen == list(reversed(range(steps)))
    torch.testing.assert_close(step.x, got, rtol=0, atol=1e-5)
    if steps > 1:  # a chain has two steps at least
        shorter = chain.timesteps[:steps].tolist()
        expected = sample(model, shorter, x_T=x, sampler=sampler, seed=SEED, progress=False)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_repaint_is_the_algorithm_of_the_paper_in_float64():
    def mixing(x: Tensor, timesteps: Tensor) -> Tensor:
        eps = torch.tanh(x + 0.2 * x.mean((1, 2, 3), keepdim=True)) * (
            1 + timesteps.view(-1, 1, 1, 1) / 1e4
        )
        return torch.cat([eps, 0.3 * eps], 1)  # fmt: skip

    g = torch.Generator().manual_seed(0)
    x_0 = torch.rand(2, 1, 4, 4, generator=g, dtype=torch.float64) * 2 - 1
    x_T = torch.randn(2, 1, 4, 4, generator=g, dtype=torch.float64)
    mask = torch.zeros(4, 4, dtype=torch.float64)
    mask[1:] = 1
    chain, n = CHAIN.respace(5), torch.arange(2)
    x = torch.lerp(noised(chain, x_0, 4, forward_key(chain, 4, 2)), x_T, mask)
    for i in reversed(range(5)):
        t, index = torch.full((2,), i), int(chain.timesteps[i])
        for again in range(3 if i > 0 else 1):
            if again:
                beta = chain.betas[i]
                z = normal(forward_key(chain, i, 2, 2 * again + 1), x.shape, "cpu").double()
                x = (1 - beta).sqrt() * x + beta.sqrt() * z
            found = chain.p_mean_variance(mixing(x, chain.model_timesteps(t)), x, t)
            z = normal(NoiseKey(SEED, STREAM_REVERSE, n, index, again), x.shape, "cpu").double()
            x = found.mean + (found.log_variance / 2).exp() * z * (i > 0)
            key = None if i == 0 else forward_key(chain, i - 1, 2, 2 * again)
            x = torch.where(mask > 0, x, noised(chain, x_0, i - 1, key))
    got = sample(mixing, 5, x_0=x_0, mask=mask, x_T=x_T, repaint=3, seed=SEED, diffusion=CHAIN,
                 backend="reference", progress=False)  # fmt: skip
    torch.testing.assert_close(got.double(), x, rtol=0, atol=1e-6)  # it returns float32


def test_a_soft_mask_mixes_and_begins_with_strength(model):
    x_0, mask = given(model)
    options = {"x_0": x_0, "seed": SEED, "progress": False}
    soft = sample(model, 6, mask=0.25 * mask, **options)
    assert torch.equal(soft[..., mask == 0], x_0[..., mask == 0])
    both = sample(model, 6, mask=mask, strength=0.5, **options)
    assert torch.equal(both[..., mask == 0], x_0[..., mask == 0])
    alone = sample(model, 6, mask=mask, **options)
    # Of half of the chain more of the image is left.
    far, near = ((x - x_0)[..., mask > 0].square().mean() for x in (alone, both))
    assert float(near) < float(far)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "dpm++3", "unipc", "unipc3"])
def test_an_edit_by_a_callback_moves_the_chain_of_every_sampler(model, sampler):
    """It is carried on by the next step's own factor of x_t."""
    edit, chain = 0.05, CHAIN.respace(6)

    def after_next(change: float) -> Tensor:
        seen = []

        def callback(step) -> None:
            if step.t == 2:
                step.x.add_(change)
            if step.t == 1:
                seen.append(step.x.clone())

        sample(blind, 6, callback=callback, **options)
        return seen[0]

    # A network that sees no difference, so that nothing but the factor is left.
    def blind(x: Tensor, timesteps: Tensor) -> Tensor:
        return torch.zeros_like(x)

    options = {"n": 2, "sampler": sampler, "seed": SEED, "clip": False, "progress": False,
               "diffusion": Diffusion("cosine", 400, variance="fixed_small", prediction="x_0"),
               "image_shape": (1, 4, 4)}  # fmt: skip
    moved = after_next(edit) - after_next(0.0)
    factor = chain._chain.mean_coefficients(1.0 if sampler == "ddpm" else 0.0)[1][1]
    expected = torch.full_like(moved, float(factor) * edit)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)
    # The same at an earlier step, of a real network and its engine: what is written is what counts.
    own = {"n": 2, "sampler": sampler, "seed": SEED, "progress": False}
    moved = sample(model, 6, callback=lambda s: s.x.mul_(0.5) if s.t == 3 else None, **own)
    still = sample(model, 6, **own)
    assert float((moved - still).abs().max()) > 1e-3
    slow = sample(model, 6, engine=False, callback=lambda s: s.x.mul_(0.5) if s.t == 3 else None,
                  **own)  # fmt: skip
    torch.testing.assert_close(moved, slow, rtol=0, atol=2e-4)


def test_the_command_line_changes_an_image_where_a_mask_is_white(model, tmp_path, capsys):
    iddpm_ext.save(model, tmp_path / "m.safetensors")
    levels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "x.png")
    white = np.zeros((8, 8), np.uint8)
    white[:, 4:] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    np.savez(tmp_path / "x.npz", np.stack([levels, levels]))
    words = [
        "sample",
        str(tmp_path / "m.safetensors"),
        "--steps",
        "4",
        "--out",
        str(tmp_path / "o.npz"),
    ]
    for image in ("x.png", "x.npz"):
        given = ["--image", str(tmp_path / image), "--mask", str(tmp_path / "mask.png"), "-n", "2"]
        assert cli.main([*words, *given, "--repaint", "2"]) == 0
        drawn = np.load(tmp_path / "o.npz")["arr_0"]
        assert drawn.shape == (2, 8, 8, 3)
        assert np.array_equal(drawn[:, :, :4], np.stack([levels, levels])[:, :, :4])
        assert not np.array_equal(drawn[:, :, 4:], np.stack([levels, levels])[:, :, 4:])
    assert (
        cli.main([*words, "--image", str(tmp_path / "x.png"), "--strength", "0.5", "-n", "1"]) == 0
    )
    assert "(2 steps" in capsys.readouterr().out
    Image.fromarray(white[:4]).save(tmp_path / "small.png")
    for given, says in (
        (["--image", str(tmp_path / "none.png")], "image must exist"),
        (["--mask", str(tmp_path / "mask.png")], "x_0 must be given with mask"),
        (["--image", str(tmp_path / "small.png")], "image must be 8x8 for this network, got 8x4"),
    ):
        assert cli.main([*words, *given]) == 1
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x_0": None}, ValueError, "x_0 must be given with mask, got None"),
        ({"x_0": None, "mask": None, "strength": 0.5}, ValueError, "given with strength"),
        ({"mask": None}, ValueError, "strength must be below 1, or mask given"),
        ({"strength": 0.0}, ValueError, "strength must be a number above 0, at most 1, got 0.0"),
        ({"strength": 1.5}, ValueError, "at most 1, got 1.5"),
        ({"repaint": 0}, ValueError, "repaint must be an int above 0, got 0"),
        ({"repaint": 2, "sampler": "dpm++"}, ValueError, "repaint must be 1 .* with solvers"),
        ({"repaint": 2, "mask": None, "strength": 0.5}, ValueError, "repaint must be 1 without a"),
        ({"mask": torch.ones(3, 3)}, ValueError, r"mask must fit \[3, 3, 8, 8\] by broadcasting"),
        ({"mask": torch.full((8, 8), 2.0)}, ValueError, r"mask must lie in \[0, 1\], got 2 .. 2"),
        ({"mask": [1]}, TypeError, "mask must be a tensor, got list"),
        ({"x_0": torch.full((3, 3, 8, 8), 7.0)}, ValueError, r"x_0 must lie in \[-1, 1\]"),
        ({"n": 2}, ValueError, "must agree in length, got n 2, x_0 3"),
        ({"x_T": torch.zeros(3, 3, 8, 8), "strength": 0.5}, ValueError, "x_T must be None with"),
        ({"x_T": torch.zeros(3, 3, 4, 8)}, ValueError, r"x_T must be torch.float32 \[n, 3, 8, 8\]"),
    ],
)
def test_errors_come_before_any_step(model, change, error, says):
    x_0, mask = given(model)
    assert x_0.shape == (3, 3, 8, 8)

    def never(step) -> None:
        raise AssertionError("a step was taken")

    options = {"x_0": x_0, "mask": mask, "seed": SEED, "progress": False, **change}
    with pytest.raises(error, match=f"sample: .*{says}|sample: {says}"):
        sample(model, 4, callback=never, **options)

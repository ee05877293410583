"""The reverse chain: exact moments, the original's numbers, the noise contract, every bad input."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import iddpm_ext
from iddpm_ext import Diffusion, UNet, UNetConfig, sample, sample_progressive
from iddpm_ext.engines.kept import kept_of
from iddpm_ext.random import NoiseKey, integers, normal

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sampling.json").read_text())
SHAPE = (1, 2, 3)


def half_x(x: Tensor, t: Tensor) -> Tensor:
    """An elementwise model whose output for an image cannot depend on the batch."""
    return 0.5 * x + 0.01 * t.view(-1, 1, 1, 1).cos()


def gaussian(mean: float, variance: float, diffusion: Diffusion) -> Callable[..., Tensor]:
    """The optimal eps for data N(mean, variance): sqrt(1 - ab) (x - sqrt(ab) mean) / var(x_t)."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        index = (t * (diffusion.num_train_timesteps / 1000)).round().long()
        ab = diffusion.alphas_cumprod[index].view(-1, 1, 1, 1).to(x.dtype)
        return (1 - ab).sqrt() * (x - ab.sqrt() * mean) / (ab * variance + 1 - ab)

    return model


def tiny(**changes: Any) -> UNet:
    """A small network whose zero-initialised layers are filled, so that its output is not zero."""
    settings: dict[str, Any] = {
        "image_size": 8, "in_channels": 1, "out_channels": 2, "model_channels": 32,
        "num_res_blocks": 1, "channel_mult": (1, 2), "attention_resolutions": (4,),
    }  # fmt: skip
    torch.manual_seed(0)
    model = UNet(UNetConfig(**{**settings, **changes}))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    model.diffusion = Diffusion("cosine", 100)
    return model.eval()


# ---- what the chain computes


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5)])
@pytest.mark.parametrize("mean, variance", [(0.0, 1.0), (0.3, 0.04)])
def test_gaussian_data_come_back_with_their_mean_and_variance(sampler, eta, mean, variance):
    diffusion = Diffusion("cosine", 1000, variance="fixed_small")
    x = sample(
        gaussian(mean, variance, diffusion), 250, n=4, sampler=sampler, eta=eta, clip=False,
        diffusion=diffusion, image_shape=(1, 64, 64), progress=False,
    )  # fmt: skip
    # The chain is linear in (x_T, noise): its variance follows from the coefficients exactly.
    chain = diffusion.respace(250)
    table = chain.table(sampler=sampler, eta=eta, dtype=torch.float64)
    expected_mean, expected_variance = 0.0, 1.0
    for i in reversed(range(250)):
        ab = chain.alphas_cumprod[i]
        slope = (1 - ab).sqrt() / (ab * variance + 1 - ab)
        p, q, c1, c2, u, _, m = table[i, :7]
        gain = c1 * (p + q * slope) + c2
        expected_mean = gain * expected_mean - c1 * q * slope * ab.sqrt() * mean
        expected_variance = gain**2 * expected_variance + m * u.exp()
    assert abs(x.mean() - expected_mean) < 5 * (variance / x.numel()) ** 0.5
    assert abs(x.var() / expected_variance - 1) < 5 * (2 / x.numel()) ** 0.5
    assert abs(expected_mean - mean) < 0.01 and abs(expected_variance / variance - 1) < 0.1


@pytest.mark.parametrize("case", sorted(GOLDEN["chains"]))
def test_a_chain_is_the_originals_given_its_noise(case):
    """With x_T and the noise of every step given to both, the chains agree to float64's rounding."""
    golden = GOLDEN["chains"][case]
    schedule, total, spacing, variance, sampler, eta, clip = golden["settings"]
    diffusion = Diffusion(schedule, total, variance=variance)
    x_T = torch.tensor(GOLDEN["x_T"], dtype=torch.float64).view(2, 1, 2, 2)
    seen = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        eps = 0.9 * x + 0.1 * torch.sin(t.double() / 50).view(-1, 1, 1, 1)
        return torch.cat([eps, torch.cos(3 * x)], 1) if variance == "learned_range" else eps

    *_, last = sample_progressive(
        model, spacing, x_T=x_T, sampler=sampler, eta=eta, clip=clip, diffusion=diffusion,
        seed=GOLDEN["seed"], progress=False,
    )  # fmt: skip
    torch.testing.assert_close(
        last.x.flatten(), torch.tensor(golden["x"], dtype=torch.float64), rtol=2e-8, atol=2e-8
    )
    assert seen == pytest.approx(golden["timesteps"], rel=1e-6)


def test_reverse_noise_is_keyed_by_image_and_training_step():
    diffusion = Diffusion("cosine", 100, variance="fixed_large")
    zero = lambda x, t: torch.zeros_like(x)  # noqa: E731
    walk = sample_progressive(
        zero, [0, 40, 99], n=3, clip=False, diffusion=diffusion, image_shape=SHAPE, seed=7,
        batch_size=2, progress=False,
    )  # fmt: skip
    chain, samples = diffusion.respace([0, 40, 99]), torch.arange(3)
    x = normal(NoiseKey(7, 0, samples, 0), (3, *SHAPE))
    for i, timestep, step in zip((2, 1, 0), (99, 40, 0), walk, strict=True):
        z = normal(NoiseKey(7, 1, samples, timestep), (3, *SHAPE))
        x = chain.reverse_step(torch.zeros_like(x), x, torch.full((3,), i), z, clip=False).x_prev
        torch.testing.assert_close(step.x, x, rtol=1e-5, atol=1e-5)
        assert (step.t, step.timestep, step.first) == (i, timestep, 0)


# ---- the same images however they are computed


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 1.0)])
def test_an_image_of_a_seed_is_bitwise_the_same_in_every_batch(sampler, eta):
    diffusion = Diffusion("cosine", 100, variance="fixed_small")

    def draw(n: int, batch_size: int | None) -> Tensor:
        return sample(
            half_x, 10, n=n, batch_size=batch_size, sampler=sampler, eta=eta, diffusion=diffusion,
            image_shape=SHAPE, seed=3, progress=False,
        )  # fmt: skip

    whole = draw(7, None)
    for n, batch_size in ((7, 1), (7, 3), (2, 2)):
        assert torch.equal(draw(n, batch_size), whole[:n])
    assert len(whole.unique(dim=0)) == 7


def test_progressive_ends_with_what_sample_returns():
    model = tiny(num_classes=4)
    settings: dict[str, Any] = {"n": 5, "batch_size": 2, "seed": 1, "progress": False}
    steps = list(sample_progressive(model, 4, **settings))
    assert [step.t for step in steps] == [3, 2, 1, 0]
    assert all(step.x.shape == step.x_0.shape == (5, 1, 8, 8) for step in steps)
    assert torch.equal(steps[-1].x, sample(model, 4, **settings))
    assert torch.equal(steps[-1].x, steps[-1].x_0)


@pytest.mark.parametrize("changes", [{}, {"num_classes": 4}, {"super_resolution": True}])
def test_engine_and_backend_do_not_change_the_images(changes):
    model = tiny(**changes)
    low_res = torch.rand(3, 1, 4, 4) * 2 - 1 if changes.get("super_resolution") else None
    settings: dict[str, Any] = {"n": 3, "low_res": low_res, "progress": False}
    plain = sample(model, 6, engine=False, backend="reference", **settings)
    torch.testing.assert_close(sample(model, 6, **settings), plain, rtol=1e-3, atol=1e-3)
    assert plain.dtype == torch.float32 and plain.abs().max() <= 1


def test_given_x_T_starts_the_chain():
    diffusion = Diffusion("cosine", 100, variance="fixed_small")
    x_T = torch.randn(3, *SHAPE)
    calls: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(x)
        return half_x(x, t)

    settings: dict[str, Any] = {"x_T": x_T, "sampler": "ddim", "diffusion": diffusion}
    first = sample(model, 5, seed=1, progress=False, **settings)
    assert torch.equal(calls[0], x_T)
    assert torch.equal(first, sample(model, 5, seed=2, progress=False, **settings))


# ---- labels and guidance


def test_labels_not_given_are_drawn_from_their_own_stream():
    model, seen = tiny(num_classes=4), []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["y"]), with_kwargs=True
    )
    drawn = sample(model, 2, n=6, engine=False, seed=5, progress=False)
    expected = integers(NoiseKey(5, 3, torch.arange(6), 0), 4, (6, 1))[:, 0]
    assert torch.equal(seen[0], expected) and len(expected.unique()) > 1
    given = sample(model, 2, labels=expected.tolist(), engine=False, seed=5, progress=False)
    assert torch.equal(drawn, given)


def test_guidance_extrapolates_from_unlabelled_to_labelled():
    diffusion = Diffusion("cosine", 100)
    batches = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        batches.append(y.tolist())
        eps = half_x(x, t) + 0.1 * y.view(-1, 1, 1, 1)
        return torch.cat([eps, torch.zeros_like(x) + y.view(-1, 1, 1, 1) / 10], dim=1)

    def combined(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        eps = half_x(x, t) + 0.1 * (-1 + 3.0 * (y.view(-1, 1, 1, 1) + 1))
        return torch.cat([eps, torch.zeros_like(x) + y.view(-1, 1, 1, 1) / 10], dim=1)

    settings: dict[str, Any] = {
        "labels": [0, 2], "diffusion": diffusion, "image_shape": SHAPE, "progress": False,
    }  # fmt: skip
    guided = sample(model, 5, guidance_scale=3.0, **settings)
    assert batches[0] == [0, 2, -1, -1]
    torch.testing.assert_close(guided, sample(combined, 5, **settings), rtol=1e-4, atol=1e-4)


# ---- models


def test_a_foreign_model_gets_only_the_arguments_that_are_given():
    diffusion = Diffusion("linear", 50, variance="fixed_large")
    model = torch.nn.Conv2d(1, 1, 1)

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.drop = model, torch.nn.Dropout(0.5)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.drop(self.conv(x))

    wrapped = Wrapped().train()
    settings: dict[str, Any] = {"diffusion": diffusion, "image_shape": SHAPE, "progress": False}
    assert torch.equal(sample(wrapped, 5, **settings), sample(wrapped, 5, **settings))
    assert wrapped.training and wrapped.drop.training


def test_a_changed_weight_changes_the_next_image():
    model = tiny()
    before = sample(model, 3, n=2, progress=False)
    with torch.no_grad():
        model.out[2].bias += 0.5
    after = sample(model, 3, n=2, progress=False)
    assert not torch.allclose(before, after)
    plain = sample(model, 3, n=2, engine=False, backend="reference", progress=False)
    torch.testing.assert_close(after, plain, rtol=1e-3, atol=1e-3)


def test_copies_of_a_model_leave_its_engine_behind():
    model = tiny()
    before = sample(model, 2, n=1, progress=False)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not kept_of(copied)._programs
        assert torch.equal(sample(copied, 2, n=1, progress=False), before)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_callback_sees_every_step_of_every_batch():
    seen = []
    sample(tiny(), 3, n=3, batch_size=2, callback=seen.append, progress=False)
    assert [(s.t, s.first, len(s.x)) for s in seen] == [
        (2, 0, 2), (1, 0, 2), (0, 0, 2), (2, 2, 1), (1, 2, 1), (0, 2, 1),
    ]  # fmt: skip


def test_a_model_walks_the_step_schedule_of_its_checkpoint():
    model = tiny()
    model.extra = {"step_schedules": {"3": [0, 17, 99]}}
    seen = [step.timestep for step in sample_progressive(model, "optimal-3", n=1, progress=False)]
    assert seen == [99, 17, 0]
    visiting = model.diffusion.respace([0, 5, 17, 99])
    short = sample_progressive(model, "optimal-3", n=1, diffusion=visiting, progress=False)
    assert [step.timestep for step in short] == [99, 17, 0]
    with pytest.raises(
        ValueError, match=r"schedule of the checkpoint \(optimal-3\), got 'optimal-4'"
    ):
        sample(model, "optimal-4")


def test_images_can_be_trained_on():
    x = sample(tiny(), 2, n=1, progress=False)
    assert not x.requires_grad and not x.is_inference()


# ---- bad input

NAN = torch.full((2, 1, 8, 8), float("nan"))
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"steps": 1}, ValueError, "steps must be from 2 to 100, got 1"),
    ({"steps": 101}, ValueError, "steps must be from 2 to 100, got 101"),
    ({"steps": [0, 100]}, ValueError, "steps must be steps of this chain of 100.*got.*100"),
    ({"steps": "ddim77"}, ValueError, "steps must be steps of this chain of 100"),
    ({"steps": "many"}, ValueError, "steps must be steps of this chain"),
    ({"steps": 2.5}, TypeError, "steps must be steps of this chain"),
    ({"steps": "optimal-8"}, ValueError, "the checkpoint has none"),
    ({"sampler": "euler"}, ValueError, r"sampler must be one of ddpm, ddim, dpm\+\+.*, got 'euler'"),
    ({"sampler": "ddim", "eta": 1.5}, ValueError, "eta must be a number from 0 to 1, got 1.5"),
    ({"sampler": "ddim", "eta": float("nan")}, ValueError, "eta must be a number from 0 to 1"),
    ({"eta": 0.5}, ValueError, "eta must be 0 with sampler 'ddpm'"),
    ({"seed": -1}, ValueError, "seed must be an int from 0"),
    ({"seed": 1 << 64}, ValueError, "seed must be an int from 0"),
    ({"n": 0}, ValueError, "n must be an int above 0, got 0"),
    ({"n": 3, "labels": [1, 2]}, ValueError, "must agree in length, got n 3, labels 2"),
    ({"labels": [1], "x_T": torch.zeros(2, 1, 8, 8)}, ValueError, "labels 1, x_T 2"),
    ({"labels": [4]}, ValueError, "labels must be from 0 to 3, or -1 for none, got 4"),
    ({"labels": [-2]}, ValueError, "labels must be from 0 to 3.*got -2"),
    ({"labels": [0.5]}, TypeError, "labels must be integers"),
    ({"labels": []}, (TypeError, ValueError), "labels must be integers"),
    ({"labels": [[1]]}, ValueError, "labels must be integers"),
    ({"labels": "shoe"}, TypeError, "labels must be integers"),
    ({"guidance_scale": float("inf")}, ValueError, "guidance_scale must be a finite number"),
    ({"x_T": NAN}, ValueError, "x_T must be finite, got nan at"),
    ({"x_T": torch.zeros(2, 3, 8, 8)}, ValueError, r"must be \(1, H, W\)"),
    ({"x_T": torch.zeros(2, 1, 9, 8)}, ValueError, "multiples of 2"),
    ({"x_T": torch.zeros(1, 8, 8)}, ValueError, r"x_T must be \[n, C, H, W\]"),
    ({"x_T": torch.zeros(2, 1, 8, 8).long()}, TypeError, "x_T must be float32 or float64"),
    ({"x_T": torch.zeros(2, 1, 8, 8, device="meta")}, ValueError, "x_T must be on cpu, got meta"),
    ({"x_T": [0.0]}, TypeError, "x_T must be a tensor"),
    (
        {"x_T": torch.zeros(2, 1, 8, 8), "image_shape": (1, 4, 4)},
        ValueError,
        r"x_T must be \[n, 1, 4, 4\]",
    ),
    ({"low_res": torch.zeros(2, 1, 4, 4)}, ValueError, "low_res must be None"),
    ({"image_shape": (1, 8)}, ValueError, "image_shape must be three positive ints"),
    ({"batch_size": 0}, ValueError, "batch_size must be an int above 0"),
    ({"backend": "vulkan"}, ValueError, "backend must be one of"),
    ({"backend": "cuda"}, RuntimeError, "backend 'cuda' does not support"),
    ({"dtype": torch.int8}, ValueError, "dtype must be float32, bfloat16 or float16"),
    ({"diffusion": Diffusion("linear", 100)}, ValueError, "diffusion must be the model's own"),
    ({"diffusion": "cosine"}, TypeError, "diffusion must be an iddpm_ext.Diffusion"),
    ({"clip": 1}, TypeError, "clip must be True or False"),
    ({"model": "weights.pt"}, TypeError, "model must be callable"),
    ({"model": half_x}, ValueError, "diffusion must be given"),
    ({"model": half_x, "diffusion": Diffusion()}, ValueError, "image_shape must be given"),
]  # fmt: skip


@pytest.fixture(scope="module")
def untouchable() -> UNet:
    """A class-conditional network that must not be reached."""
    model = tiny(num_classes=4)
    model.register_forward_pre_hook(lambda *_: pytest.fail("work was done"))
    return model


@pytest.mark.parametrize(
    "kwargs, error, match", BAD, ids=[f"{'-'.join(k)}-{match}"[:60] for k, _, match in BAD]
)
def test_bad_input_is_refused_before_any_work(kwargs, error, match, untouchable):
    arguments: dict[str, Any] = {"model": untouchable, "engine": False, **kwargs}
    if kwargs.get("backend") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    for function in (sample, sample_progressive):
        with pytest.raises(error, match=match):
            function(**arguments)


def test_super_resolution_needs_an_image_to_start_from():
    model = tiny(super_resolution=True)
    with pytest.raises(ValueError, match="low_res must be given"):
        sample(model)
    with pytest.raises(ValueError, match="low_res must be finite"):
        sample(model, low_res=NAN)
    with pytest.raises(ValueError, match=r"low_res must be \[n, 1, h, w\]"):
        sample(model, low_res=torch.zeros(2, 3, 4, 4))


def test_an_unconditional_network_takes_no_labels_and_no_guidance():
    with pytest.raises(ValueError, match="labels must be None for an unconditional network"):
        sample(tiny(), labels=[1])
    with pytest.raises(ValueError, match="guidance_scale must be 1"):
        sample(tiny(), guidance_scale=2.0)


def test_a_model_that_returns_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match="model_output must be"):
        sample(lambda x, t: x[:, :, :1], 2, diffusion=Diffusion("cosine", 10, variance="fixed_small"),
               image_shape=SHAPE, progress=False)  # fmt: skip


def test_a_respacing_of_the_models_chain_may_be_given():
    model = tiny()
    short = model.diffusion.respace(10)
    x = sample(model, None, n=2, diffusion=short, progress=False)
    assert torch.equal(x, sample(model, 10, n=2, progress=False))
    assert iddpm_ext.sample is sample

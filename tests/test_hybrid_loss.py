"""Specific to the hybrid loss: which part trains what, and how they are added."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from iddpm_ext import ops
from iddpm_ext.ops.spec import REGISTRY, unavailable
from iddpm_ext.ops.synthetic import bound_call
from iddpm_ext.random import NoiseKey, normal

BACKENDS = [
    name
    for name in ("reference", "cpu", "triton")
    if unavailable("hybrid_loss", name, "cpu", torch.float32) is None
]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def call(n: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    shape = (n, 3, 8, 6)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    return {**bound_call(shape, "cpu", dtype), "noise": noise}


def by_output(kwargs: dict[str, Any], part: str, backend: str) -> Tensor:
    out = kwargs["model_output"].detach().requires_grad_(True)
    result = ops.hybrid_loss(**{**kwargs, "model_output": out}, backend=backend)
    (gradient,) = torch.autograd.grad(getattr(result, part).sum(), out)
    return gradient


@each_backend
def test_the_variational_term_trains_the_variance_alone_and_mse_the_mean_alone(backend: str):
    kwargs = call()
    by_mse, by_vlb = (by_output(kwargs, part, backend) for part in ("mse", "vlb"))
    assert by_vlb[:, :3].abs().max() == 0 and by_mse[:, 3:].abs().max() == 0
    assert by_vlb[:, 3:].abs().min() > 0 and by_mse[:, :3].abs().min() > 0


@each_backend
def test_loss_adds_the_term_of_the_whole_chain_by_its_weight(backend: str):
    kwargs = call()
    mse, vlb = result = ops.hybrid_loss(**kwargs, vlb_weight=0.02, backend=backend)
    assert torch.allclose(result.loss, mse + 0.02 * 50 * vlb, rtol=1e-6)
    expected = by_output(kwargs, "mse", backend) + 1e-3 * 50 * by_output(kwargs, "vlb", backend)
    assert torch.allclose(by_output(kwargs, "loss", backend), expected, rtol=1e-5, atol=1e-12)


@each_backend
@pytest.mark.parametrize("part", ["mse", "vlb"])
def test_a_float16_gradient_is_scaled_before_it_is_rounded(part: str, backend: str):
    # As float16 an unscaled gradient of so many elements is below its normal numbers.
    shape = (2, 3, 64, 64)
    kwargs = {
        **bound_call(shape, "cpu", torch.float16),
        "noise": NoiseKey(1, 2, torch.arange(2), 0),
    }
    out = kwargs["model_output"].requires_grad_(True)

    def gradient(output: Tensor, backend: str) -> Tensor:
        result = ops.hybrid_loss(**{**kwargs, "model_output": output}, backend=backend)
        return torch.autograd.grad(getattr(result, part).sum() * 4096, out)[0]

    expected = gradient(out.double(), "reference").double()
    distance = (gradient(out, backend).double() - expected).abs()
    size = (
        expected.abs() + expected[expected != 0].abs().mean()
    )  # of what cancels, where a term crosses 0
    assert (distance <= torch.finfo(torch.float16).eps * size).all()


@each_backend
def test_the_term_equals_vlb_terms_without_clipping(backend: str):
    kwargs = call()
    arguments = {k: kwargs[k] for k in ("model_output", "x_0", "x_t", "t", "table")}
    expected = ops.vlb_terms(**arguments, clip=False, backend="reference")
    assert torch.allclose(ops.hybrid_loss(**kwargs, backend=backend).vlb, expected, rtol=1e-5)


def test_mse_passes_gradcheck_in_the_mean_and_the_term_in_the_variance():
    kwargs = {k: v.double() if v.is_floating_point() else v for k, v in call().items()}
    out, v = kwargs.pop("model_output").chunk(2, dim=1)

    def part(index: int, mean: Tensor, variance: Tensor) -> Tensor:
        both = torch.cat([mean, variance], dim=1)
        return ops.hybrid_loss(both, **kwargs, backend="reference")[index]

    out, v = out.requires_grad_(True), v.requires_grad_(True)
    for index, (leaf, arguments) in enumerate(
        [(out, lambda x: (x, v.detach())), (v, lambda x: (out.detach(), x))]
    ):
        check = torch.autograd.gradcheck
        assert check(lambda x, i=index, a=arguments: part(i, *a(x)), leaf, fast_mode=True)


@each_backend
def test_drawn_noise_gives_the_loss_of_the_same_noise_given(backend: str):
    kwargs = call()
    key = NoiseKey(7, 2, torch.arange(4) + 100, kwargs["t"])
    drawn = ops.hybrid_loss(**{**kwargs, "noise": key}, backend=backend)
    given = ops.hybrid_loss(**{**kwargs, "noise": normal(key, (4, 3, 8, 6))}, backend=backend)
    assert torch.allclose(drawn.mse, given.mse, rtol=1e-5)


@each_backend
@pytest.mark.parametrize("name", ["hybrid_loss", "vlb_terms"])
def test_an_example_gives_the_same_bits_alone_and_in_a_batch(name: str, backend: str):
    kwargs = call(16)
    if name == "vlb_terms":
        del kwargs["noise"]
    alone = {k: v if k == "table" else v[5:6] for k, v in kwargs.items()}

    def bits(arguments: dict[str, Any]) -> list[Tensor]:
        out = arguments["model_output"].detach().requires_grad_(True)
        result = REGISTRY[name].public(**{**arguments, "model_output": out}, backend=backend)
        parts = [result] if name == "vlb_terms" else list(result)
        return [*parts, torch.autograd.grad(sum(p.sum() for p in parts), out)[0]]

    for one, many in zip(bits(alone), bits(kwargs), strict=True):
        assert torch.equal(one[0], many[5])

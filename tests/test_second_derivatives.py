"""Derivatives of derivatives, tangents and batches of gradients are right on every backend, never zero."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from op_calls import assert_close, cloned, differentiable, tensors, to_double
from torch import Tensor

from iddpm_ext.ops import synthetic
from iddpm_ext.ops.spec import REGISTRY, Case, OpSpec, unavailable

DIFFERENTIABLE = [spec for spec in REGISTRY.values() if spec.differentiable]
SMALL = 800


def cases(specs: list[OpSpec], dtype: torch.dtype) -> list[Any]:
    """(spec, case) with something to differentiate, small."""
    return [
        pytest.param(spec, case, id=f"{spec.name}-{case.label}")
        for spec in specs
        for case in spec.sample_inputs("cpu", dtype)
        if 0 < sum(case.kwargs[k].numel() for k in leaves_of(spec, case.kwargs)) < SMALL
        and case.label not in synthetic.LAYOUTS
    ]


def leaves_of(spec: OpSpec, kwargs: dict[str, Any]) -> list[str]:
    return [k for k in spec.differentiable if isinstance(kwargs.get(k), Tensor)]


def weighted(results: list[Tensor], seed: int) -> Tensor:
    """A fixed weighted sum, in float64."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for x in results:
        weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        total = total + (x.double() * weights).sum()
    return total


def second(spec: OpSpec, backend: str, kwargs: dict[str, Any]) -> list[Tensor]:
    """Gradients of a weighted sum of the gradients of a weighted sum of squared results."""
    leaves = [kwargs[k] for k in leaves_of(spec, kwargs)]
    results = [r for r in tensors(spec.public(**kwargs, backend=backend)) if r.requires_grad]
    scale = [r.double().square() for r in results]
    first = torch.autograd.grad(weighted(scale, 1), leaves, create_graph=True, allow_unused=True)
    total = weighted([g for g in first if g is not None and g.requires_grad], 2)
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


@pytest.mark.parametrize(
    ("spec", "case"), cases([s for s in DIFFERENTIABLE if not s.stops_gradient], torch.float64)
)
def test_reference_passes_gradgradcheck(spec: OpSpec, case: Case):
    kwargs = differentiable(spec, to_double(case.kwargs))
    names = leaves_of(spec, kwargs)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        arguments = {**kwargs, **dict(zip(names, values, strict=True))}
        return tuple(tensors(spec.public(**arguments, backend="reference")))

    assert torch.autograd.gradgradcheck(function, [kwargs[k] for k in names], fast_mode=True)


@pytest.mark.parametrize("watched", [False, True], ids=["direct", "operator"])
@pytest.mark.parametrize(("spec", "case"), cases(DIFFERENTIABLE, torch.float32))
def test_second_derivatives_of_kernels_are_the_references(spec: OpSpec, case: Case, watched: bool):
    if unavailable(spec.name, "cpu", "cpu", torch.float32):
        pytest.skip("no C++ kernels here")
    profiler = torch.autograd.profiler.profile() if watched else contextlib.nullcontext()
    with profiler:
        results = second(spec, "cpu", differentiable(spec, case.kwargs))
    exact = second(spec, "reference", differentiable(spec, to_double(cloned(case.kwargs))))
    yardstick = second(spec, "reference", differentiable(spec, case.kwargs))
    for result, target, measure in zip(results, exact, yardstick, strict=True):
        # Terms of a second derivative cancel: float32's own error is a few roundings of the largest term.
        assert_close(result, target, measure, torch.float32, roundings=spec.roundings)

"""Random calls of every op: shapes, layouts, dtypes, steps and magnitudes, against the reference in float64.

A new op needs no line here, but `property_inputs(draw, device, dtype)` in its `cases.py`: one call, made
with `iddpm_ext.ops.random_calls`. IDDPM_SOAK=1 runs many more examples, other ones each time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from test_ops import (
    ERROR_RATIO,
    KERNELS,
    ROUNDINGS,
    cloned,
    convert,
    differentiable,
    error,
    gradients,
    run,
    tensors,
    to_double,
)
from torch import Tensor

from iddpm_ext.ops.spec import REGISTRY, OpSpec, unavailable

SOAK = bool(os.environ.get("IDDPM_SOAK"))
# Of each op, over all of its backends and dtypes.
EXAMPLES = 500 if SOAK else 24
# A result may differ by as much as the exact one does when every input is wrong by this many halves of a
# last place. Without it the rule of test_ops.py would ask for luck: with few elements PyTorch's own
# error is sometimes 0, and clamps and differences of large numbers magnify the first rounding of all.
INPUT_ROUNDINGS = 8.0

profile = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=not SOAK,
    print_blob=True,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
    ],
)


class Hypothesis:
    """`random_calls.Draw` by hypothesis."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def integer(self, low: int, high: int) -> int:
        return self._data.draw(st.integers(low, high))

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.integer(0, len(options) - 1)]


def kernels(spec: OpSpec) -> Iterator[tuple[str, torch.dtype]]:
    """(backend, dtype) of every kernel that runs here on CPU tensors."""
    for backend in KERNELS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if unavailable(spec.name, backend, "cpu", dtype) is None:
                yield backend, dtype


def nudged(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every image of a call in float64, wrong by half of a float32's last place, up and down in turn."""

    def nudge(x: Tensor) -> Tensor:
        if not x.is_floating_point() or x.numel() < 2:
            return x
        signs = 1 - 2 * (torch.arange(x.numel()) % 2)
        return x * (1 + 2.0**-24 * signs.view(x.shape))

    change = {name: value for name, value in kwargs.items() if name != "table"}
    return {**kwargs, **convert(change, nudge)}


def assert_as_good_as_pytorch(
    result: Tensor, exact: Tensor, yardstick: Tensor, moved: Tensor, roundings: float
) -> None:
    """Right where PyTorch is finite at the same dtype; never finite where the exact result is NaN."""
    assert result.shape == exact.shape
    if not exact.is_floating_point():
        assert torch.equal(result, exact)
        return
    assert bool((result.isnan() | ~exact.isnan()).all()), "a NaN was lost"
    judged = exact.isfinite() & yardstick.isfinite()
    overflown = exact.isinf() & yardstick.isinf()
    assert bool((~result.isfinite() | ~overflown).all()), "an infinity was lost"
    result, exact, yardstick, moved = (x[judged] for x in (result, exact, yardstick, moved))
    assert bool(result.isfinite().all()), "a finite result became infinite or NaN"
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    moved = torch.where(moved.isfinite(), moved, exact)
    allowed = max(
        ERROR_RATIO * error(yardstick, exact),
        (roundings if result.dtype == torch.float32 else ROUNDINGS)
        * torch.finfo(result.dtype).eps
        * scale,
        INPUT_ROUNDINGS * error(moved, exact),
    )
    assert error(result, exact) <= allowed


@pytest.mark.parametrize("spec", REGISTRY.values(), ids=REGISTRY)
def test_random_calls_are_as_good_as_pytorchs(spec: OpSpec):
    able = list(kernels(spec))
    if not able:
        pytest.skip("no kernels here")

    @profile
    @given(st.data())
    def check(data: st.DataObject) -> None:
        draw = Hypothesis(data)
        backend, dtype = draw.choice(able)
        call = spec.property_inputs(draw, "cpu", dtype)
        exact = run(spec, "reference", to_double(cloned(call)))
        yardstick = run(spec, "reference", cloned(call))
        moved = run(spec, "reference", nudged(to_double(cloned(call))))
        results = run(spec, backend, cloned(call))
        for each in zip(results, exact, yardstick, moved, strict=True):
            assert each[0].dtype == each[2].dtype
            assert_as_good_as_pytorch(*each, spec.roundings)

    check()


@pytest.mark.parametrize(
    "spec", [s for s in REGISTRY.values() if s.differentiable], ids=lambda s: s.name
)
def test_gradients_of_random_calls_are_as_good_as_pytorchs(spec: OpSpec):
    able = list(kernels(spec))
    if not able:
        pytest.skip("no kernels here")

    @profile
    @given(st.data())
    def check(data: st.DataObject) -> None:
        draw = Hypothesis(data)
        backend, dtype = draw.choice(able)
        call = spec.property_inputs(draw, "cpu", dtype)
        # Autograd makes NaN of an infinity in a branch that torch.where did not take.
        assume(all(bool(x.isfinite().all()) for x in tensors(list(call.values()))))
        double = to_double(cloned(call))
        exact = gradients(spec, "reference", differentiable(spec, double))
        yardstick = gradients(spec, "reference", differentiable(spec, call))
        moved = gradients(spec, "reference", differentiable(spec, nudged(double)))
        results = gradients(spec, backend, differentiable(spec, call))
        for each in zip(results, exact, yardstick, moved, strict=True):
            assert each[0].dtype == each[2].dtype
            assert_as_good_as_pytorch(*each, spec.roundings)

    check()

"""Random calls of every op: shapes, layouts, dtypes, steps and magnitudes, against the reference in float64.

A new op needs no line here, but `property_inputs(draw, device, dtype)` in its `cases.py`: one call, made
with `iddpm_ext.ops.random_calls`. IDDPM_SOAK=1 runs many more examples, other ones each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from op_accuracy import assert_call_is_as_good_as_pytorchs, gradients_of
from op_calls import (
    FLOATS,
    KERNELS,
    cloned,
    floating_arguments,
    in_dtypes,
    run,
    tensors,
)
from torch import Tensor

from iddpm_ext.ops import synthetic
from iddpm_ext.ops.spec import REGISTRY, OpSpec, unavailable

SOAK = bool(os.environ.get("IDDPM_SOAK"))
# Of each op, over all of its backends and dtypes.
EXAMPLES = 500 if SOAK else 24
# An op's five hundred examples take minutes, on a busy machine many.
pytestmark = [pytest.mark.timeout(3600)] if SOAK else []

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


def mixed(draw: Hypothesis, call: dict[str, Any]) -> dict[str, Any]:
    """The call, every second time with one of its floating arguments in another dtype."""
    names = floating_arguments(call)
    if not names or draw.choice((True, False)):
        return call
    return in_dtypes(call, {draw.choice(names): draw.choice(FLOATS)})


def is_taken(spec: OpSpec, backend: str, call: dict[str, Any]) -> bool:
    """Whether the backend takes these dtypes; if not, its error says so."""
    try:
        run(spec, backend, cloned(call))
    except (TypeError, RuntimeError) as refusal:
        assert str(refusal).startswith(f"{spec.name}: ")
        return False
    return True


def check_random_calls(spec: OpSpec, compute: Callable[..., list[Tensor]]) -> None:
    able = list(kernels(spec))
    if not able:
        pytest.skip("no kernels here")

    @profile
    @given(st.data())
    def check(data: st.DataObject) -> None:
        draw = Hypothesis(data)
        backend, dtype = draw.choice(able)
        call = mixed(draw, spec.property_inputs(draw, "cpu", dtype))
        assume(is_taken(spec, backend, call))
        if compute is gradients_of:
            # Autograd makes NaN of an infinity in a branch that torch.where did not take.
            assume(all(bool(x.isfinite().all()) for x in tensors(list(call.values()))))
        assert_call_is_as_good_as_pytorchs(spec, backend, call, compute)

    check()


@pytest.mark.parametrize("spec", REGISTRY.values(), ids=REGISTRY)
def test_random_calls_are_as_good_as_pytorchs(spec: OpSpec):
    check_random_calls(spec, run)


@pytest.mark.parametrize(
    "spec", [s for s in REGISTRY.values() if s.differentiable], ids=lambda s: s.name
)
def test_gradients_of_random_calls_are_as_good_as_pytorchs(spec: OpSpec):
    check_random_calls(spec, gradients_of)


def found(dtype: torch.dtype) -> dict[str, tuple[str, dict[str, Any], Callable[..., list[Tensor]]]]:
    """What random calls once failed on: (op, call, what of it)."""
    draw = synthetic.Tensors(0, "cpu", dtype)

    def normalised(shape: tuple[int, ...], mean: float, deviation: float, **more: Any) -> Any:
        channels = {name: draw.normal(shape[1:2]) for name in ("weight", "bias")}
        return {"x": draw.normal(shape, mean, deviation), "num_groups": 1, **channels, **more}

    residual = draw.normal((1, 2, 3, 4), 0.0, 1e-3)
    few = synthetic.bound_call((1, 1, 1, 4), "cpu", dtype)
    few |= {"noise": few["x_0"], "t": torch.tensor([synthetic.NUM_TIMESTEPS - 1])}
    return {
        # Both gradients are 0 in theory, a difference of equals in any arithmetic.
        "a group of one element": ("group_norm_silu", normalised((1, 1, 1, 1), 0, 1), gradients_of),
        "the bias of a group": (
            "group_norm_silu",
            normalised((2, 1, 8, 6), -1000, 1, channel_bias=draw.normal((1,))),
            gradients_of,
        ),
        # In bfloat16 the sum is x again, unless it is cut off instead of rounded.
        "a sum that rounds up": (
            "group_norm_silu",
            normalised((1, 2, 3, 4), -1000, 0.5, residual=residual),
            run,
        ),
        # The predicted x_0 is a difference of numbers a thousand times as large.
        "few elements at the last step": ("hybrid_loss", few, run),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("label", found(torch.float32))
def test_calls_that_once_failed_are_as_good_as_pytorchs(label: str, dtype: torch.dtype):
    op, call, compute = found(dtype)[label]
    able = [backend for backend, takes in kernels(REGISTRY[op]) if takes == dtype]
    for backend in able:
        assert_call_is_as_good_as_pytorchs(REGISTRY[op], backend, call, compute)

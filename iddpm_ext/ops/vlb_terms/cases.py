"""Calls of `vlb_terms` for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from iddpm_ext.ops import random_calls, synthetic
from iddpm_ext.ops.spec import BadCase, Case

_call = synthetic.bound_call


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[Case]:
    shape = (4, 3, 8, 6)
    yield Case("learned variance", _call(shape, device, dtype))
    yield Case("fixed variance", _call(shape, device, dtype, learned=False))
    yield Case("unclipped", {**_call(shape, device, dtype), "clip": False})
    yield Case("a poor model", {**_call(shape, device, dtype, spread=3.0), "clip": False})
    last = {**synthetic.bound_call((3, 3, 8, 6), device, dtype, last=True), "clip": False}
    yield Case("last step", last)
    # Too large a case for numerical differentiation, which fails at the clamp's corners.
    yield Case("last step, clipped", synthetic.bound_call((3, 3, 24, 16), device, dtype, last=True))
    wide = {**last, "model_output": last["model_output"].clone()}
    wide["model_output"][:, 3:] += 45  # a bin is a thousandth of the standard deviation
    yield Case("last step, a wide variance", wide)
    yield Case("last step, exact", {**last, "exact": True})
    yield Case("odd sizes", _call((2, 1, 7, 5), device, dtype))
    yield Case("one element", _call((1, 1, 1, 1), device, dtype))
    yield Case("empty batch", _call((0, 3, 8, 8), device, dtype))
    yield Case("several tiles", _call((2, 1, 70, 70), device, dtype))
    for label, layout in synthetic.LAYOUTS.items():
        call = _call(shape, device, dtype)
        yield Case(label, {**call, **{k: layout(call[k]) for k in ("model_output", "x_0", "x_t")}})


def bad_inputs(device: str) -> Iterator[BadCase]:
    good = _call((2, 3, 8, 8), device, torch.float32)

    def bad(label: str, error: type[Exception], match: str, **change: Any) -> BadCase:
        return BadCase(label, {**good, **change}, error, match)

    yield from synthetic.bad_bound_calls(bad, good)


def property_inputs(draw: random_calls.Draw, device: str, dtype: torch.dtype) -> dict[str, Any]:
    flags = {name: draw.choice((False, True)) for name in ("clip", "exact")}
    return {**random_calls.bound_call(draw, device, dtype), **flags}


def benchmark_inputs(device: str) -> Iterator[Case]:
    for label, size in (("CIFAR-10", 32), ("ImageNet-64", 64)):
        for n in (16, 128):
            yield Case(f"{label} N={n}", _call((n, 3, size, size), device, torch.float32))


def minimum_bytes(kwargs: dict[str, Any]) -> int:
    """Forward and gradient: the output is read and its gradient written."""
    return 2 * kwargs["model_output"].nbytes + kwargs["x_0"].nbytes + kwargs["x_t"].nbytes

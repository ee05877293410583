"""Calls of `hybrid_loss` for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from iddpm_ext.ops import random_calls, synthetic
from iddpm_ext.ops.spec import BadCase, Case
from iddpm_ext.random import NoiseKey


def _call(
    shape: tuple[int, int, int, int], device: str, dtype: torch.dtype, **change: Any
) -> dict[str, Any]:
    noise = synthetic.Tensors(2, device, torch.float32).normal(shape)
    return {**synthetic.bound_call(shape, device, dtype, **change), "noise": noise}


def _key(n: int, device: str) -> NoiseKey:
    return NoiseKey(2**63 + 5, 2, torch.arange(n, device=device, dtype=torch.int64) + 3, 9)


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[Case]:
    shape = (4, 3, 8, 6)
    call = _call(shape, device, dtype)
    targets = call["table"].clone()
    targets[:, 10:13] = torch.tensor([0.3, 0.5, 0.2], device=device, dtype=torch.float32)
    yield Case("noise given", call)
    yield Case("noise drawn", {**call, "noise": _key(4, device)})
    yield Case("another target", {**call, "table": targets})
    yield Case("last step", _call(shape, device, dtype, last=True))
    yield Case("a poor model", {**_call(shape, device, dtype, spread=3.0), "vlb_weight": 0.02})
    for label, size in (("odd sizes", (2, 1, 7, 5)), ("one element", (1, 1, 1, 1))):
        yield Case(label, _call(size, device, dtype))
        yield Case(
            f"{label}, drawn", {**_call(size, device, dtype), "noise": _key(size[0], device)}
        )
    yield Case("empty batch", _call((0, 3, 8, 8), device, dtype))
    yield Case("several tiles", _call((2, 1, 70, 70), device, dtype))
    for label, layout in synthetic.LAYOUTS.items():
        changed = {k: layout(call[k]) for k in ("model_output", "x_0", "x_t", "noise")}
        yield Case(label, {**call, **changed})


def bad_inputs(device: str) -> Iterator[BadCase]:
    good = _call((2, 3, 8, 8), device, torch.float32)

    def bad(label: str, error: type[Exception], match: str, **change: Any) -> BadCase:
        return BadCase(label, {**good, **change}, error, match)

    yield from synthetic.bad_bound_calls(bad, good)
    fixed = _call((2, 3, 8, 8), device, torch.float32, learned=False)
    yield BadCase("fixed variance", fixed, ValueError, "with a learned variance, got shape")
    noise = good["noise"]
    yield bad("noise shape", ValueError, "noise must be of the shape", noise=noise[..., :7])
    yield bad("noise missing", TypeError, "noise must be a tensor or a NoiseKey", noise=None)
    yield bad("noise samples", ValueError, "noise.samples must be", noise=_key(3, device))


def property_inputs(draw: random_calls.Draw, device: str, dtype: torch.dtype) -> dict[str, Any]:
    call = random_calls.bound_call(draw, device, dtype, learned=True)
    shape = call["x_t"].shape
    call["noise"] = random_calls.noise(draw, shape, device, torch.float32)
    return {**call, "vlb_weight": draw.choice((1e-3, 0.0, 1.0))}


def benchmark_inputs(device: str) -> Iterator[Case]:
    for label, size in (("CIFAR-10", 32), ("ImageNet-64", 64)):
        for n in (16, 128):
            call = _call((n, 3, size, size), device, torch.float32)
            yield Case(f"{label} N={n}, noise given", call)
            yield Case(f"{label} N={n}, noise drawn", {**call, "noise": _key(n, device)})


def minimum_bytes(kwargs: dict[str, Any]) -> int:
    """Forward and gradient: the output is read and its gradient written."""
    given = kwargs["noise"].nbytes if isinstance(kwargs["noise"], torch.Tensor) else 0
    return 2 * kwargs["model_output"].nbytes + kwargs["x_0"].nbytes + kwargs["x_t"].nbytes + given

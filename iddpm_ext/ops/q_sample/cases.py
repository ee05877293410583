"""Calls of `q_sample` for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from iddpm_ext.ops import random_calls, synthetic
from iddpm_ext.ops.spec import BadCase, Case
from iddpm_ext.random import NoiseKey


def _call(shape: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> dict[str, Any]:
    draw = synthetic.Tensors(0, device, dtype)
    return {
        "x_0": draw.normal(shape),
        "t": draw.timesteps(shape[0]),
        "table": synthetic.table(device),
        "noise": draw.normal(shape),
    }


def _key(n: int, device: str) -> NoiseKey:
    return NoiseKey(2**63 + 5, 2, torch.arange(n, device=device, dtype=torch.int64) + 3, 9)


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[Case]:
    shapes = {
        "noise given": (3, 3, 16, 12),
        "odd sizes": (2, 3, 7, 5),
        "one element": (1, 1, 1, 1),
        "empty batch": (0, 3, 8, 8),
        "several tiles": (2, 1, 70, 70),
    }
    for label, shape in shapes.items():
        call = _call(shape, device, dtype)
        yield Case(label, call)
        yield Case(f"{label}, drawn", {**call, "noise": _key(shape[0], device)})
    for label, layout in synthetic.LAYOUTS.items():
        call = _call((3, 3, 16, 12), device, dtype)
        yield Case(label, {**call, **{k: layout(call[k]) for k in ("x_0", "noise")}})
        yield Case(
            f"{label}, drawn", {**call, "x_0": layout(call["x_0"]), "noise": _key(3, device)}
        )


def bad_inputs(device: str) -> Iterator[BadCase]:
    good = _call((2, 3, 8, 8), device, torch.float32)
    t = good["t"]

    def bad(label: str, error: type[Exception], match: str, **change: Any) -> BadCase:
        return BadCase(label, {**good, **change}, error, match)

    yield bad("x_0 not a tensor", TypeError, "x_0 must be a tensor", x_0=None)
    yield bad("x_0 integer", TypeError, "x_0 must be float", x_0=good["x_0"].long())
    yield bad("x_0 rank", ValueError, r"x_0 must be \[N, C, H, W\]", x_0=good["x_0"][0])
    yield bad("t float", TypeError, "t must be int64", t=t.float())
    yield bad("t shape", ValueError, r"t must be \[N\] with N = 2", t=t[:1])
    for value in (-1, synthetic.NUM_TIMESTEPS, 2**40):
        outside = bad(f"t {value}", ValueError, f"t must lie in .* got {value} at", t=t * 0 + value)
        yield outside._replace(of_values=True)
    yield bad(
        "table shape",
        ValueError,
        r"table must be \[T, 16\]",
        table=torch.zeros(10, 4, dtype=torch.float32, device="cpu"),
    )
    yield bad(
        "noise shape",
        ValueError,
        "noise must be of the shape",
        noise=torch.zeros(2, 3, 8, 7, dtype=torch.float32, device="cpu"),
    )
    yield bad("noise missing", TypeError, "noise must be a tensor or a NoiseKey", noise=None)
    yield bad("noise samples", ValueError, "noise.samples must be", noise=_key(3, device))
    yield bad("backend", ValueError, "backend must be one of", backend="opencl")


def property_inputs(draw: random_calls.Draw, device: str, dtype: torch.dtype) -> dict[str, Any]:
    shape = random_calls.image_shape(draw)
    return {
        "x_0": random_calls.images(draw, shape, device, dtype),
        "t": random_calls.timesteps(draw, shape[0], device),
        "table": synthetic.table(device),
        "noise": random_calls.noise(draw, shape, device, dtype),
    }


def benchmark_inputs(device: str) -> Iterator[Case]:
    for label, size in (("CIFAR-10", 32), ("ImageNet-64", 64)):
        for n in (1, 16, 128):
            call = _call((n, 3, size, size), device, torch.float32)
            yield Case(f"{label} N={n}, noise given", call)
            yield Case(f"{label} N={n}, noise drawn", {**call, "noise": _key(n, device)})


def minimum_bytes(kwargs: dict[str, Any]) -> int:
    given = kwargs["noise"].nbytes if isinstance(kwargs["noise"], torch.Tensor) else 0
    return 2 * kwargs["x_0"].nbytes + given

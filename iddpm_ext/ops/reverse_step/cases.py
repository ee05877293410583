"""Calls of `reverse_step` for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from iddpm_ext.ops import random_calls, synthetic
from iddpm_ext.ops.spec import BadCase, Case
from iddpm_ext.random import NoiseKey


def _call(
    shape: tuple[int, int, int, int],
    device: str,
    dtype: torch.dtype,
    *,
    learned: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    n, c, h, w = shape
    draw = synthetic.Tensors(seed, device, dtype)
    return {
        "x_t": draw.normal(shape),
        "model_output": draw.normal((n, 2 * c if learned else c, h, w)),
        "t": draw.timesteps(n),
        "table": synthetic.table(device, learned=learned),
        "noise": draw.normal(shape),
    }


def _key(n: int, device: str, seed: int = 12345678901234567890, draw: int = 0) -> NoiseKey:
    samples = torch.arange(n, device=device, dtype=torch.int64) + 7
    return NoiseKey(seed, 1, samples, torch.arange(n, device=device, dtype=torch.int64) * 400, draw)


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[Case]:
    shape = (3, 3, 16, 12)
    yield Case("learned variance", _call(shape, device, dtype))
    yield Case("fixed variance", _call(shape, device, dtype, learned=False))
    yield Case("unclipped", {**_call(shape, device, dtype), "clip": False})
    yield Case("without noise", {**_call(shape, device, dtype), "noise": None})
    yield Case("drawn noise", {**_call(shape, device, dtype), "noise": _key(3, device)})
    yield Case("drawn again", {**_call(shape, device, dtype), "noise": _key(3, device, 5, 2)})
    for label, odd in (("odd sizes", (2, 3, 7, 5)), ("one element", (1, 1, 1, 1))):
        yield Case(label, {**_call(odd, device, dtype), "noise": _key(odd[0], device)})
    yield Case("empty batch", _call((0, 3, 8, 8), device, dtype))
    yield Case("several tiles", _call((2, 1, 70, 70), device, dtype))
    bounds = _call((2, 3, 8, 8), device, dtype)
    bounds["t"] = torch.tensor([0, synthetic.NUM_TIMESTEPS - 1], device=device, dtype=torch.int64)
    yield Case("first and last step", bounds)
    ddim = _call(shape, device, dtype)
    yield Case("ddim", {**ddim, "table": synthetic.table(device, sampler="ddim", eta=0.5)})
    yield Case("ddim, no noise", {**ddim, "table": synthetic.table(device, sampler="ddim")})
    for half in (torch.bfloat16, torch.float16):
        call = _call(shape, device, dtype)
        yield Case(f"output {half}", {**call, "model_output": call["model_output"].to(half)})
    for label, layout in synthetic.LAYOUTS.items():
        call = _call(shape, device, dtype)
        strided = {k: layout(call[k]) for k in ("x_t", "model_output", "noise")}
        yield Case(label, {**call, **strided})
        yield Case(f"{label}, drawn noise", {**call, **strided, "noise": _key(3, device)})


def bad_inputs(device: str) -> Iterator[BadCase]:
    good = _call((2, 3, 8, 8), device, torch.float32)
    t = good["t"]

    def bad(label: str, error: type[Exception], match: str, **change: Any) -> BadCase:
        return BadCase(label, {**good, **change}, error, match)

    yield bad("x_t not a tensor", TypeError, "x_t must be a tensor", x_t=[1.0])
    yield bad("x_t integer", TypeError, "x_t must be float", x_t=good["x_t"].long())
    yield bad("x_t rank", ValueError, r"x_t must be \[N, C, H, W\]", x_t=good["x_t"][0])
    yield bad(
        "output rank",
        ValueError,
        "model_output must be",
        model_output=torch.zeros(2, 6, dtype=torch.float32, device="cpu"),
    )
    channels = good["model_output"][:, :5]
    yield bad("output channels", ValueError, r"2C, H, W\] for x_t", model_output=channels)
    no_variance = good["model_output"][:, :3]
    headless = bad("no variance head", ValueError, "must have 2C = 6", model_output=no_variance)
    yield headless._replace(of_values=True)
    yield bad("output integer", TypeError, "model_output must be", model_output=channels.long())
    yield bad("t a list", TypeError, "t must be an int64 tensor", t=[0, 1])
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
        "table integer",
        TypeError,
        "table must be",
        table=torch.zeros(10, 16, dtype=torch.float32, device="cpu").long(),
    )
    yield bad(
        "noise shape",
        ValueError,
        "noise must be of the shape",
        noise=torch.zeros(2, 3, 8, 7, dtype=torch.float32, device="cpu"),
    )
    yield bad("noise type", TypeError, "noise must be a tensor, a NoiseKey", noise="white")
    yield bad("noise samples", ValueError, "noise.samples must be", noise=_key(3, device))
    yield bad("backend", ValueError, "backend must be one of", backend="opencl")


def property_inputs(draw: random_calls.Draw, device: str, dtype: torch.dtype) -> dict[str, Any]:
    shape = n, c, h, w = random_calls.image_shape(draw)
    learned = draw.choice((True, False))
    sampler, eta = draw.choice((("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)))
    channels = 2 * c if learned or draw.choice((True, False)) else c
    output_dtype = draw.choice((torch.float32, torch.bfloat16, torch.float16))
    return {
        "x_t": random_calls.images(draw, shape, device, dtype),
        "model_output": random_calls.images(draw, (n, channels, h, w), device, output_dtype),
        "t": random_calls.timesteps(draw, n, device),
        "table": synthetic.table(device, learned=learned, sampler=sampler, eta=eta),
        "noise": random_calls.noise(draw, shape, device, dtype),
        "clip": draw.choice((True, False)),
    }


def benchmark_inputs(device: str) -> Iterator[Case]:
    for label, size in (("CIFAR-10", 32), ("ImageNet-64", 64)):
        for n in (1, 16, 128):
            call = _call((n, 3, size, size), device, torch.float32)
            yield Case(f"{label} N={n}, noise given", call)
            yield Case(f"{label} N={n}, noise drawn", {**call, "noise": _key(n, device)})


def minimum_bytes(kwargs: dict[str, Any]) -> int:
    read = [kwargs["x_t"], kwargs["model_output"]]
    if isinstance(kwargs["noise"], torch.Tensor):
        read.append(kwargs["noise"])
    return sum(x.nbytes for x in read) + 2 * kwargs["x_t"].nbytes

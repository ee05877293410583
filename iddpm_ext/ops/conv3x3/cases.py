"""Calls of `conv3x3` for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from iddpm_ext.ops import random_calls, synthetic
from iddpm_ext.ops.spec import BadCase, Case

Shape = tuple[int, int, int, int]


def _call(
    shape: Shape,
    columns: int,
    device: str,
    dtype: torch.dtype,
    *,
    side: int = 3,
    channels_last: bool = True,
    mean: float = 0.0,
    **options: Any,
) -> dict[str, Any]:
    draw = synthetic.Tensors(0, device, dtype)
    c = shape[1]
    x = draw.normal(shape, mean)
    return {
        "x": x.contiguous(memory_format=torch.channels_last) if channels_last else x,
        "weight": draw.normal((columns, c, side, side), 0.0, (side**2 * max(c, 1)) ** -0.5),
        "bias": draw.normal((columns,)),
        **options,
    }


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[Case]:
    def call(shape: Shape, columns: int, **more: Any) -> dict[str, Any]:
        return _call(shape, columns, device, dtype, **more)

    yield Case("odd sizes", call((2, 16, 7, 5), 16))
    yield Case("without bias", {**call((2, 16, 6, 6), 32), "bias": None})
    yield Case("contiguous", call((2, 32, 9, 8), 16, channels_last=False))
    yield Case("exact", call((2, 32, 9, 8), 48, exact=True))
    yield Case("small image", call((3, 32, 4, 4), 32))
    yield Case("one row", call((2, 16, 1, 6), 16))
    yield Case("one pixel wide", call((2, 16, 6, 1), 16))
    yield Case("doubled", call((2, 16, 7, 5), 32, upscale=True))
    yield Case("doubled, exact", call((2, 32, 4, 3), 16, upscale=True, exact=True))
    yield Case("doubled small image", call((2, 16, 2, 2), 16, upscale=True, channels_last=False))
    yield Case("ragged input channels", call((2, 3, 8, 6), 32, channels_last=False))
    yield Case("ragged output channels", call((2, 32, 8, 6), 6))
    yield Case("ragged and doubled", call((2, 5, 4, 3), 7, upscale=True))
    yield Case("far from zero", call((2, 32, 9, 7), 16, mean=30.0))
    yield Case("several blocks", call((6, 64, 28, 28), 32))
    yield Case("several panels", call((2, 48, 14, 14), 112))
    yield Case("one tap", call((2, 32, 8, 6), 48, side=1))
    yield Case("one tap, contiguous", call((3, 16, 5, 7), 32, side=1, channels_last=False))
    yield Case("one tap, doubled", call((2, 16, 3, 5), 16, side=1, upscale=True))
    yield Case("empty batch", call((0, 16, 6, 6), 16))
    for label, layout in synthetic.LAYOUTS.items():
        kwargs = call((2, 32, 6, 5), 16, channels_last=False)
        yield Case(label, {**kwargs, "x": layout(kwargs["x"])})
    last = call((2, 32, 6, 5), 16)
    weight = last["weight"].contiguous(memory_format=torch.channels_last)
    yield Case("channels_last weight", {**last, "weight": weight})


def property_inputs(draw: random_calls.Draw, device: str, dtype: torch.dtype) -> dict[str, Any]:
    n, c, h, w = random_calls.image_shape(draw)
    columns, mean = draw.integer(1, 20), draw.choice((0.0, 1.0, -30.0))
    call = _call((n, c, h, w), columns, device, dtype, channels_last=False, mean=mean)
    # Finite numbers only: Winograd's transforms spread an infinity over a whole tile.
    call["x"] = random_calls.relayout(draw, call["x"])
    if draw.choice((False, True)):
        call["bias"] = None
    return {**call, **{name: draw.choice((False, True)) for name in ("upscale", "exact")}}


def bad_inputs(device: str) -> Iterator[BadCase]:
    good = _call((2, 16, 4, 4), 16, device, torch.float32)
    x, weight, bias = good["x"], good["weight"], good["bias"]

    def bad(label: str, error: type[Exception], match: str, **change: Any) -> BadCase:
        return BadCase(label, {**good, **change}, error, match)

    yield bad("x not a tensor", TypeError, "x must be a tensor", x=None)
    yield bad("x integer", TypeError, "x must be float", x=x.long())
    yield bad("x rank", ValueError, r"x must be \[N, C, H, W\]", x=x[0])
    yield bad("weight missing", TypeError, "weight must be a tensor", weight=None)
    yield bad("weight taps", ValueError, r"weight must be \[K, 16, 3, 3\]", weight=weight[..., :2])
    yield bad("weight channels", ValueError, r"weight must be \[K, 16", weight=weight[:, :8])
    yield bad("bias shape", ValueError, r"bias must be \[K\]", bias=bias[:3])
    yield bad("device", ValueError, "must be on", weight=torch.empty_like(weight, device="meta"))
    yield bad("backend", ValueError, "backend must be one of", backend="opencl")


def benchmark_inputs(device: str) -> Iterator[Case]:
    networks = {
        "small": (16, ((32, 32, 32), (96, 32, 32), (64, 64, 16), (128, 64, 16), (64, 64, 8))),
        "CIFAR-10": (4, ((128, 128, 32), (256, 256, 16), (512, 256, 16), (256, 256, 8))),
    }
    for network, (n, maps) in networks.items():
        for channels, columns, size in maps:
            call = _call((n, channels, size, size), columns, device, torch.float32)
            yield Case(f"{network} {n}x{channels}x{size}x{size} to {columns}", call)


def minimum_bytes(kwargs: dict[str, Any]) -> int:
    """Images and weights in, images out, each once."""
    x, weight = kwargs["x"], kwargs["weight"]
    scale = 4 if kwargs.get("upscale") else 1
    written = x.element_size() * scale * x.shape[0] * weight.shape[0] * x.shape[2] * x.shape[3]
    return x.nbytes + weight.nbytes + written

"""Calls of `qkv_attention` for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from iddpm_ext.ops import random_calls, synthetic
from iddpm_ext.ops.spec import BadCase, Case


def _call(
    n: int, heads: int, width: int, positions: tuple[int, ...], device: str, dtype: torch.dtype,
    *, std: float = 1.0, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    draw = synthetic.Tensors(0, device, dtype)
    qkv = draw.normal((n, 3 * heads * width, *positions), 0.0, std)
    return {"qkv": qkv, "num_heads": heads, **more}


def _by_token(call: dict[str, Any]) -> dict[str, Any]:
    """The same values in channels_last."""
    qkv: Tensor = call["qkv"]
    rows = qkv.flatten(2).transpose(1, 2).contiguous().transpose(1, 2)
    return {**call, "qkv": rows.view(qkv.shape)}


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[Case]:
    def call(n: int, heads: int, width: int, *positions: int, **more: Any) -> dict[str, Any]:
        return _call(n, heads, width, positions, device, dtype, **more)

    sizes = {
        "small": (2, 4, 16, 16),
        "odd": (2, 3, 5, 7),
        "one head of one channel": (1, 1, 1, 9),
        "one position": (3, 2, 8, 1),
        "20 * 32 channels": (1, 5, 128, 36),
        "between panels": (1, 2, 24, 49),
        "a position beyond a block": (1, 2, 17, 65),
        "several blocks": (2, 1, 16, 200),
        "wide head": (1, 1, 160, 20),
        "empty batch": (0, 2, 8, 16),
        "no positions": (2, 2, 8, 0),
    }
    for label, (n, heads, width, tokens) in sizes.items():
        base = call(n, heads, width, tokens)
        yield Case(label, base)
        yield Case(f"{label}, channels side by side", _by_token(base))
    yield Case("new order", call(2, 3, 8, 10, order="new"))
    yield Case("new order, channels side by side", _by_token(call(2, 3, 8, 10, order="new")))
    yield Case("large scores", call(2, 2, 16, 33, std=20.0))
    below = call(1, 2, 8, 21)
    parts = below["qkv"].view(1, 2, 3, 8, 21)
    parts[:, :, 0] += 12
    parts[:, :, 1] -= 12
    yield Case("scores far below zero", below)
    yield Case("equal scores", call(1, 2, 8, 11, std=0.0))
    for label, layout in synthetic.LAYOUTS.items():
        images = call(2, 2, 20, 6, 5)
        yield Case(label, {**images, "qkv": layout(images["qkv"])})


def bad_inputs(device: str) -> Iterator[BadCase]:
    good = _call(2, 2, 4, (5,), device, torch.float32)
    qkv = good["qkv"]

    def bad(label: str, error: type[Exception], match: str, **change: Any) -> BadCase:
        return BadCase(label, {**good, **change}, error, match)

    yield bad("qkv not a tensor", TypeError, "qkv must be a tensor", qkv=None)
    yield bad("qkv integer", TypeError, "qkv must be float", qkv=qkv.long())
    yield bad("qkv rank 2", ValueError, r"qkv must be \[N, 3C, T\]", qkv=qkv[0])
    yield bad("qkv rank 5", ValueError, r"qkv must be \[N, 3C, T\]", qkv=qkv[..., None, None])
    yield bad("channels", ValueError, "qkv must have 3C channels, got 23", qkv=qkv[:, :23])
    yield bad("no channels", ValueError, "qkv must have 3C channels, got 0", qkv=qkv[:, :0])
    for heads in (0, -2, 3):
        yield bad(f"heads {heads}", ValueError, "num_heads must divide the 8", num_heads=heads)
    for value in (2.0, True, None):
        yield bad(f"heads {value}", TypeError, "num_heads must be an integer", num_heads=value)
    yield bad("order", ValueError, "order must be one of legacy, new, got", order="qkv")
    yield bad("backend", ValueError, "backend must be one of", backend="opencl")


def property_inputs(draw: random_calls.Draw, device: str, dtype: torch.dtype) -> dict[str, Any]:
    n, width, height, columns = random_calls.image_shape(draw)
    heads, order = draw.integer(1, 3), draw.choice(("legacy", "new"))
    shape = (n, 3 * heads * width, height, columns)
    qkv = random_calls.images(
        draw, shape, device, dtype, means=(0.0, 3.0), deviations=(1.0, 1e-3, 20.0)
    )
    return {"qkv": qkv, "num_heads": heads, "order": order}


def benchmark_inputs(device: str) -> Iterator[Case]:
    networks = {
        "CIFAR-10": ((4, 64, 16), (4, 64, 8)),
        "small": ((4, 16, 16), (4, 16, 8)),
        "ImageNet-64": ((4, 96, 16), (4, 128, 8)),
    }
    for network, maps in networks.items():
        for heads, width, size in maps:
            for n in (1, 16):
                call = _call(n, heads, width, (size * size,), device, torch.float32)
                name = f"{network} batch {n}, {heads} heads of {width}, {size}x{size}"
                yield Case(name, call)
                yield Case(f"{name}, channels_last", _by_token(call))


def minimum_bytes(kwargs: dict[str, Any]) -> int:
    """qkv is read and a third of its size written; scores need no memory."""
    return kwargs["qkv"].nbytes // 3 * 4


def flops(kwargs: dict[str, Any]) -> int:
    """Those of the two matrix products; a multiply-add counts as two."""
    qkv: Tensor = kwargs["qkv"]
    n, channels, *positions = qkv.shape
    tokens = torch.Size(positions).numel()
    return 4 * n * (channels // 3) * tokens * tokens

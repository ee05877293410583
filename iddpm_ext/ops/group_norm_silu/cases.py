"""Calls of `group_norm_silu` for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm_ext.ops import random_calls, synthetic
from iddpm_ext.ops.group_norm_silu import reference
from iddpm_ext.ops.group_norm_silu.layout import like_images
from iddpm_ext.ops.spec import BadCase, Case

Shape = tuple[int, int, int, int]


def _call(
    shape: Shape,
    groups: int,
    device: str,
    dtype: torch.dtype,
    *,
    channels2: int = 0,
    mean: float = 0.0,
    modulated: bool = True,
) -> dict[str, Any]:
    draw = synthetic.Tensors(0, device, dtype)
    n, c1, h, w = shape
    c = c1 + channels2
    call: dict[str, Any] = {
        "x": draw.normal(shape, mean),
        "num_groups": groups,
        "weight": draw.normal((c,), 1.0, 0.3),
        "bias": draw.normal((c,)),
    }
    if modulated:
        call |= {"scale": draw.normal((n, c), 0.0, 0.5), "shift": draw.normal((n, c))}
    if channels2:
        call["x2"] = draw.normal((n, channels2, h, w), mean)
    return call


def _sums(call: dict[str, Any], device: str, per_sample: bool = False) -> dict[str, Any]:
    draw = synthetic.Tensors(1, device, call["x"].dtype)
    n, c1 = call["x"].shape[:2]
    return {
        "residual": draw.normal(call["x"].shape),
        "channel_bias": draw.normal((n, c1) if per_sample else (c1,)),
    }


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[Case]:
    def call(shape: Shape, groups: int, **more: Any) -> dict[str, Any]:
        return _call(shape, groups, device, dtype, **more)

    base = call((2, 24, 4, 5), 2)
    sums = _sums(base, device)
    yield Case("scale-shift", base)
    yield Case("plain", call((3, 8, 6, 4), 2, modulated=False))
    yield Case("without SiLU", {**call((2, 16, 3, 5), 2, modulated=False), "silu": False})
    yield Case("shift alone", {**base, "scale": None})
    yield Case("residual", {**base, "residual": sums["residual"]})
    yield Case("channel bias", {**base, "channel_bias": sums["channel_bias"]})
    per_sample = _sums(base, device, per_sample=True)["channel_bias"]
    yield Case("channel bias of each sample", {**base, "channel_bias": per_sample})
    yield Case("both, with their sum", {**base, **sums, "return_sum": True})
    yield Case("bias, with the sum", {**base, "channel_bias": per_sample, "return_sum": True})
    two = call((2, 20, 3, 4), 3, channels2=16)
    yield Case("two inputs", two)
    yield Case("two inputs and sums", {**two, **_sums(two, device), "return_sum": True})

    for width in (1, 4, 12, 20, 28):
        yield Case(f"groups of {width}", call((2, 2 * width, 5, 3), 2))
    yield Case("640 channels", call((1, 640, 3, 2), 32))
    yield Case("one group", call((2, 7, 3, 3), 1))
    yield Case("one pixel", call((3, 32, 1, 1), 2))
    yield Case("large image", call((1, 4, 70, 66), 2))
    yield Case("empty batch", call((0, 8, 4, 4), 2))
    yield Case("no pixels", call((2, 8, 0, 4), 2))
    yield Case("far from zero", call((2, 32, 9, 7), 2, mean=1000.0 if dtype.itemsize > 2 else 10.0))

    for label, layout in synthetic.LAYOUTS.items():
        images = call((2, 24, 6, 5), 2, channels2=8)
        images |= _sums(images, device)
        for name in ("x", "x2", "residual"):
            images[name] = layout(images[name])
        yield Case(label, {**images, "return_sum": True})
        yield Case(f"{label}, no sums", {**images, "residual": None})
    last = call((1, 64, 16, 17), 4)
    last["x"] = last["x"].contiguous(memory_format=torch.channels_last)
    yield Case("several slabs", last)


def bad_inputs(device: str) -> Iterator[BadCase]:
    good = _call((2, 8, 4, 4), 2, device, torch.float32)
    x, channels = good["x"], good["weight"]

    def bad(label: str, error: type[Exception], match: str, **change: Any) -> BadCase:
        return BadCase(label, {**good, **change}, error, match)

    yield bad("x not a tensor", TypeError, "x must be a tensor", x=None)
    yield bad("x integer", TypeError, "x must be float", x=x.long())
    yield bad("x rank", ValueError, r"x must be \[N, C, H, W\]", x=x[0])
    for groups in (0, -2, 3):
        yield bad(f"groups {groups}", ValueError, "num_groups must divide", num_groups=groups)
    yield bad("groups float", TypeError, "num_groups must be an integer", num_groups=2.0)
    for eps in (0.0, -1e-5, float("nan"), float("inf"), None):
        yield bad(f"eps {eps}", ValueError, "eps must be positive", eps=eps)
    for name in ("weight", "bias"):
        yield bad(f"{name} shape", ValueError, rf"{name} must be \[C\]", **{name: channels[:3]})
        yield bad(f"{name} missing", TypeError, f"{name} must be a tensor", **{name: None})
    for name in ("scale", "shift"):
        yield bad(f"{name} shape", ValueError, rf"{name} must be \[N, C\]", **{name: channels})
    yield bad("residual shape", ValueError, "residual must be of x's", residual=x[:, :4])
    yield bad("residual dtype", TypeError, "residual must have x's dtype", residual=x.half())
    yield bad("x2 shape", ValueError, "x2 must be like x", x2=x[:, :, :2])
    yield bad("bias shape", ValueError, "channel_bias must be", channel_bias=channels[:4])
    yield bad("sum of one", ValueError, "return_sum must be False", return_sum=True)
    yield bad("device", ValueError, "must be on", residual=torch.empty_like(x, device="meta"))
    yield bad("backend", ValueError, "backend must be one of", backend="opencl")


def property_inputs(draw: random_calls.Draw, device: str, dtype: torch.dtype) -> dict[str, Any]:
    n, c, h, w = random_calls.image_shape(draw)
    groups = draw.integer(1, 4)
    first, second = c * groups, groups * draw.integer(0, 2)
    maybe = (False, True)

    def images(channels: int) -> torch.Tensor:
        return random_calls.images(draw, (n, channels, h, w), device, dtype)

    def numbers(*shape: int) -> torch.Tensor:
        return random_calls.values(draw, shape, device, dtype, means=(0.0, 1.0), deviations=(1.0,))

    call: dict[str, Any] = {"x": images(first), "num_groups": groups, "silu": draw.choice(maybe)}
    call |= {"weight": numbers(first + second), "bias": numbers(first + second)}
    if second:
        call["x2"] = images(second)
    if draw.choice(maybe):
        call |= {"scale": numbers(n, first + second), "shift": numbers(n, first + second)}
    if draw.choice(maybe):
        call["residual"] = images(first)
    if draw.choice(maybe):
        call["channel_bias"] = numbers(first)
    if "residual" in call or "channel_bias" in call:
        call["return_sum"] = draw.choice(maybe)
    return call


def benchmark_inputs(device: str) -> Iterator[Case]:
    networks = {
        "CIFAR-10": ((128, 32), (256, 32), (256, 16), (512, 16), (256, 8), (256, 4)),
        "ImageNet-64": ((128, 64), (256, 32), (384, 16), (512, 8)),
    }
    for network, maps in networks.items():
        for channels, size in maps:
            for n in (1, 16):
                shape = (n, channels, size, size)
                for modulated in (False, True):
                    call = _call(shape, 32, device, torch.float32, modulated=modulated)
                    name = f"{network} {n}x{channels}x{size}x{size}"
                    yield Case(name + (", scale-shift" if modulated else ""), call)


def minimum_bytes(kwargs: dict[str, Any]) -> int:
    """The images, read and written once; everything else is small."""
    images = [kwargs["x"], kwargs.get("x2"), kwargs.get("residual")]
    read = sum(x.nbytes for x in images if x is not None)
    written = kwargs["x"].nbytes + (kwargs["x2"].nbytes if kwargs.get("x2") is not None else 0)
    if kwargs.get("residual") is not None or kwargs.get("return_sum"):
        written += kwargs["x"].nbytes
    return read + written


def in_pytorch(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    x2: Tensor | None = None,
    residual: Tensor | None = None,
    channel_bias: Tensor | None = None,
    return_sum: bool = False,
    backend: str = "auto",
) -> Any:
    # Like every fused kernel, and unlike autograd, PyTorch's computes the gradient with the rounded mean.
    written = return_sum or residual is not None
    h, total = reference.summed(x, x2, residual, channel_bias, written)
    z = reference.modulated(torch.group_norm(h, num_groups, eps=eps), weight, bias, scale, shift)
    y = like_images(x, F.silu(z) if silu else z)
    return (y, total) if return_sum else y

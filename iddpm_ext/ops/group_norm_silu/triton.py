"""The kernels in Triton: one program per group and sample, in tiles of channels x pixels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iddpm_ext.ops.arguments import Plane, plane
from iddpm_ext.ops.group_norm_silu.layout import empty_like_images, optional

#: Elements of a tile.
TILE = 1024


@triton.jit
def _read(x, x_c, x_p, x2, x2_c, x2_p, c, p, c1, inside, HAS_X2: tl.constexpr):
    # Channels c of x and x2 side by side, as float32.
    value = tl.load(x + c * x_c + p * x_p, mask=inside & (c < c1), other=0.0).to(tl.float32)
    if HAS_X2:
        second = x2 + (c - c1) * x2_c + p * x2_p
        value += tl.load(second, mask=inside & (c >= c1), other=0.0).to(tl.float32)
    return value


@triton.jit
def _modulation(
    weight, bias, scale, shift, sample, scale_n, shift_n, c, known,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    # (weight, factor, offset) of channels c: z = x_hat * weight * factor + offset.
    w = tl.load(weight + c, mask=known, other=0.0)
    b = tl.load(bias + c, mask=known, other=0.0)
    factor = tl.zeros_like(w) + 1.0
    if HAS_SCALE:
        factor += tl.load(scale + sample * scale_n + c, mask=known, other=0.0)
    offset = b * factor
    if HAS_SHIFT:
        offset += tl.load(shift + sample * shift_n + c, mask=known, other=0.0)
    return w, factor, offset


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _forward(
    x, x_n, x_c, x_p, x2, x2_n, x2_c, x2_p, r, r_n, r_c, r_p, s, s_n, s_c, s_p, y, y_n, y_c, y_p,
    channel_bias, channel_bias_n, weight, bias, scale, scale_n, shift, shift_n, mean_out, rstd_out,
    c1, hw, groups, width, eps,
    HAS_X2: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, SUM: tl.constexpr, SILU: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample = program // groups
    group = program - sample * groups
    local = tl.arange(0, CHANNELS)[:, None].to(tl.int64)
    c = group * width + local
    known = local < width
    x += sample * x_n
    x2 += sample * x2_n
    r += sample * r_n
    s += sample * s_n
    y += sample * y_n
    constant = tl.zeros([CHANNELS, 1], dtype=tl.float32)
    if HAS_BIAS:
        at = channel_bias + sample * channel_bias_n + c
        constant += tl.load(at, mask=known & (c < c1), other=0.0)
    count = (width * hw).to(tl.float32)

    total = tl.zeros([CHANNELS, PIXELS], dtype=tl.float32)
    for start in range(0, hw, PIXELS):
        p = start + tl.arange(0, PIXELS)[None, :].to(tl.int64)
        inside = known & (p < hw)
        h = _read(x, x_c, x_p, x2, x2_c, x2_p, c, p, c1, inside, HAS_X2)
        if HAS_RESIDUAL:
            h += tl.load(r + c * r_c + p * r_p, mask=inside & (c < c1), other=0.0).to(tl.float32)
        h += constant
        if SUM:
            # The rounded sum is normalised.
            rounded = h.to(s.dtype.element_ty)
            tl.store(s + c * s_c + p * s_p, rounded, mask=inside & (c < c1))
            h = tl.where(c < c1, rounded.to(tl.float32), h)
        total += tl.where(inside, h, 0.0)
    mean = tl.sum(tl.sum(total, axis=1), axis=0) / count

    if SUM:
        tl.debug_barrier()
        x = s
        x_c = s_c
        x_p = s_p
        constant = tl.zeros([CHANNELS, 1], dtype=tl.float32)
    centre = mean - constant
    rest = (centre - mean) + constant
    deviations = tl.zeros([CHANNELS, PIXELS], dtype=tl.float32)
    squares = tl.zeros([CHANNELS, PIXELS], dtype=tl.float32)
    for start in range(0, hw, PIXELS):
        p = start + tl.arange(0, PIXELS)[None, :].to(tl.int64)
        inside = known & (p < hw)
        h = _read(x, x_c, x_p, x2, x2_c, x2_p, c, p, c1, inside, HAS_X2)
        d = tl.where(inside, (h - centre) + rest, 0.0)
        deviations += d
        squares += d * d
    mean_rest = tl.sum(tl.sum(deviations, axis=1), axis=0) / count
    variance = tl.sum(tl.sum(squares, axis=1), axis=0) / count - mean_rest * mean_rest
    rstd = 1.0 / tl.sqrt(variance + eps)
    tl.store(mean_out + program, mean + mean_rest)
    tl.store(rstd_out + program, rstd)

    w, factor, offset = _modulation(
        weight, bias, scale, shift, sample, scale_n, shift_n, c, known, HAS_SCALE, HAS_SHIFT
    )
    gain = w * factor * rstd
    offset += gain * (rest - mean_rest)
    for start in range(0, hw, PIXELS):
        p = start + tl.arange(0, PIXELS)[None, :].to(tl.int64)
        inside = known & (p < hw)
        h = _read(x, x_c, x_p, x2, x2_c, x2_p, c, p, c1, inside, HAS_X2)
        z = (h - centre) * gain + offset
        if SILU:
            z = z * _sigmoid(z)
        tl.store(y + c * y_c + p * y_p, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy, dy_n, dy_c, dy_p, ds, ds_n, ds_c, ds_p, x, x_n, x_c, x_p, x2, x2_n, x2_c, x2_p,
    dx, dx_n, dx_c, dx_p, dx2, dx2_n, dx2_c, dx2_p,
    channel_bias, channel_bias_n, weight, bias, scale, scale_n, shift, shift_n, mean_in, rstd_in,
    sums, c1, hw, groups, width,
    HAS_X2: tl.constexpr, HAS_DSUM: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, SILU: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    # sums [N, 3, C]: sum of dz, of dz * x_hat, and of dx without dsum, over the pixels.
    program = tl.program_id(0).to(tl.int64)
    sample = program // groups
    group = program - sample * groups
    local = tl.arange(0, CHANNELS)[:, None].to(tl.int64)
    c = group * width + local
    known = local < width
    dy += sample * dy_n
    ds += sample * ds_n
    x += sample * x_n
    x2 += sample * x2_n
    dx += sample * dx_n
    dx2 += sample * dx2_n
    constant = tl.zeros([CHANNELS, 1], dtype=tl.float32)
    if HAS_BIAS:
        at = channel_bias + sample * channel_bias_n + c
        constant += tl.load(at, mask=known & (c < c1), other=0.0)
    mean = tl.load(mean_in + program)
    rstd = tl.load(rstd_in + program)
    centre = mean - constant
    rest = (centre - mean) + constant
    w, factor, offset = _modulation(
        weight, bias, scale, shift, sample, scale_n, shift_n, c, known, HAS_SCALE, HAS_SHIFT
    )

    sum1 = tl.zeros([CHANNELS, PIXELS], dtype=tl.float32)
    sum2 = tl.zeros([CHANNELS, PIXELS], dtype=tl.float32)
    for start in range(0, hw, PIXELS):
        p = start + tl.arange(0, PIXELS)[None, :].to(tl.int64)
        inside = known & (p < hw)
        h = _read(x, x_c, x_p, x2, x2_c, x2_p, c, p, c1, inside, HAS_X2)
        unit = ((h - centre) + rest) * rstd
        dz = tl.load(dy + c * dy_c + p * dy_p, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            z = unit * w * factor + offset
            sigmoid = _sigmoid(z)
            dz *= sigmoid + z * (sigmoid * (1.0 - sigmoid))
        sum1 += dz
        sum2 += dz * unit
    s1 = tl.sum(sum1, axis=1)[:, None]
    s2 = tl.sum(sum2, axis=1)[:, None]
    count = (width * hw).to(tl.float32)
    along_mean = tl.sum(tl.sum(w * factor * s1, axis=1), axis=0) / count
    along_x = tl.sum(tl.sum(w * factor * s2, axis=1), axis=0) / count

    sum3 = tl.zeros([CHANNELS, PIXELS], dtype=tl.float32)
    for start in range(0, hw, PIXELS):
        p = start + tl.arange(0, PIXELS)[None, :].to(tl.int64)
        inside = known & (p < hw)
        h = _read(x, x_c, x_p, x2, x2_c, x2_p, c, p, c1, inside, HAS_X2)
        unit = ((h - centre) + rest) * rstd
        dz = tl.load(dy + c * dy_c + p * dy_p, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            z = unit * w * factor + offset
            sigmoid = _sigmoid(z)
            dz *= sigmoid + z * (sigmoid * (1.0 - sigmoid))
        grad = rstd * (w * factor * dz - along_mean - unit * along_x)
        sum3 += tl.where(inside, grad, 0.0)
        first = inside & (c < c1)
        if HAS_DSUM:
            grad += tl.load(ds + c * ds_c + p * ds_p, mask=first, other=0.0).to(tl.float32)
        rounded = grad.to(dx.dtype.element_ty)
        tl.store(dx + c * dx_c + p * dx_p, rounded, mask=first)
        if HAS_X2:
            tl.store(dx2 + (c - c1) * dx2_c + p * dx2_p, rounded, mask=inside & (c >= c1))
    channels = groups * width
    at = sums + sample * 3 * channels + c
    tl.store(at, s1, mask=known)
    tl.store(at + channels, s2, mask=known)
    tl.store(at + 2 * channels, tl.sum(sum3, axis=1)[:, None], mask=known)


def _rows(value: Tensor | None, unused: Tensor) -> tuple[Tensor, int]:
    """float32 [C] or [N, C] with dense rows, and the row stride."""
    if value is None:
        return unused, 0
    value = value.float()
    if value.stride(-1) != 1:
        value = value.contiguous()
    return value, value.stride(0) if value.ndim == 2 else 0


def _images(x: Tensor | None, unused: Plane) -> tuple[Tensor, int, int, int]:
    found = plane(x) if x is not None else unused
    return (found.tensor, *found.view[1:])


def _tile(width: int, hw: int) -> dict[str, int]:
    channels = triton.next_power_of_2(width)
    return {
        "CHANNELS": channels,
        "PIXELS": max(1, min(TILE // channels, triton.next_power_of_2(hw))),
    }


def group_norm_silu(
    x: Tensor,
    x2: Tensor | None,
    residual: Tensor | None,
    channel_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    write_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the sum, mean and 1 / standard deviation of every group, as `reference.group_norm_silu`."""
    n, c1, h, w = x.shape
    c = c1 + (x2.shape[1] if x2 is not None else 0)
    y = empty_like_images(x, c)
    total = empty_like_images(x) if write_sum else optional(x)
    mean = torch.empty((n, num_groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if y.numel() == 0:
        return y, total.zero_(), mean.zero_(), rstd.zero_()
    first, width = plane(x), c // num_groups
    _forward[(n * num_groups,)](
        *_images(x, first), *_images(x2, first), *_images(residual, first),
        *_images(total if write_sum else None, first), *_images(y, first),
        *_rows(channel_bias, mean), _rows(weight, mean)[0], _rows(bias, mean)[0],
        *_rows(scale, mean), *_rows(shift, mean), mean, rstd,
        c1, h * w, num_groups, width, eps,
        HAS_X2=x2 is not None, HAS_RESIDUAL=residual is not None,
        HAS_BIAS=channel_bias is not None, HAS_SCALE=scale is not None,
        HAS_SHIFT=shift is not None, SUM=write_sum, SILU=silu, **_tile(width, h * w),
    )  # fmt: skip
    return y, total, mean, rstd


def group_norm_silu_bwd(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    x2: Tensor | None,
    channel_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    channel_bias_grad: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x, x2, weight, bias, scale, shift and channel_bias, as `reference.group_norm_silu_bwd`."""
    n, c1, h, w = x.shape
    c, num_groups = dy.shape[1], mean.shape[1]
    dx = empty_like_images(x)
    dx2 = empty_like_images(x, x2.shape[1]) if x2 is not None else optional(x)
    sums = torch.zeros((n, 3, c), dtype=torch.float32, device=x.device)
    if dy.numel():
        first, width = plane(x), c // num_groups
        _backward[(n * num_groups,)](
            *_images(dy, first), *_images(dsum, first), *_images(x, first), *_images(x2, first),
            *_images(dx, first), *_images(dx2 if x2 is not None else None, first),
            *_rows(channel_bias, mean), _rows(weight, mean)[0], _rows(bias, mean)[0],
            *_rows(scale, mean), *_rows(shift, mean), mean, rstd,
            sums, c1, h * w, num_groups, width,
            HAS_X2=x2 is not None, HAS_DSUM=dsum is not None, HAS_BIAS=channel_bias is not None,
            HAS_SCALE=scale is not None, HAS_SHIFT=shift is not None, SILU=silu,
            **_tile(width, h * w),
        )  # fmt: skip
    s1, s2, s3 = sums.unbind(1)
    factor = 1 + scale.float() if scale is not None else 1
    absent = sums.new_empty(0)
    return (
        dx,
        dx2,
        (factor * s2).sum(dim=0),
        (factor * s1).sum(dim=0),
        weight.float() * s2 + bias.float() * s1 if scale is not None else absent,
        s1.clone() if shift is not None else absent,
        s3[:, :c1].clone() if channel_bias_grad else absent,
    )


def aot_cases() -> list[tuple[object, dict[str, str], dict[str, object]]]:
    """(kernel, signature, constants) of the variants that people run, for ahead-of-time compilation."""
    images = {"x", "x2", "r", "s", "y", "dy", "ds", "dx", "dx2"}
    vectors = {
        "channel_bias", "weight", "bias", "scale", "shift",
        "mean_out", "rstd_out", "mean_in", "rstd_in", "sums",
    }  # fmt: skip
    found: list[tuple[object, dict[str, str], dict[str, object]]] = []
    for kernel in (_forward, _backward):
        signature = {
            name: "*bf16" if name in images else "*fp32" if name in vectors
            else "fp32" if name == "eps" else "constexpr" if name.isupper() else "i64"
            for name in kernel.arg_names
        }  # fmt: skip
        constants = {name: True for name in kernel.arg_names if name.isupper()}
        found.append((kernel, signature, {**constants, "CHANNELS": 8, "PIXELS": TILE // 8}))
    return found

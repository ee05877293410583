"""GroupNorm fused with the sums before it and with scale, shift and SiLU after it."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from iddpm_ext.ops import checks
from iddpm_ext.ops.group_norm_silu import compiled, reference
from iddpm_ext.ops.group_norm_silu.layout import empty_like_images, is_channels_last, optional
from iddpm_ext.ops.kernels import kernels
from iddpm_ext.ops.operators import define, differentiate, vector_jacobian
from iddpm_ext.ops.pixel_rows import channel_sums, rows_of
from iddpm_ext.ops.rows import compute_dtype
from iddpm_ext.ops.spec import FLOAT32_AND_HALVES, OpSpec, register, resolve_backend, unavailable
from iddpm_ext.scalars import plain

NAME = "group_norm_silu"


class GroupNormSilu(NamedTuple):
    """y and sum, [N, C, H, W] with dtype and memory format of x; `sum` has the channels of x alone."""

    y: Tensor
    sum: Tensor


@overload
def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = ...,
    scale: Tensor | None = ...,
    shift: Tensor | None = ...,
    silu: bool = ...,
    x2: Tensor | None = ...,
    residual: Tensor | None = ...,
    channel_bias: Tensor | None = ...,
    return_sum: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = ...,
    scale: Tensor | None = ...,
    shift: Tensor | None = ...,
    silu: bool = ...,
    x2: Tensor | None = ...,
    residual: Tensor | None = ...,
    channel_bias: Tensor | None = ...,
    return_sum: Literal[True],
    backend: str = ...,
) -> GroupNormSilu: ...


def group_norm_silu(
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
) -> Tensor | GroupNormSilu:
    """Normalises groups of channels, after optional sums and before optional scale-shift and SiLU.

        sum = x + residual + channel_bias
        h   = concat(sum, x2), along the channels
        z   = ((h - mean_g(h)) / sqrt(var_g(h) + eps) * weight + bias) * (1 + scale) + shift
        y   = z sigmoid(z) if `silu`, else z

    Wu & He, *Group Normalization*, equation (1); scale and shift are the time embedding's, section
    "Improvements to the architecture" of Improved DDPM. `channel_bias` takes the bias of the convolution
    before (or an embedding), `residual` and `x2` take the skip connections, so that neither sum nor
    concatenation costs a pass of its own. The variance is computed in float32 about the mean (never as
    E[h^2] - E[h]^2), in an order that depends on neither the batch nor the threads.

    Args:
        x: [N, C1, H, W], contiguous or channels_last, also with gaps; tensors of other strides are copied.
            float32, bfloat16 or float16; any floating dtype for the reference.
        num_groups: divides the channels of h.
        weight, bias: [C], C the channels of h, any floating dtype.
        eps: positive.
        scale, shift: [N, C], any floating dtype.
        silu: whether to apply SiLU.
        x2: [N, C - C1, H, W] of x's dtype: channels to concatenate after x's.
        residual: [N, C1, H, W] of x's dtype. The sum is then rounded to that dtype before it is normalised.
        channel_bias: [C1] or [N, C1], any floating dtype.
        return_sum: also return the sum; needs `residual` or `channel_bias`.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        y [N, C, H, W] with the dtype and the memory format of x, or with `return_sum` (y, sum [N, C1, H, W]).

    Raises:
        TypeError, ValueError: for an argument of a wrong type, shape, device or value.
        RuntimeError: if an explicit backend does not support the call.

    Differentiable in every tensor any number of times.
    """
    num_groups, eps = plain(num_groups), plain(eps)
    _check(x, num_groups, weight, bias, eps, scale, shift, x2, residual, channel_bias)
    if return_sum and residual is None and channel_bias is None:
        raise ValueError(f"{NAME}: return_sum must be False without residual and channel_bias")
    chosen = resolve_backend(NAME, backend, x.device, x.dtype)
    if backend == "auto" and chosen == "cuda":
        tensors = (x, x2, residual, channel_bias, weight, bias, scale, shift)
        differentiated = any(t is not None and t.requires_grad for t in tensors)
        channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
        chosen = _faster_on_gpu(x, channels, num_groups, differentiated)
    write_sum = return_sum or residual is not None
    arguments = (
        x, x2, residual, channel_bias, weight, bias, scale, shift,
        num_groups, float(eps), bool(silu), write_sum,
    )  # fmt: skip
    if chosen == "reference":
        y, total, _, _ = reference.group_norm_silu(*arguments)
    else:
        y, total, _, _ = _op(*arguments, chosen)
    return GroupNormSilu(y, total) if return_sum else y


#: Elements per group, and per batch, up to which Triton's forward pass is the faster in channels_last.
_SMALL_GROUP, _SMALL_BATCH = 2048, 1 << 18


def _faster_on_gpu(x: Tensor, channels: int, num_groups: int, differentiated: bool) -> str:
    """The kernel that "auto" takes on a GPU for x and x2, which have `channels` in all.

    Measured on an H200 (benchmarks/results/gpu_h200_group_norm_tiles.json). channels_last, bfloat16: the CUDA
    kernel's backward pass is 1.4 to 3.2 times as fast as Triton's, its forward pass up to 3.5 times; except
    for small calls, dominated by the launch: 3.8 us against 2.6 for one image of 256x8x8, 4.5 against 4.0 for
    256x16x16. NCHW, float32: Triton's forward pass takes 0.55 to 0.98 times as long as the CUDA kernel, which
    has one block per group; its backward pass up to twice as long.
    """
    if differentiated and torch.is_grad_enabled():
        return "cuda"
    pixels = x.shape[2] * x.shape[3]
    small = (
        channels // num_groups * pixels <= _SMALL_GROUP
        and x.shape[0] * channels * pixels <= _SMALL_BATCH
    )
    if is_channels_last(x) and not small:
        return "cuda"
    return "cuda" if unavailable(NAME, "triton", x.device.type, x.dtype) else "triton"


def _check(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    x2: Tensor | None,
    residual: Tensor | None,
    channel_bias: Tensor | None,
) -> None:
    checks.image_batch(NAME, "x", x)
    n, c1, h, w = x.shape
    c = c1
    if x2 is not None:
        checks.image_batch(NAME, "x2", x2)
        c = c1 + x2.shape[1]
        checks.shape(NAME, "x2", x2, (n, x2.shape[1], h, w), "like x but for the channels")
    if isinstance(num_groups, bool) or not isinstance(num_groups, int):
        raise TypeError(f"{NAME}: num_groups must be an integer, got {num_groups!r}")
    if num_groups < 1 or c % num_groups:
        raise ValueError(f"{NAME}: num_groups must divide the {c} channels, got {num_groups}")
    if not isinstance(eps, (int, float)) or not 0 < eps < math.inf:
        raise ValueError(f"{NAME}: eps must be positive and finite, got {eps!r}")
    for name, value in (("weight", weight), ("bias", bias)):
        checks.floating(NAME, name, value)
        checks.shape(NAME, name, value, (c,), "[C] =")
    for name, modulation in (("scale", scale), ("shift", shift)):
        if modulation is not None:
            checks.floating(NAME, name, modulation)
            checks.shape(NAME, name, modulation, (n, c), "[N, C] =")
    if residual is not None:
        checks.floating(NAME, "residual", residual)
        checks.shape(NAME, "residual", residual, (n, c1, h, w), "of x's shape")
    if channel_bias is not None:
        checks.floating(NAME, "channel_bias", channel_bias)
        if not checks.has_shape(channel_bias, (c1,), (n, c1)):
            raise ValueError(
                f"{NAME}: channel_bias must be [{c1}] or [{n}, {c1}], got shape "
                f"{list(channel_bias.shape)}"
            )
    for name, image in (("x2", x2), ("residual", residual)):
        if image is not None and image.dtype != x.dtype:
            raise TypeError(f"{NAME}: {name} must have x's dtype {x.dtype}, got {image.dtype}")
    checks.same_device(
        NAME, x, x2=x2, residual=residual, channel_bias=channel_bias,
        weight=weight, bias=bias, scale=scale, shift=shift,
    )  # fmt: skip


def _fake(x: Tensor, x2: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_groups, write_sum = rest[6], rest[9]
    channels = x.shape[1] + (x2.shape[1] if x2 is not None else 0)
    y = empty_like_images(x, channels)
    total = empty_like_images(x) if write_sum else optional(x)
    shape, dtype = (x.shape[0], num_groups), compute_dtype(x)
    mean = torch.empty(shape, dtype=dtype, device=x.device)
    return y, total, mean, torch.empty_like(mean)


def _fake_bwd(
    dy: Tensor, dsum: Tensor | None, x: Tensor, x2: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    _, _, _, scale, shift, _, _, _, channel_bias_grad, _ = rest
    n, c1, _, _ = x.shape
    c = dy.shape[1]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=compute_dtype(x), device=x.device)

    return (
        empty_like_images(x),
        empty_like_images(x, x2.shape[1]) if x2 is not None else optional(x),
        empty(c),
        empty(c),
        empty(n, c) if scale is not None else empty(0),
        empty(n, c) if shift is not None else empty(0),
        empty(n, c1) if channel_bias_grad else empty(0),
    )


# A sum over no elements is 0.
_KERNELS = kernels(NAME, compiled.prepare, of_nothing=0.0)
_KERNELS_BWD = kernels(NAME, compiled.prepare_bwd, launcher="group_norm_silu_bwd", of_nothing=0.0)

SPEC = register(
    OpSpec(
        name=NAME,
        summary="GroupNorm with sums before it, scale-shift and SiLU after it",
        public=group_norm_silu,
        kernels={"reference": reference.group_norm_silu, **_KERNELS},
        dtypes=dict.fromkeys(_KERNELS, FLOAT32_AND_HALVES),
        differentiable=(
            "x",
            "x2",
            "residual",
            "channel_bias",
            "weight",
            "bias",
            "scale",
            "shift",
        ),
        batched=("x", "x2", "scale", "shift", "residual"),
    )
)

_op = define(
    "group_norm_silu(Tensor x, Tensor? x2, Tensor? residual, Tensor? channel_bias, Tensor weight, "
    "Tensor bias, Tensor? scale, Tensor? shift, int num_groups, float eps, bool silu, bool write_sum, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _KERNELS,
    _fake,
)

_op_bwd = define(
    "group_norm_silu_bwd(Tensor dy, Tensor? dsum, Tensor x, Tensor? x2, Tensor? channel_bias, "
    "Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, Tensor mean, Tensor rstd, bool silu, "
    "bool channel_bias_grad, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _KERNELS_BWD,
    _fake_bwd,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, x2, residual, channel_bias, weight, bias, scale, shift, *options = inputs
    _, total, mean, rstd = output
    ctx.num_groups, ctx.eps, ctx.silu, write_sum, ctx.backend = options
    ctx.has_residual = residual is not None
    ctx.bias_rank = None if channel_bias is None else channel_bias.ndim
    ctx.dtypes = tuple(
        None if p is None else p.dtype for p in (weight, bias, scale, shift, channel_bias)
    )
    ctx.set_materialize_grads(False)
    # A written sum, which the backward pass reads, includes the bias.
    folded = None if write_sum else channel_bias
    ctx.save_for_backward(
        total if write_sum else x, x2, folded, weight, bias, scale, shift, mean, rstd
    )


def _backward(
    ctx: Any, dy: Tensor | None, dsum: Tensor | None, dmean: Tensor | None, drstd: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, x2, folded, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
    if dsum is not None and dsum.numel() == 0:
        dsum = None
    if dy is None:
        channels = x.shape[1] + (x2.shape[1] if x2 is not None else 0)
        dy = empty_like_images(x, channels).zero_()
    wants_bias = ctx.bias_rank is not None
    dx, dx2, dweight, dbias, dscale, dshift, dchannel = _op_bwd(
        dy, dsum, x, x2, folded, weight, bias, scale, shift, mean, rstd,
        ctx.silu, wants_bias, ctx.backend,
    )  # fmt: skip
    if ctx.bias_rank == 1:
        dchannel = dchannel.sum(dim=0)
        if dsum is not None:
            kernel = "cuda" if ctx.backend == "cuda" else "auto"
            dchannel = dchannel + channel_sums(rows_of(dsum), kernel).to(dchannel.dtype)
    elif wants_bias and dsum is not None:
        dchannel = dchannel + dsum.sum(dim=(2, 3), dtype=dchannel.dtype)

    found = (dweight, dbias, dscale, dshift, dchannel)
    grads = [None if d is None else g.to(d) for g, d in zip(found, ctx.dtypes, strict=True)]
    return (
        dx,
        dx2 if x2 is not None else None,
        dx if ctx.has_residual else None,
        grads[4],
        *grads[:4],
        *[None] * 5,
    )


def _formula(
    ctx: Any, dy: Tensor | None, dsum: Tensor | None, dmean: Tensor | None, drstd: Tensor | None
) -> tuple[Tensor | None, ...]:
    """As `_backward`, in PyTorch's functions; a written sum is a leaf of that graph."""
    *saved, _, _ = ctx.saved_tensors

    def normalised(
        x: Tensor, x2: Tensor | None, folded: Tensor | None, *rows: Any
    ) -> tuple[Tensor]:
        weight, bias, scale, shift = rows
        y, _, _, _ = reference.group_norm_silu(
            x, x2, None, folded, weight, bias, scale, shift,
            ctx.num_groups, ctx.eps, ctx.silu, False,
        )  # fmt: skip
        return (y,)

    wants = ctx.needs_input_grad
    wanted = (wants[0] or wants[2] or wants[3], wants[1], wants[3], *wants[4:8])
    dh, dx2, dfolded, *dmodulation = vector_jacobian(normalised, saved, wanted, [dy])
    if dsum is not None and dsum.numel():
        dh = dsum if dh is None else dh + dsum
    dchannel = dfolded
    if wants[3] and saved[2] is None and dh is not None:  # the sum includes the bias
        dims = (0, 2, 3) if ctx.bias_rank == 1 else (2, 3)
        dchannel = dh.sum(dim=dims, dtype=compute_dtype(dh)).to(ctx.dtypes[4])
    dx, dresidual = dh if wants[0] else None, dh if wants[2] else None
    return (dx, dx2, dresidual, dchannel, *dmodulation, *[None] * 5)


differentiate(NAME, _setup, _backward, _formula)

"""The network's 3x3 convolution for training on the CPU, by Winograd's algorithm or AMX, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iddpm_ext.ops import checks
from iddpm_ext.ops.conv3x3 import compiled, reference
from iddpm_ext.ops.group_norm_silu.layout import empty_like_images, memory_format
from iddpm_ext.ops.operators import define, differentiate, vector_jacobian
from iddpm_ext.ops.rows import compute_dtype
from iddpm_ext.ops.spec import OpSpec, register, resolve_backend

NAME = "conv3x3"


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    upscale: bool = False,
    exact: bool = False,
    backend: str = "auto",
) -> Tensor:
    """3x3 convolution with stride 1 and padding 1, of images doubled in size before if `upscale`.

    A filter of 1x1, without padding, is computed by the same kernels where they have AMX.

        y[n, k, i, j] = bias[k] + sum over c, u, v of weight[k, c, u, v] h[n, c, i + u - 1, j + v - 1],
        h = x, or x with every pixel repeated 2 x 2 if `upscale`

    The CPU kernels use Winograd's minimal filtering (Lavin & Gray, CVPR 2016), for both gradients too, and
    transform the weights in every call (for inference, the CPU engine keeps them transformed). F(4x4, 3x3)
    has a quarter of the multiplications and several times the rounding error of direct convolution;
    F(2x2, 3x3), for `exact` and for images of at most 4 pixels per side, has 4/9 of them and about the same
    error. The choice depends on the image's size alone, so a sample's result depends on neither batch nor
    threads. Unless `exact`, bfloat16 images are convolved directly on CPUs with AMX, with weights rounded
    to bfloat16. PyTorch computes channel counts that are no multiples of 16, and everything on CPUs without
    AVX2. On CUDA the backend is the reference (cuDNN).

    Args:
        x: [N, C, H, W], any strides; channels_last, also with gaps between pixels, is read in place. float32
            or bfloat16; any floating dtype for the reference. Not affected by autocast.
        weight: [K, C, 3, 3] or [K, C, 1, 1], bias: [K], any floating dtype. The CPU kernels use them in
            float32, except for AMX's weights.
        upscale: first double height and width by nearest neighbour.
        exact: use only algorithms as accurate as direct convolution.
        backend: "auto", "reference" or "cpu".

    Returns:
        y [N, K, H, W], or [N, K, 2H, 2W] with `upscale`, with the dtype and the memory format of x.

    Raises:
        TypeError, ValueError: for an argument of a wrong type, shape, device or value.
        RuntimeError: if an explicit backend does not support the call.

    Differentiable in x, weight and bias any number of times.
    """
    checks.image_batch(NAME, "x", x)
    checks.floating(NAME, "weight", weight)
    c = x.shape[1]
    k = weight.shape[:1]
    if not checks.has_shape(weight, (*k, c, 3, 3), (*k, c, 1, 1)):
        raise ValueError(
            f"{NAME}: weight must be [K, {c}, 3, 3] or [K, {c}, 1, 1], got shape {list(weight.shape)}"
        )
    if bias is not None:
        checks.floating(NAME, "bias", bias)
        checks.shape(NAME, "bias", bias, (weight.shape[0],), "[K] =")
    checks.same_device(NAME, x, weight=weight, bias=bias)
    chosen = resolve_backend(NAME, backend, x.device, x.dtype)
    if chosen == "reference":
        return reference.conv3x3(x, weight, bias, bool(upscale), bool(exact))
    return _op(x, weight, bias, bool(upscale), bool(exact), chosen)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, upscale: bool, *rest: Any) -> Tensor:
    n, _, h, w = x.shape
    shape = (n, weight.shape[0], *((2 * h, 2 * w) if upscale else (h, w)))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _fake_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, upscale: bool, exact: bool, *wants_and_backend: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wants_x, wants_weight, wants_bias, _ = wants_and_backend

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    return (
        empty_like_images(x) if wants_x else x.new_empty(0),
        empty(*weight.shape) if wants_weight else empty(0),
        empty(len(weight)) if wants_bias else empty(0),
    )


SPEC = register(
    OpSpec(
        name=NAME,
        summary="3x3 convolution for training on the CPU, optionally after doubling the image",
        public=conv3x3,
        kernels={"reference": reference.conv3x3, "cpu": compiled.cpu},
        dtypes={"cpu": frozenset({torch.float32, torch.bfloat16})},
        differentiable=("x", "weight", "bias"),
        # F(4x4, 3x3) rounds intermediate values larger than its result: the error is about twice that of
        # direct convolution on images, and up to 7 times where that has few terms or terms of one sign,
        # i.e. 3e-7 of the largest value: far below bfloat16's rounding. `exact` avoids it.
        roundings=4.0,
    )
)

_op = define(
    "conv3x3(Tensor x, Tensor weight, Tensor? bias, bool upscale, bool exact, str backend) -> Tensor",
    {"cpu": compiled.cpu},
    _fake,
)

_op_bwd = define(
    "conv3x3_bwd(Tensor dy, Tensor x, Tensor weight, bool upscale, bool exact, bool wants_x, "
    "bool wants_weight, bool wants_bias, str backend) -> (Tensor, Tensor, Tensor)",
    {"cpu": compiled.cpu_bwd},
    _fake_bwd,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.options = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    upscale, exact, backend = ctx.options
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    dx, dweight, dbias = _op_bwd(
        dy, x, weight, upscale, exact, wants_x, wants_weight, wants_bias, backend
    )
    return (
        dx if wants_x else None,
        dweight.to(weight.dtype) if wants_weight else None,
        dbias.to(ctx.bias_dtype) if wants_bias else None,
        None,
        None,
        None,
    )


def _formula(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    upscale, exact, _ = ctx.options

    def convolution(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (reference.conv3x3(x, weight, None, upscale, exact),)

    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    dx, dweight = vector_jacobian(convolution, [x, weight], [wants_x, wants_weight], [dy])
    dbias = (
        dy.sum(dim=(0, 2, 3), dtype=compute_dtype(dy)).to(ctx.bias_dtype) if wants_bias else None
    )
    return dx, dweight, dbias, None, None, None


differentiate(NAME, _setup, _backward, _formula)

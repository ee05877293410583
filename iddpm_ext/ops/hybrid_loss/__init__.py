"""The hybrid loss of a network that learns its variance, and its gradient, in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from iddpm_ext.ops import checks
from iddpm_ext.ops.arguments import (
    NO_PLANE,
    empty_images,
    noise_key,
    plane,
)
from iddpm_ext.ops.hybrid_loss import reference
from iddpm_ext.ops.kernels import kernels
from iddpm_ext.ops.operators import define, differentiate, vector_jacobian
from iddpm_ext.ops.rows import compute_dtype, with_room_for_gradients
from iddpm_ext.ops.spec import FLOAT32_AND_HALVES, OpSpec, register, resolve_backend
from iddpm_ext.random import NoiseKey
from iddpm_ext.scalars import plain


class _Parts(NamedTuple):
    mse: Tensor
    vlb: Tensor


class HybridLoss(_Parts):
    """(mse, vlb), each [N], with their weighted sum as the attribute `loss`, [N]."""

    loss: Tensor

    def __new__(cls, mse: Tensor, vlb: Tensor, weight: float) -> HybridLoss:
        result = super().__new__(cls, mse, vlb)
        result.loss = mse + weight * vlb
        return result


def hybrid_loss(
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    noise: Tensor | NoiseKey,
    t: Tensor,
    table: Tensor,
    *,
    vlb_weight: float = 1e-3,
    backend: str = "auto",
) -> HybridLoss:
    """L_simple and L_vlb of each example, and their gradients in the same pass.

        mse = mean (out - target)^2
        vlb = L_t in bits per dimension, as `vlb_terms` without clipping; no gradient through the mean
        loss = mse + vlb_weight T vlb,  equation (16) of Improved DDPM

    The target is the noise, x_0, the velocity or the mean of q(x_{t-1} | x_t, x_0), as the table says.

    Args:
        model_output: [N, 2C, H, W], its second half the learned variance's v; float32, bfloat16 or
            float16 for the kernels, any floating dtype for the reference.
        x_0: [N, C, H, W] in [-1, 1], 8-bit values mapped linearly.
        x_t: [N, C, H, W], drawn with the same noise.
        noise: a tensor of x_t's shape, or the `NoiseKey` that x_t was drawn with.
        t: int64 [N], steps of the table's chain, 0-based.
        table: float32 [T, 16], as `Diffusion.table` gives it.
        vlb_weight: weight of T vlb in the loss; 1/T adds the bits of the one step.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        `HybridLoss`, which unpacks to (mse, vlb), each [N] and float32 (float64 where an input is).

    Raises:
        TypeError, ValueError: for an argument of a wrong type, shape, device or value.
        RuntimeError: if an explicit backend does not support the call.

    Differentiable in model_output any number of times: mse through its first half, vlb through its second.
    The reference is differentiable in x_0, x_t, noise and table as well.
    """
    checks.image_batch("hybrid_loss", "x_t", x_t)
    checks.image_batch("hybrid_loss", "x_0", x_0)
    checks.shape("hybrid_loss", "x_0", x_0, tuple(x_t.shape), "of the shape of x_t")
    checks.table("hybrid_loss", table, x_t.device)
    checks.model_output("hybrid_loss", model_output, x_t, table)
    if model_output.shape[1] != 2 * x_t.shape[1]:
        raise ValueError(
            "hybrid_loss: model_output must be [N, 2C, H, W] with a learned variance, "
            f"got shape {list(model_output.shape)}"
        )
    checks.same_device("hybrid_loss", x_t, model_output=model_output, x_0=x_0)
    checks.timesteps("hybrid_loss", t, x_t.shape[0], table.shape[0], x_t.device)
    if noise is None:
        raise TypeError("hybrid_loss: noise must be a tensor or a NoiseKey, got None")
    drawn = checks.noise_arguments("hybrid_loss", noise, x_t)
    double = compute_dtype(model_output, x_0, x_t) == torch.float64
    dtype = torch.float64 if double else model_output.dtype
    fixed = {"x_0": x_0, "x_t": x_t, "noise": noise, "table": table}
    chosen = resolve_backend("hybrid_loss", backend, x_t.device, dtype, fixed)
    if chosen == "reference":
        mse, vlb = reference.hybrid_loss(model_output, x_0, x_t, *drawn, t, table)
    else:
        with_gradient = torch.is_grad_enabled() and model_output.requires_grad
        model_output = with_room_for_gradients(model_output)
        mse, vlb, _ = _op(model_output, x_0, x_t, *drawn, t, table, with_gradient, chosen)
    return HybridLoss(mse, vlb, plain(vlb_weight) * table.shape[0])


def empty_results(model_output: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """mse, vlb and the gradient, uninitialised."""
    mse = torch.empty(model_output.shape[0], dtype=torch.float32, device=model_output.device)
    gradient = empty_images(model_output) if with_gradient else model_output.new_empty(0)
    return mse, torch.empty_like(mse), gradient


def _launch_arguments(
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    noise: Tensor | None,
    samples: Tensor | None,
    steps: Tensor | None,
    seed: int,
    stream_draw: int,
    t: Tensor,
    table: Tensor,
    with_gradient: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[object, ...], tuple[object, ...]]:
    """The results to fill, the launcher's arguments, and what must outlive the launch."""
    mse, vlb, gradient = empty_results(model_output, with_gradient)
    n, c, h, w = x_t.shape
    out, x_0_plane, x_t_plane = plane(model_output), plane(x_0.float()), plane(x_t.float())
    z = plane(noise.float()) if noise is not None else None
    t, table = t.contiguous(), table.float().contiguous()
    samples = samples.contiguous() if samples is not None else None
    steps = steps.contiguous() if steps is not None else None
    arguments = (
        (n, c, h * w, table.shape[0]),
        out.view,
        out.dtype_code,
        x_0_plane.view,
        x_t_plane.view,
        z.view if z is not None else NO_PLANE,
        noise_key(samples, steps, seed, stream_draw),
        t.data_ptr(),
        table.data_ptr(),
        mse.data_ptr(),
        vlb.data_ptr(),
        plane(gradient).view if with_gradient else NO_PLANE,
    )
    return (mse, vlb, gradient), arguments, (out, x_0_plane, x_t_plane, z, t, table, samples, steps)


def _fake(model_output: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_results(model_output, with_gradient=arguments[-2])


_KERNELS = kernels("hybrid_loss", _launch_arguments)

SPEC = register(
    OpSpec(
        name="hybrid_loss",
        summary="MSE and the variational term of the learned variance, with their gradient",
        public=hybrid_loss,
        kernels={"reference": reference.hybrid_loss, **_KERNELS},
        dtypes=dict.fromkeys(_KERNELS, FLOAT32_AND_HALVES),
        differentiable=("model_output",),
        stops_gradient=True,
        batched=("model_output", "x_0", "x_t", "noise", "t"),
    )
)

_op = define(
    "hybrid_loss(Tensor model_output, Tensor x_0, Tensor x_t, Tensor? noise, Tensor? samples, "
    "Tensor? steps, int seed, int stream_draw, Tensor t, Tensor table, bool with_gradient, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _KERNELS,
    _fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *arguments, ctx.seed, ctx.stream_draw, t, table, _, _ = inputs
    ctx.save_for_backward(output[2], *arguments, t, table)


def _backward(ctx: Any, by_mse: Tensor, by_vlb: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradient = ctx.saved_tensors[0]
    half = gradient.shape[1] // 2
    weights = torch.stack([by_mse, by_vlb], dim=1).to(gradient.dtype)
    scaled = gradient * weights.repeat_interleave(half, dim=1)[:, :, None, None]
    return (scaled, *[None] * 11)


def _formula(ctx: Any, by_mse: Tensor, by_vlb: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    _, model_output, x_0, x_t, noise, samples, steps, t, table = ctx.saved_tensors
    drawn = (noise, samples, steps, ctx.seed, ctx.stream_draw)

    def parts(out: Tensor) -> tuple[Tensor, Tensor]:
        return reference.hybrid_loss(out, x_0, x_t, *drawn, t, table)

    return (*vector_jacobian(parts, [model_output], [True], [by_mse, by_vlb]), *[None] * 11)


differentiate("hybrid_loss", _setup, _backward, _formula)

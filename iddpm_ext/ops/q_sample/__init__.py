"""The forward process in one step, fused with its noise."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from iddpm_ext.ops import checks
from iddpm_ext.ops.arguments import (
    NO_PLANE,
    empty_images,
    noise_key,
    plane,
)
from iddpm_ext.ops.columns import Column
from iddpm_ext.ops.kernels import kernels
from iddpm_ext.ops.operators import define, differentiate
from iddpm_ext.ops.q_sample import reference
from iddpm_ext.ops.spec import OpSpec, register, resolve_backend
from iddpm_ext.random import NoiseKey


def q_sample(
    x_0: Tensor, t: Tensor, table: Tensor, noise: Tensor | NoiseKey, *, backend: str = "auto"
) -> Tensor:
    """Draws x_t given x_0: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise.

    Equation (8) of Improved DDPM (equation (4) of DDPM).

    Args:
        x_0: [N, C, H, W], any strides. float32 for the kernels; any floating dtype for the reference.
        t: int64 [N], steps of the table's chain, 0-based.
        table: float32 [T, 16], as `Diffusion.table` gives it.
        noise: a tensor of x_0's shape, or a `NoiseKey`, by which the kernel draws it.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        x_t, with the shape, the dtype and the memory format of x_0.

    Raises:
        TypeError, ValueError: for an argument of a wrong type, shape, device or value.
        RuntimeError: if an explicit backend does not support the call.

    Differentiable in x_0 any number of times; the reference also in table and noise.
    """
    checks.image_batch("q_sample", "x_0", x_0)
    checks.table("q_sample", table, x_0.device)
    checks.timesteps("q_sample", t, x_0.shape[0], table.shape[0], x_0.device)
    if noise is None:
        raise TypeError("q_sample: noise must be a tensor or a NoiseKey, got None")
    drawn = checks.noise_arguments("q_sample", noise, x_0)
    fixed = {"table": table, "noise": noise}
    chosen = resolve_backend("q_sample", backend, x_0.device, x_0.dtype, fixed)
    if chosen == "reference":
        return reference.q_sample(x_0, t, table, *drawn)
    return _op(x_0, t, table, *drawn, chosen)


def _launch_arguments(
    x_0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    samples: Tensor | None,
    steps: Tensor | None,
    seed: int,
    stream_draw: int,
) -> tuple[Tensor, tuple[object, ...], tuple[object, ...]]:
    """The result to fill, the launcher's arguments, and what must outlive the launch."""
    result = empty_images(x_0)
    n, c, h, w = x_0.shape
    x = plane(x_0)
    z = plane(noise.float()) if noise is not None else None
    t, table = t.contiguous(), table.float().contiguous()
    samples = samples.contiguous() if samples is not None else None
    steps = steps.contiguous() if steps is not None else None
    arguments = (
        (n, c, h * w, table.shape[0]),
        x.view,
        t.data_ptr(),
        table.data_ptr(),
        z.view if z is not None else NO_PLANE,
        noise_key(samples, steps, seed, stream_draw),
        plane(result).view,
    )
    return result, arguments, (x, z, t, table, samples, steps)


def _fake(x_0: Tensor, *_: Any) -> Tensor:
    return empty_images(x_0)


_KERNELS = kernels("q_sample", _launch_arguments)

SPEC = register(
    OpSpec(
        name="q_sample",
        summary="x_t given x_0, its noise drawn in the same pass",
        public=q_sample,
        kernels={"reference": reference.q_sample, **_KERNELS},
        differentiable=("x_0",),
        batched=("x_0", "t", "noise"),
    )
)

_op = define(
    "q_sample(Tensor x_0, Tensor t, Tensor table, Tensor? noise, Tensor? samples, Tensor? steps, "
    "int seed, int stream_draw, str backend) -> Tensor",
    _KERNELS,
    _fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, t, table, *_ = inputs
    ctx.save_for_backward(t, table)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    t, table = ctx.saved_tensors
    signal = table[t, Column.SQRT_ALPHA_BAR].to(grad.dtype)[:, None, None, None]
    return (grad * signal, *[None] * 8)


# Linear, and in PyTorch's functions: the gradient is its own formula.
differentiate("q_sample", _setup, _backward, _backward)

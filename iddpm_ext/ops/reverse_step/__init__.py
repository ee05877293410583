"""One step of the reverse chain in one pass: x_0, clip, mean, log-variance and noise."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from iddpm_ext.ops import checks
from iddpm_ext.ops.arguments import NO_PLANE, empty_images, noise_key, plane
from iddpm_ext.ops.kernels import kernels
from iddpm_ext.ops.operators import define
from iddpm_ext.ops.reverse_step import reference
from iddpm_ext.ops.rows import compute_dtype
from iddpm_ext.ops.spec import OpSpec, register, resolve_backend
from iddpm_ext.random import NoiseKey


class ReverseStep(NamedTuple):
    """x_prev and x_0, [N, C, H, W], with the dtype and the memory format of x_t."""

    x_prev: Tensor
    x_0: Tensor


def reverse_step(
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | NoiseKey | None,
    *,
    clip: bool = True,
    backend: str = "auto",
) -> ReverseStep:
    """Draws x_{t-1} given x_t and the network's output.

        x_0    = p x_t + q out, clamped to [-1, 1] if `clip`
        x_prev = a x_0 + b x_t + m exp(log_variance / 2) z,   log_variance = u + w v

    with the coefficients of row t of `table` (`iddpm_ext.ops.columns`). With `Diffusion.table(device)`
    this is ancestral sampling, equations (11) and (15) of Improved DDPM; with `sampler="ddim"` it is
    equation (12) of DDIM: both are affine in (x_0, x_t), so one kernel computes both.

    Args:
        x_t: [N, C, H, W], any strides. float32 for the kernels; any floating dtype for the reference.
        model_output: [N, C, H, W], or [N, 2C, H, W] whose second half is v; float32, bfloat16 or float16 for
            the kernels, any floating dtype for the reference.
        t: int64 [N], steps of the table's chain, 0-based.
        table: float32 [T, 16].
        noise: z as a tensor of x_t's shape; a `NoiseKey`, by which the kernel draws z; or None for no
            noise. At t = 0 none is added.
        clip: clamp x_0 to [-1, 1].
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        x_prev and x_0 (after the clamp).

    Raises:
        TypeError, ValueError: for an argument of a wrong type, shape, device or value.
        RuntimeError: if an explicit backend does not support the call.

    Not differentiable. A step outside the table gives NaN if it cannot be checked without a
    synchronisation (CUDA tensors, compiled graphs).
    """
    checks.image_batch("reverse_step", "x_t", x_t)
    checks.table("reverse_step", table, x_t.device)
    checks.model_output("reverse_step", model_output, x_t, table)
    checks.same_device("reverse_step", x_t, model_output=model_output)
    checks.timesteps("reverse_step", t, x_t.shape[0], table.shape[0], x_t.device)
    drawn = checks.noise_arguments("reverse_step", noise, x_t)
    double = compute_dtype(x_t, model_output) == torch.float64
    dtype = torch.float64 if double else x_t.dtype
    chosen = resolve_backend("reverse_step", backend, x_t.device, dtype)
    if chosen == "reference":
        with torch.no_grad():
            return ReverseStep(*reference.reverse_step(x_t, model_output, t, table, *drawn, clip))
    with torch.no_grad():
        return ReverseStep(*_op(x_t, model_output, t, table, *drawn, clip, chosen))


def _launch_arguments(
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    samples: Tensor | None,
    steps: Tensor | None,
    seed: int,
    stream_draw: int,
    clip: bool,
) -> tuple[ReverseStep, tuple[object, ...], tuple[object, ...]]:
    """The results to fill, the launcher's arguments, and what must outlive the launch."""
    result = ReverseStep(empty_images(x_t), empty_images(x_t))
    n, c, h, w = x_t.shape
    x, out = plane(x_t), plane(model_output)
    z = plane(noise.float()) if noise is not None else None
    t, table = t.contiguous(), table.float().contiguous()
    samples = samples.contiguous() if samples is not None else None
    steps = steps.contiguous() if steps is not None else None
    arguments = (
        (n, c, h * w, table.shape[0]),
        x.view,
        out.view,
        out.dtype_code,
        model_output.shape[1] > c,
        t.data_ptr(),
        table.data_ptr(),
        z.view if z is not None else NO_PLANE,
        noise_key(samples, steps, seed, stream_draw),
        clip,
        plane(result.x_prev).view,
        plane(result.x_0).view,
    )
    return result, arguments, (x, out, z, t, table, samples, steps)


def _fake(x_t: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_images(x_t), empty_images(x_t)


_KERNELS = kernels("reverse_step", _launch_arguments)

SPEC = register(
    OpSpec(
        name="reverse_step",
        summary="one step of the reverse chain, ancestral or DDIM",
        public=reverse_step,
        kernels={"reference": reference.reverse_step, **_KERNELS},
        batched=("x_t", "model_output", "t", "noise"),
    )
)

_op = define(
    "reverse_step(Tensor x_t, Tensor model_output, Tensor t, Tensor table, Tensor? noise, "
    "Tensor? samples, Tensor? steps, int seed, int stream_draw, bool clip, str backend) "
    "-> (Tensor, Tensor)",
    _KERNELS,
    _fake,
)

"""One term of the variational bound for each example, and its gradient in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iddpm_ext.ops import checks
from iddpm_ext.ops.arguments import NO_PLANE, empty_images, plane
from iddpm_ext.ops.kernels import kernels
from iddpm_ext.ops.operators import define, differentiate, vector_jacobian
from iddpm_ext.ops.rows import compute_dtype, with_room_for_gradients
from iddpm_ext.ops.spec import FLOAT32_AND_HALVES, OpSpec, register, resolve_backend
from iddpm_ext.ops.vlb_terms import reference


def vlb_terms(
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    clip: bool = True,
    exact: bool = False,
    backend: str = "auto",
) -> Tensor:
    """L_t in bits per dimension, one number per example.

        t > 0: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)),  equation (6) of Improved DDPM
        t = 0: -log p(x_0 | x_1) of x_0's 8-bit level,          equation (5)

    averaged over C, H and W and divided by ln 2. The model's mean comes from its predicted x_0, its
    log-variance is u + w v, as in `reverse_step`.

    Args:
        model_output: [N, C, H, W], or [N, 2C, H, W] whose second half is v; float32, bfloat16 or
            float16 for the kernels, any floating dtype for the reference.
        x_0: [N, C, H, W] in [-1, 1], 8-bit values mapped linearly.
        x_t: [N, C, H, W].
        t: int64 [N], steps of the table's chain, 0-based.
        table: float32 [T, 16], as `Diffusion.table` gives it.
        clip: clamp the predicted x_0 to [-1, 1].
        exact: at t = 0 use the normal distribution function itself; otherwise its tanh approximation
            with probabilities clamped to at least 1e-12, as the original does.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        [N], float32 (float64 where an input is).

    Raises:
        TypeError, ValueError: for an argument of a wrong type, shape, device or value.
        RuntimeError: if an explicit backend does not support the call.

    Differentiable in model_output any number of times; the kernels compute value and gradient in one
    pass. The reference is differentiable in x_0, x_t and table as well.
    """
    checks.image_batch("vlb_terms", "x_t", x_t)
    checks.image_batch("vlb_terms", "x_0", x_0)
    checks.shape("vlb_terms", "x_0", x_0, tuple(x_t.shape), "of the shape of x_t")
    checks.table("vlb_terms", table, x_t.device)
    checks.model_output("vlb_terms", model_output, x_t, table)
    checks.same_device("vlb_terms", x_t, model_output=model_output, x_0=x_0)
    checks.timesteps("vlb_terms", t, x_t.shape[0], table.shape[0], x_t.device)
    double = compute_dtype(model_output, x_0, x_t) == torch.float64
    dtype = torch.float64 if double else model_output.dtype
    fixed = {"x_0": x_0, "x_t": x_t, "table": table}
    chosen = resolve_backend("vlb_terms", backend, x_t.device, dtype, fixed)
    if chosen == "reference":
        return reference.vlb_terms(model_output, x_0, x_t, t, table, clip, exact)
    with_gradient = torch.is_grad_enabled() and model_output.requires_grad
    model_output = with_room_for_gradients(model_output)
    return _op(model_output, x_0, x_t, t, table, clip, exact, with_gradient, chosen)[0]


def _empty_results(model_output: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    terms = torch.empty(model_output.shape[0], dtype=torch.float32, device=model_output.device)
    gradient = empty_images(model_output) if with_gradient else model_output.new_empty(0)
    return terms, gradient


def _launch_arguments(
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    table: Tensor,
    clip: bool,
    exact: bool,
    with_gradient: bool,
) -> tuple[tuple[Tensor, Tensor], tuple[object, ...], tuple[object, ...]]:
    """The results to fill, the launcher's arguments, and what must outlive the launch."""
    terms, gradient = _empty_results(model_output, with_gradient)
    n, c, h, w = x_t.shape
    out, x_0_plane, x_t_plane = plane(model_output), plane(x_0.float()), plane(x_t.float())
    t, table = t.contiguous(), table.float().contiguous()
    arguments = (
        (n, c, h * w, table.shape[0]),
        out.view,
        out.dtype_code,
        model_output.shape[1] > c,
        x_0_plane.view,
        x_t_plane.view,
        t.data_ptr(),
        table.data_ptr(),
        clip,
        exact,
        terms.data_ptr(),
        plane(gradient).view if with_gradient else NO_PLANE,
    )
    return (terms, gradient), arguments, (out, x_0_plane, x_t_plane, t, table)


def _fake(model_output: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(model_output, with_gradient=arguments[-2])


_KERNELS = kernels("vlb_terms", _launch_arguments)

SPEC = register(
    OpSpec(
        name="vlb_terms",
        summary="one term of the variational bound, with its gradient",
        public=vlb_terms,
        kernels={"reference": reference.vlb_terms, **_KERNELS},
        dtypes=dict.fromkeys(_KERNELS, FLOAT32_AND_HALVES),
        differentiable=("model_output",),
        batched=("model_output", "x_0", "x_t", "t"),
    )
)

_op = define(
    "vlb_terms(Tensor model_output, Tensor x_0, Tensor x_t, Tensor t, Tensor table, bool clip, "
    "bool exact, bool with_gradient, str backend) -> (Tensor, Tensor)",
    _KERNELS,
    _fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *arguments, ctx.clip, ctx.exact, _, _ = inputs
    ctx.save_for_backward(output[1], *arguments)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradient = ctx.saved_tensors[0]
    scaled = gradient * grad.to(gradient.dtype)[:, None, None, None]
    return (scaled, *[None] * 8)


def _formula(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    _, model_output, x_0, x_t, t, table = ctx.saved_tensors

    def terms(out: Tensor) -> tuple[Tensor]:
        return (reference.vlb_terms(out, x_0, x_t, t, table, ctx.clip, ctx.exact),)

    return (*vector_jacobian(terms, [model_output], [True], [grad]), *[None] * 8)


differentiate("vlb_terms", _setup, _backward, _formula)

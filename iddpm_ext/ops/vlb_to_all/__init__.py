"""The bound's term of every jump from t to an earlier step, from one evaluation of the network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iddpm_ext.ops import checks
from iddpm_ext.ops.arguments import plane
from iddpm_ext.ops.kernels import kernels
from iddpm_ext.ops.operators import define
from iddpm_ext.ops.rows import compute_dtype
from iddpm_ext.ops.spec import FLOAT32_AND_HALVES, OpSpec, register, resolve_backend
from iddpm_ext.ops.vlb_to_all import reference
from iddpm_ext.ops.vlb_to_all.jumps import jump_rows


def vlb_to_all(
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    clip: bool = True,
    exact: bool = False,
    backend: str = "auto",
) -> Tensor:
    """L(t -> s) in bits per dimension, of every example's t to every target s.

        s >= 0: KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in a chain in which s is the step before t
        s = -1: -log p(x_0 | x_t) of x_0's 8-bit level, in a chain whose first step is t

    averaged over C, H and W and divided by ln 2: entry (n, j) is what `vlb_terms` gives with the table
    of `Diffusion.respace([.., s, t, ..])`. That chain has alpha = alpha_bar_t / alpha_bar_s, from which beta,
    beta_tilde, the mean's coefficients and the log-variance follow; a learned v interpolates between log beta
    and log beta_tilde of the jump. So the terms of consecutive steps of a schedule add up to the bound of the
    chain respaced to it, and a shortest path over them is the schedule with the lowest bound.

    One term depends on more than the pair: at its first step t, where log beta_tilde is minus infinity, a
    chain takes that of its second step r instead. (A "learned" variance does not use it.) Target -1 takes
    r = t + 1, so that t = 0 agrees with the table; target -1 - r takes any r > t, so that every schedule can
    be summed exactly. Target -1 at the table's last step takes the limit of pure noise for r:
    log beta_tilde = log beta.

    Args:
        model_output: [N, C, H, W], or [N, 2C, H, W] whose second half is v, at step t of the table's
            chain; float32, bfloat16 or float16 for the kernels, any floating dtype for the reference.
        x_0: [N, C, H, W] in [-1, 1], 8-bit values mapped linearly.
        x_t: [N, C, H, W].
        t: int64 [N], steps of the table's chain, 0-based.
        table: float32 [T, 16], as `Diffusion.table` gives it for the sampler "ddpm".
        targets: int64 [S], steps of the table's chain, -1, or -1 - r.
        clip: clamp the predicted x_0 to [-1, 1].
        exact: in the decoder's terms use the normal distribution function itself; otherwise its tanh
            approximation with probabilities clamped to at least 1e-12.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        [N, S], float32 (float64 where an input is). NaN for impossible jumps: s >= t or r <= t.

    Raises:
        TypeError, ValueError: for an argument of a wrong type, shape, device or value.
        RuntimeError: if an explicit backend does not support the call.

    Not differentiable.

    Source: Watson et al. 2021, Learning to Efficiently Sample from Diffusion Probabilistic Models.
    """
    checks.image_batch("vlb_to_all", "x_t", x_t)
    checks.image_batch("vlb_to_all", "x_0", x_0)
    checks.shape("vlb_to_all", "x_0", x_0, tuple(x_t.shape), "of the shape of x_t")
    checks.table("vlb_to_all", table, x_t.device)
    checks.model_output("vlb_to_all", model_output, x_t, table)
    checks.same_device("vlb_to_all", x_t, model_output=model_output, x_0=x_0)
    checks.timesteps("vlb_to_all", t, x_t.shape[0], table.shape[0], x_t.device)
    _check_targets(targets, table.shape[0], x_t)
    double = compute_dtype(model_output, x_0, x_t) == torch.float64
    dtype = torch.float64 if double else model_output.dtype
    chosen = resolve_backend("vlb_to_all", backend, x_t.device, dtype)
    model_output, x_0, x_t = model_output.detach(), x_0.detach(), x_t.detach()
    if chosen == "reference":
        return reference.vlb_to_all(model_output, x_0, x_t, t, table, targets, clip, exact)
    return _op(model_output, x_0, x_t, t, table, targets, clip, exact, chosen)


def _check_targets(value: Any, num_timesteps: int, x_t: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"vlb_to_all: targets must be an int64 tensor [S], got {type(value).__name__}"
        )
    if value.dtype != torch.int64:
        raise TypeError(f"vlb_to_all: targets must be int64, got {value.dtype}")
    if value.ndim != 1:
        raise ValueError(f"vlb_to_all: targets must be [S], got shape {list(value.shape)}")
    checks.same_device("vlb_to_all", x_t, targets=value)
    if value.numel() and checks.looks(value):
        for found in (int(v) for v in torch.aminmax(value)):
            if not -num_timesteps <= found < num_timesteps:
                raise ValueError(
                    f"vlb_to_all: targets must lie in [0, {num_timesteps - 1}], or be -1 or -1 - r "
                    f"with a step r in [1, {num_timesteps - 1}], got {found}"
                )


def _empty_result(model_output: Tensor, targets: Tensor) -> Tensor:
    return torch.empty(
        model_output.shape[0], targets.shape[0], dtype=torch.float32, device=model_output.device
    )


def _launch_arguments(
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    table: Tensor,
    targets: Tensor,
    clip: bool,
    exact: bool,
) -> tuple[Tensor, tuple[object, ...], tuple[object, ...]]:
    """The result to fill, the launcher's arguments, and what must outlive the launch."""
    terms = _empty_result(model_output, targets)
    n, c, h, w = x_t.shape
    # Made contiguous float32 first, since they are read once per target.
    out, x_0_plane, x_t_plane = (plane(x.float().contiguous()) for x in (model_output, x_0, x_t))
    rows, targets = jump_rows(table, t, targets).float().contiguous(), targets.contiguous()
    arguments = (
        (n, targets.shape[0], c * h * w),
        out.view[:2],
        model_output.shape[1] > c,
        x_0_plane.view[:2],
        x_t_plane.view[:2],
        rows.data_ptr(),
        targets.data_ptr(),
        clip,
        exact,
        terms.data_ptr(),
    )
    return terms, arguments, (out, x_0_plane, x_t_plane, rows, targets)


def _fake(model_output: Tensor, *arguments: Any) -> Tensor:
    return _empty_result(model_output, arguments[4])


_KERNELS = kernels("vlb_to_all", _launch_arguments)

SPEC = register(
    OpSpec(
        name="vlb_to_all",
        summary="the bound's terms of every jump to an earlier step",
        public=vlb_to_all,
        kernels={"reference": reference.vlb_to_all, **_KERNELS},
        dtypes=dict.fromkeys(_KERNELS, FLOAT32_AND_HALVES),
        batched=("model_output", "x_0", "x_t", "t"),
    )
)

_op = define(
    "vlb_to_all(Tensor model_output, Tensor x_0, Tensor x_t, Tensor t, Tensor table, Tensor targets, "
    "bool clip, bool exact, str backend) -> Tensor",
    _KERNELS,
    _fake,
)

"""The hybrid loss in Triton: one program per example, its elements in blocks in order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from iddpm_ext.ops.arguments import plane
from iddpm_ext.ops.columns_triton import (
    LOG_VARIANCE_BIAS,
    LOG_VARIANCE_SCALE,
    MEAN_X0,
    MEAN_XT,
    NUM_COLUMNS,
    POSTERIOR_LOG_VARIANCE,
    TARGET_NOISE,
    TARGET_X0,
    TARGET_XT,
    X0_FROM_OUT,
    X0_FROM_XT,
)
from iddpm_ext.ops.gaussian_triton import decoder_term, kl_term
from iddpm_ext.ops.hybrid_loss import empty_results
from iddpm_ext.ops.noise_triton import normals
from iddpm_ext.ops.plane_triton import offset

BLOCK = 256
INVERSE_LN2 = tl.constexpr(1.4426950408889634)


@triton.jit
def _kernel(
    out, out_n, out_c, out_p,
    x_0, a_n, a_c, a_p,
    x_t, b_n, b_c, b_p,
    noise, z_n, z_c, z_p,
    gradient, g_n, g_c, g_p,
    mse, vlb, t, table, samples, steps,
    seed, stream_draw, num_timesteps, hw, count,
    DRAWN: tl.constexpr, GRADIENT: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    step = tl.load(t + sample)
    known = (step >= 0) & (step < num_timesteps)
    row = table + tl.where(known, step, 0) * NUM_COLUMNS
    poison = tl.where(known, 0.0, float("nan"))
    mean_x0 = tl.load(row + MEAN_X0)
    bias = tl.load(row + LOG_VARIANCE_BIAS) + poison
    scale = tl.load(row + LOG_VARIANCE_SCALE)
    true_lv = tl.load(row + POSTERIOR_LOG_VARIANCE)
    vlb_weight = INVERSE_LN2 / count

    squares = tl.zeros([4 * BLOCK], dtype=tl.float32)
    nats = tl.zeros([4 * BLOCK], dtype=tl.float32)
    for quad in range(0, (count + 3) // 4, BLOCK):
        at = 4 * quad + tl.arange(0, 4 * BLOCK).to(tl.int64)
        inside = at < count
        out_at = out + sample * out_n + offset(at, hw, out_c, out_p, DENSE)
        v_at = out + sample * out_n + offset(at + count, hw, out_c, out_p, DENSE)
        predicted = tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_at, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(x_0 + sample * a_n + offset(at, hw, a_c, a_p, DENSE), mask=inside, other=0.0)
        b = tl.load(x_t + sample * b_n + offset(at, hw, b_c, b_p, DENSE), mask=inside, other=0.0)
        if DRAWN:
            z = normals(
                seed, quad, tl.load(samples + sample), tl.load(steps + sample), stream_draw, BLOCK
            )
        else:
            z_at = noise + sample * z_n + offset(at, hw, z_c, z_p, DENSE)
            z = tl.load(z_at, mask=inside, other=0.0)
        target = (
            tl.load(row + TARGET_X0) * a
            + tl.load(row + TARGET_XT) * b
            + tl.load(row + TARGET_NOISE) * z
        )
        error = predicted - target + poison
        x_0_predicted = tl.load(row + X0_FROM_XT) * b + tl.load(row + X0_FROM_OUT) * predicted
        lv = bias + scale * v
        if step != 0:
            value, _, d_lv = kl_term(mean_x0 * (a - x_0_predicted), true_lv, lv)
        else:
            mean = mean_x0 * x_0_predicted + tl.load(row + MEAN_XT) * b
            value, _, d_lv = decoder_term(a, mean, lv)
        squares += tl.where(inside, error * error, 0.0)
        nats += tl.where(inside, value, 0.0)
        if GRADIENT:
            kind = gradient.dtype.element_ty
            d_at = gradient + sample * g_n + offset(at, hw, g_c, g_p, DENSE)
            d_v_at = gradient + sample * g_n + offset(at + count, hw, g_c, g_p, DENSE)
            tl.store(d_at, (2.0 / count * error).to(kind), mask=inside)
            tl.store(d_v_at, (d_lv * scale * vlb_weight).to(kind), mask=inside)
    tl.store(mse + sample, tl.sum(squares, axis=0) / count)
    tl.store(vlb + sample, tl.sum(nats, axis=0) * vlb_weight)


def hybrid_loss(
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
) -> tuple[Tensor, Tensor, Tensor]:
    mse, vlb, gradient = empty_results(model_output, with_gradient)
    if model_output.numel() == 0:
        return mse, vlb, gradient
    n, c, h, w = x_t.shape
    out, a, b = plane(model_output), plane(x_0.float()), plane(x_t.float())
    z = plane(noise.float()) if noise is not None else b
    g = plane(gradient) if with_gradient else out
    _kernel[(n,)](
        out.tensor, *out.view[1:],
        a.tensor, *a.view[1:],
        b.tensor, *b.view[1:],
        z.tensor, *z.view[1:],
        g.tensor, *g.view[1:],
        mse, vlb, t.contiguous(), table.float().contiguous(),
        samples.contiguous() if samples is not None else t,
        steps.contiguous() if steps is not None else t,
        seed, stream_draw, table.shape[0], h * w, c * h * w,
        DRAWN=samples is not None,
        GRADIENT=with_gradient,
        DENSE=all(p.view[2:] == (h * w, 1) for p in (out, a, b, z, g)),
        BLOCK=BLOCK,
    )  # fmt: skip
    return mse, vlb, gradient


def aot_cases() -> list[tuple[object, dict[str, str], dict[str, object]]]:
    """(kernel, signature, constants) of the variants that people run, for compilation without a GPU."""
    pointers = {
        "out": "*bf16", "x_0": "*fp32", "x_t": "*fp32", "noise": "*fp32", "gradient": "*bf16",
        "mse": "*fp32", "vlb": "*fp32", "t": "*i64", "table": "*fp32",
        "samples": "*i64", "steps": "*i64",
    }  # fmt: skip
    signature = {
        name: pointers.get(name, "constexpr" if name.isupper() else "i64")
        for name in _kernel.arg_names
    }
    constants = {"GRADIENT": True, "DENSE": True, "BLOCK": BLOCK}
    return [(_kernel, signature, {**constants, "DRAWN": drawn}) for drawn in (False, True)]

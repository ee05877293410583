"""One term of the variational bound in Triton: one program per example, its elements in blocks in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iddpm_ext.ops.arguments import empty_images, plane
from iddpm_ext.ops.columns_triton import (
    LOG_VARIANCE_BIAS,
    LOG_VARIANCE_SCALE,
    MEAN_X0,
    MEAN_XT,
    NUM_COLUMNS,
    POSTERIOR_LOG_VARIANCE,
    X0_FROM_OUT,
    X0_FROM_XT,
)
from iddpm_ext.ops.gaussian_triton import decoder_term, exact_decoder_term, kl_term
from iddpm_ext.ops.plane_triton import offset

BLOCK = 1024
INVERSE_LN2 = tl.constexpr(1.4426950408889634)


@triton.jit
def _kernel(
    out, out_n, out_c, out_p,
    x_0, a_n, a_c, a_p,
    x_t, b_n, b_c, b_p,
    gradient, g_n, g_c, g_p,
    terms, t, table, num_timesteps, hw, count,
    LEARNED: tl.constexpr, CLIP: tl.constexpr, EXACT: tl.constexpr, GRADIENT: tl.constexpr,
    DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    step = tl.load(t + sample)
    known = (step >= 0) & (step < num_timesteps)
    row = table + tl.where(known, step, 0) * NUM_COLUMNS
    poison = tl.where(known, 0.0, float("nan"))
    x0_from_out = tl.load(row + X0_FROM_OUT)
    mean_x0 = tl.load(row + MEAN_X0)
    bias = tl.load(row + LOG_VARIANCE_BIAS) + poison
    scale = tl.load(row + LOG_VARIANCE_SCALE)
    true_lv = tl.load(row + POSTERIOR_LOG_VARIANCE)
    weight = INVERSE_LN2 / count

    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK).to(tl.int64)
        inside = at < count
        out_at = out + sample * out_n + offset(at, hw, out_c, out_p, DENSE)
        eps = tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(x_0 + sample * a_n + offset(at, hw, a_c, a_p, DENSE), mask=inside, other=0.0)
        b = tl.load(x_t + sample * b_n + offset(at, hw, b_c, b_p, DENSE), mask=inside, other=0.0)
        raw = tl.load(row + X0_FROM_XT) * b + x0_from_out * eps
        predicted = raw
        if CLIP:
            predicted = tl.where(predicted < -1.0, -1.0, predicted)
            predicted = tl.where(predicted > 1.0, 1.0, predicted)
        lv = bias + tl.zeros_like(b)
        if LEARNED:
            v_at = out + sample * out_n + offset(at + count, hw, out_c, out_p, DENSE)
            lv += scale * tl.load(v_at, mask=inside, other=0.0).to(tl.float32)
        if step != 0:
            value, d_mean, d_lv = kl_term(mean_x0 * (a - predicted), true_lv, lv)
        else:
            mean = mean_x0 * predicted + tl.load(row + MEAN_XT) * b
            if EXACT:
                value, d_mean, d_lv = exact_decoder_term(a, mean, lv)
            else:
                value, d_mean, d_lv = decoder_term(a, mean, lv)
        total += tl.where(inside, value, 0.0)
        if GRADIENT:
            d_out = d_mean * mean_x0 * x0_from_out * weight
            if CLIP:
                d_out = tl.where((raw < -1.0) | (raw > 1.0), 0.0, d_out)
            kind = gradient.dtype.element_ty
            d_at = gradient + sample * g_n + offset(at, hw, g_c, g_p, DENSE)
            tl.store(d_at, d_out.to(kind), mask=inside)
            if LEARNED:
                d_v_at = gradient + sample * g_n + offset(at + count, hw, g_c, g_p, DENSE)
                tl.store(d_v_at, (d_lv * scale * weight).to(kind), mask=inside)
    tl.store(terms + sample, tl.sum(total, axis=0) * weight)


def vlb_terms(
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    table: Tensor,
    clip: bool,
    exact: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    n, c, h, w = x_t.shape
    terms = torch.empty(n, dtype=torch.float32, device=x_t.device)
    gradient = empty_images(model_output) if with_gradient else model_output.new_empty(0)
    if model_output.numel() == 0:
        return terms, gradient
    out, a, b = plane(model_output), plane(x_0.float()), plane(x_t.float())
    g = plane(gradient) if with_gradient else out
    _kernel[(n,)](
        out.tensor, *out.view[1:],
        a.tensor, *a.view[1:],
        b.tensor, *b.view[1:],
        g.tensor, *g.view[1:],
        terms, t.contiguous(), table.float().contiguous(), table.shape[0], h * w, c * h * w,
        LEARNED=model_output.shape[1] > c,
        CLIP=clip,
        EXACT=exact,
        GRADIENT=with_gradient,
        DENSE=all(p.view[2:] == (h * w, 1) for p in (out, a, b, g)),
        BLOCK=BLOCK,
    )  # fmt: skip
    return terms, gradient


def aot_cases() -> list[tuple[object, dict[str, str], dict[str, object]]]:
    """(kernel, signature, constants) of the variants that people run, for compilation without a GPU."""
    pointers = {
        "out": "*bf16", "x_0": "*fp32", "x_t": "*fp32", "gradient": "*bf16",
        "terms": "*fp32", "t": "*i64", "table": "*fp32",
    }  # fmt: skip
    signature = {
        name: pointers.get(name, "constexpr" if name.isupper() else "i64")
        for name in _kernel.arg_names
    }
    constants = {"LEARNED": True, "CLIP": True, "GRADIENT": True, "DENSE": True, "BLOCK": BLOCK}
    return [(_kernel, signature, {**constants, "EXACT": exact}) for exact in (False, True)]

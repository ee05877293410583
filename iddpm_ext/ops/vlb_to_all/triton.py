"""The terms of every jump in Triton: one program per (example, target), its elements in blocks in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from iddpm_ext.ops.vlb_to_all.jumps import jump_rows

BLOCK = 1024
INVERSE_LN2 = tl.constexpr(1.4426950408889634)


@triton.jit
def _kernel(
    out, out_n, x_0, x_t, rows, targets, terms, num_targets, count,
    LEARNED: tl.constexpr, CLIP: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    job = tl.program_id(0).to(tl.int64)
    sample = job // num_targets
    decoder = tl.load(targets + (job - sample * num_targets)) < 0
    row = rows + job * NUM_COLUMNS
    x0_from_xt = tl.load(row + X0_FROM_XT)
    x0_from_out = tl.load(row + X0_FROM_OUT)
    mean_x0 = tl.load(row + MEAN_X0)
    mean_xt = tl.load(row + MEAN_XT)
    bias = tl.load(row + LOG_VARIANCE_BIAS)
    scale = tl.load(row + LOG_VARIANCE_SCALE)
    true_lv = tl.load(row + POSTERIOR_LOG_VARIANCE)

    total = tl.zeros([BLOCK], dtype=tl.float32)
    # A row of NaN is an impossible jump: its sum is NaN, and the images are not read.
    blocks = tl.where(mean_x0 == mean_x0, count, 0)
    for first in range(0, blocks, BLOCK):
        at = first + tl.arange(0, BLOCK).to(tl.int64)
        inside = at < count
        eps = tl.load(out + sample * out_n + at, mask=inside, other=0.0)
        a = tl.load(x_0 + sample * count + at, mask=inside, other=0.0)
        b = tl.load(x_t + sample * count + at, mask=inside, other=0.0)
        predicted = x0_from_xt * b + x0_from_out * eps
        if CLIP:
            predicted = tl.where(predicted < -1.0, -1.0, predicted)
            predicted = tl.where(predicted > 1.0, 1.0, predicted)
        lv = bias + tl.zeros_like(b)
        if LEARNED:
            v = tl.load(out + sample * out_n + count + at, mask=inside, other=0.0)
            lv += scale * v
        if decoder:
            mean = mean_x0 * predicted + mean_xt * b
            if EXACT:
                value, _, _ = exact_decoder_term(a, mean, lv)
            else:
                value, _, _ = decoder_term(a, mean, lv)
        else:
            value, _, _ = kl_term(mean_x0 * (a - predicted), true_lv, lv)
        total += tl.where(inside, value, 0.0)
    poison = mean_x0 - mean_x0
    tl.store(terms + job, tl.sum(total, axis=0) * (INVERSE_LN2 / count) + poison)


def vlb_to_all(
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    table: Tensor,
    targets: Tensor,
    clip: bool,
    exact: bool,
) -> Tensor:
    n, s = x_t.shape[0], targets.shape[0]
    count = x_t[0].numel() if n else 0
    terms = torch.empty(n, s, dtype=torch.float32, device=x_t.device)
    if terms.numel() == 0:
        return terms
    out, a, b = (x.float().contiguous() for x in (model_output, x_0, x_t))
    rows = jump_rows(table, t, targets).float().contiguous()
    learned = model_output.shape[1] > x_t.shape[1]
    _kernel[(n * s,)](
        out, count * (2 if learned else 1), a, b, rows, targets.contiguous(), terms, s, count,
        LEARNED=learned, CLIP=clip, EXACT=exact, BLOCK=BLOCK,
    )  # fmt: skip
    return terms


def aot_cases() -> list[tuple[object, dict[str, str], dict[str, object]]]:
    """(kernel, signature, constants) of the variants that people run, for compilation without a GPU."""
    pointers = dict.fromkeys(("out", "x_0", "x_t", "rows", "terms"), "*fp32")
    signature = {
        name: pointers.get(name, "constexpr" if name.isupper() else "i64")
        for name in _kernel.arg_names
    }
    signature["targets"] = "*i64"
    constants = {"LEARNED": True, "CLIP": True, "BLOCK": BLOCK}
    return [(_kernel, signature, {**constants, "EXACT": exact}) for exact in (False, True)]

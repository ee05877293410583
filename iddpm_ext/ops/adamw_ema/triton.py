"""AdamW and moving averages in Triton: one launch over all tensors, found by a table of addresses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from iddpm_ext.ops.gaussian_triton import expm1

BLOCK = 1024
_FIELDS = 6


@triton.jit
def _pointer(row, field, DTYPE: tl.constexpr):
    address = tl.load(row + field)
    if DTYPE == 1:
        return address.to(tl.pointer_type(tl.bfloat16))
    elif DTYPE == 2:
        return address.to(tl.pointer_type(tl.float16))
    else:
        return address.to(tl.pointer_type(tl.float32))


@triton.jit
def _lerp(a, b, weight):
    return tl.where(weight < 0.5, a + weight * (b - a), b - (b - a) * (1.0 - weight))


@triton.jit
def _kernel(
    table, blocks, weights, step_at, scale_at, found_inf_at,
    step, lr, log_beta1, log_beta2, beta1_rest, beta2, beta2_rest, eps, kept,
    EMAS: tl.constexpr, GRAD: tl.constexpr, COPY: tl.constexpr, STEP: tl.constexpr,
    SCALE: tl.constexpr, FOUND_INF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    here = tl.program_id(0).to(tl.int64)
    row = table + tl.load(blocks + 2 * here) * (6 + EMAS)
    at = tl.load(blocks + 2 * here + 1) + tl.arange(0, BLOCK).to(tl.int64)
    end = tl.load(row)
    if FOUND_INF:
        end = tl.where(tl.load(found_inf_at) == 0.0, end, 0)
    inside = at < end
    count = step
    if STEP:
        count = tl.load(step_at)
    step_size = lr / -expm1(count * log_beta1)
    inverse_root = 1.0 / tl.sqrt(-expm1(count * log_beta2))

    param = _pointer(row, 1, 0) + at
    exp_avg = _pointer(row, 3, 0) + at
    exp_avg_sq = _pointer(row, 4, 0) + at
    grad = tl.load(_pointer(row, 2, GRAD) + at, mask=inside, other=0.0).to(tl.float32)
    if SCALE:
        grad *= tl.load(scale_at)
    m = _lerp(tl.load(exp_avg, mask=inside, other=0.0), grad, beta1_rest)
    v = beta2 * tl.load(exp_avg_sq, mask=inside, other=0.0) + beta2_rest * grad * grad
    p = kept * tl.load(param, mask=inside, other=0.0)
    p -= step_size * (m / (tl.sqrt(v) * inverse_root + eps))
    tl.store(exp_avg, m, mask=inside)
    tl.store(exp_avg_sq, v, mask=inside)
    tl.store(param, p, mask=inside)
    for k in tl.static_range(EMAS):
        ema = _pointer(row, 6 + k, 0) + at
        value = _lerp(tl.load(ema, mask=inside, other=0.0), p, tl.load(weights + k))
        tl.store(ema, value, mask=inside)
    if COPY >= 0:
        copy = _pointer(row, 5, COPY) + at
        tl.store(copy, p.to(copy.dtype.element_ty), mask=inside)


def launch_on(device: torch.device) -> Callable[..., None]:
    """A launcher with the arguments of `adamw_ema_cuda`, without the stream."""

    def launch(
        size: tuple[int, int],
        table: list[int],
        dtypes: tuple[int, int],
        factors: tuple[torch.Tensor | None, ...],
        numbers: tuple[float, ...],
        decays: list[float],
    ) -> None:
        emas = size[1]
        rows = [table[i : i + _FIELDS + emas] for i in range(0, len(table), _FIELDS + emas)]
        blocks = [[i, at] for i, row in enumerate(rows) for at in range(0, row[0], BLOCK)]
        if not blocks:
            return
        step, lr, beta1, beta2, eps, weight_decay = numbers
        addresses = torch.tensor(table, dtype=torch.int64, device=device)
        nothing = torch.zeros(1, device=device, dtype=torch.float32)
        step_at, scale_at, found_inf_at = (nothing if f is None else f for f in factors)
        _kernel[(len(blocks),)](
            addresses,
            torch.tensor(blocks, dtype=torch.int64, device=device),
            torch.tensor([1.0 - d for d in decays] or [0.0], dtype=torch.float32, device=device),
            step_at, scale_at, found_inf_at,
            step, lr, _log(beta1), _log(beta2), 1.0 - beta1, beta2, 1.0 - beta2, eps,
            1.0 - lr * weight_decay,
            EMAS=emas,
            GRAD=dtypes[0],
            COPY=dtypes[1] if any(row[5] for row in rows) else -1,
            STEP=factors[0] is not None,
            SCALE=factors[1] is not None,
            FOUND_INF=factors[2] is not None,
            BLOCK=BLOCK,
        )  # fmt: skip

    return launch


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def aot_cases() -> list[tuple[object, dict[str, str], dict[str, object]]]:
    """(kernel, signature, constants) of the variants that people run, for compilation without a GPU."""
    kinds: dict[str, str] = {"table": "*i64", "blocks": "*i64", "weights": "*fp32"}
    kinds |= dict.fromkeys(("step_at", "scale_at", "found_inf_at"), "*fp32")
    signature = {
        name: kinds.get(name, "constexpr" if name.isupper() else "fp32")
        for name in _kernel.arg_names
    }
    on: dict[str, Any] = {"STEP": True, "SCALE": True, "FOUND_INF": True, "BLOCK": BLOCK}
    return [
        (_kernel, signature, {**on, "EMAS": 2, "GRAD": grad, "COPY": copy})
        for grad, copy in ((0, -1), (1, 1))
    ]

"""AdamW and exponential moving averages in PyTorch, line by line."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    steps: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decays: Sequence[float],
) -> None:
    """In place; `emas` has the averages of decays[0], then those of decays[1], and so on."""
    if steps is None:
        steps = torch.full((), step, dtype=torch.float64, device=params[0].device)
    steps = steps.reshape(()).double()
    step_size, root = lr / (1 - beta1**steps), (1 - beta2**steps).sqrt()
    keep = None if found_inf is None else found_inf.reshape(()) != 0

    def write(target: Tensor, value: Tensor) -> None:
        target.copy_(value if keep is None else torch.where(keep, target, value))

    for i, (p, grad, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        grad = grad.to(p.dtype)
        if grad_scale is not None:
            grad = grad * grad_scale.reshape(()).to(p.dtype)
        new_m = torch.lerp(m, grad, 1 - beta1)
        new_v = beta2 * v + (1 - beta2) * grad * grad
        denominator = new_v.sqrt() / root.to(p.dtype) + eps
        new_p = p * (1 - lr * weight_decay) - step_size.to(p.dtype) * (new_m / denominator)
        write(m, new_m)
        write(v, new_v)
        write(p, new_p)
        for k, decay in enumerate(decays):
            ema = emas[k * len(params) + i]
            write(ema, torch.lerp(ema, new_p, 1 - decay))
        if copies:
            write(copies[i], new_p.to(copies[i].dtype))

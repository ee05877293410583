"""The optimiser of a run: AdamW and every moving average in one call of `ops.adamw_ema`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from iddpm_ext.ops import adamw_ema

from .parallel import local

MOMENTS = ("exp_avg", "exp_avg_sq")
_BETAS, _EPS = (0.9, 0.999), 1e-8


class AdamWEMA(torch.optim.Optimizer):
    """AdamW that also updates moving averages of its parameters, and never makes the host wait.

    Args:
        params: float32 parameters; of sharded ones (FSDP2) each process updates its shard, which gives the
            same result, because the update is elementwise.
        averages: decay -> averaged parameters by name, in the order of params; updated in place.
        lr, weight_decay: as in `torch.optim.AdamW`.

    Attributes:
        updates: number of updates without skipped ones, a tensor on the parameters' device.
        copies: copies of some parameters in another dtype, updated with them; empty at first.
        state: the moments `exp_avg` and `exp_avg_sq` of each parameter.
    """

    # Makes GradScaler pass found_inf to `step` instead of reading it on the host.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Tensor],
        averages: Mapping[float, Mapping[str, Tensor]],
        *,
        lr: float,
        weight_decay: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._parameters: list[Tensor] = self.param_groups[0]["params"]
        self._averages = averages
        self.copies: Mapping[Tensor, Tensor] = {}
        self.updates = torch.zeros((), dtype=torch.float32, device=self._parameters[0].device)
        for parameter in self._parameters:
            self.state[parameter] = {m: torch.zeros_like(parameter.detach()) for m in MOMENTS}

    def step(  # type: ignore[override]
        self, *, decays: Sequence[float], bad: Tensor, factor: Tensor | None = None
    ) -> None:
        """One update, skipped if `bad` or the loss scaler's found_inf says that a gradient is not finite.

        Args:
            decays: the averages' decays in this update, in the order of `averages`; they vary in warm-up.
            bad: a tensor on the device, 1 to skip the update, else 0.
            factor: a tensor on the device, by which the gradients are multiplied.
        """
        found: Any = getattr(self, "found_inf", None)
        skip = bad if found is None else torch.maximum(bad, found.to(bad.dtype))
        self.updates += 1 - skip
        averages = [list(average.values()) for average in self._averages.values()]
        numbered = list(enumerate(self._parameters))
        for chosen in (
            [i for i, p in numbered if p in self.copies],
            [i for i, p in numbered if p not in self.copies],
        ):
            if chosen:
                self._update(chosen, averages, decays=decays, skip=skip, factor=factor)

    def _update(
        self,
        chosen: Sequence[int],
        averages: Sequence[Sequence[Tensor]],
        *,
        decays: Sequence[float],
        skip: Tensor,
        factor: Tensor | None,
    ) -> None:
        """Updates the parameters with these indices; either all of them have copies or none."""
        group, parameters = self.param_groups[0], [self._parameters[i] for i in chosen]
        exp_avgs, exp_avg_sqs = (
            [local(self.state[p][moment]) for p in parameters] for moment in MOMENTS
        )
        copies = [self.copies[p].detach() for p in parameters if p in self.copies]
        adamw_ema(
            [local(p.detach()) for p in parameters],
            [local(_gradient(p)) for p in parameters],
            exp_avgs,
            exp_avg_sqs,
            [[local(average[i]) for i in chosen] for average in averages],
            step=self.updates,
            lr=group["lr"],
            betas=_BETAS,
            eps=_EPS,
            weight_decay=group["weight_decay"],
            decays=list(decays),
            copies=copies or None,
            grad_scale=factor,
            found_inf=skip,
        )


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "every parameter of the network takes part in its loss"
    return parameter.grad

"""The trainings that Figures 4, 6 and 7 and Tables 1 and 2 share; each network is trained once."""

from __future__ import annotations

from typing import Any

from common import trained

import iddpm_ext

#: Flags of the programs that use these trainings, as `common.arguments` takes them. The importance
#: sampler starts after ten losses of every t, some 24 T images, so T is less than 4000. L_vlb diverges
#: at the learning rate of the others, 1e-3, so it is compared with L_hybrid at a lower one, vlb_lr.
FLAGS: dict[str, Any] = {
    "train_steps": (2000, 8), "width": (32, 32), "short": (250, 25), "long": (1000, 50),
    "vlb_lr": (2e-4, 2e-4),
}  # fmt: skip


def ablation(
    flags: Any,
    schedule: str = "cosine",
    objective: str = "hybrid",
    sampler: str = "uniform",
    *,
    short: bool = False,
    lr: float | None = None,
) -> tuple[iddpm_ext.UNet, list[dict[str, Any]]]:
    """The network of one row, with averaged weights, and the records of its training.

    lr: None for the others' rate. The objective "simple" has the paper's fixed variance, beta. The
    batch is computed in two halves, from which the gradient-noise scale follows.
    """
    total = flags.short if short else flags.long
    settings = {} if lr is None else {"lr": lr}
    name = "" if lr is None else f" lr {lr:g}"
    return trained(
        flags, f"ablation {total} {schedule} {objective} {sampler}{name}", data=flags.data,
        steps=flags.train_steps, diffusion_steps=total, schedule=schedule, objective=objective,
        variance="fixed_large" if objective == "simple" else "learned_range",
        timestep_sampler=sampler, model_channels=flags.width, accumulate=2, noise_scale=True,
        log_every=max(1, flags.train_steps // 50), **settings,
    )  # fmt: skip

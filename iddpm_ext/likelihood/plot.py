"""Plots the terms of the bound against the step: Figure 2 of Improved DDPM."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from iddpm_ext.files import write_whole
from iddpm_ext.likelihood.result import PerStep


def require_matplotlib() -> Any:
    """matplotlib.figure; ImportError says how to install it."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("nll: plot must have matplotlib: pip install matplotlib") from error
    return matplotlib.figure


def plot_steps(per_step: PerStep, path: str | os.PathLike[str]) -> Path:
    """Draws L_t, with its 95 % interval, and the squared errors against t, both axes logarithmic.

    path: its suffix names the format (.png, .svg, .pdf). Returns it.
    """
    target = Path(path)
    figure = require_matplotlib().Figure(figsize=(10, 4.5), layout="constrained")
    terms, errors = figure.subplots(1, 2)
    seen = per_step.count > 0
    # Steps count from 1 here, as in the paper: a logarithmic axis has no 0.
    t = (per_step.timesteps[seen] + 1).numpy()
    bpd, error = per_step.bpd[seen].numpy(), per_step.bpd_error[seen].nan_to_num(0).numpy()
    low, high = (bpd - 1.96 * error).clip(min=1e-12), bpd + 1.96 * error
    terms.fill_between(t, low, high, alpha=0.3, linewidth=0, label="95 % interval")
    terms.plot(t, bpd, marker=".", markersize=3, label="mean")
    terms.set(xscale="log", yscale="log", xlabel="diffusion step t", ylabel="L_t in bits/dim")
    terms.set_title("Terms of the bound")
    for name, column in (("x_0", per_step.x_0_mse), ("eps", per_step.eps_mse)):
        errors.plot(t, column[seen].numpy(), marker=".", markersize=3, label=name)
    errors.set(xscale="log", yscale="log", xlabel="diffusion step t", ylabel="mean squared error")
    errors.set_title("Squared errors of the predictions")
    for axes in (terms, errors):
        axes.legend()
        axes.grid(alpha=0.3)
    data = io.BytesIO()
    figure.savefig(data, format=target.suffix.removeprefix(".") or "png", dpi=150)
    write_whole(target, data.getvalue())
    return target

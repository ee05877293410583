"""Figure 10: distance and bits/dim against the compute of training, for networks of several widths.

The fits are b C^a (the paper adds a constant, which it chose by hand): over all points, and over those that
are the best of at most their compute. Compute counts 3 forward passes per image and step, 2 operations per
multiply-add, and lr falls as 1e-3 / sqrt(width / 32).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from common import SMALL, arguments, axes, bits, distance, plain_numbers, progress, trained, write
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

import iddpm_ext


def forward_flops(model: iddpm_ext.UNet) -> int:
    """Floating-point operations of one image's evaluation."""
    side = model.config.image_size
    x, t = torch.zeros(1, model.config.in_channels, side, side), torch.zeros(1)
    model.backend = "plain"  # the counter sees PyTorch's own operators
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t)
    model.backend = "auto"
    return counter.get_total_flops()


def best(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The rows that none of at most their compute betters."""
    return [
        row for row in rows
        if not any(other["flops"] <= row["flops"] and other[key] < row[key] for other in rows)
    ]  # fmt: skip


def fit(rows: list[dict[str, Any]], key: str) -> dict[str, float]:
    """The power law b C^a through the rows, and how far they lie from it: the relative error's deviation."""
    x = torch.tensor([row["flops"] for row in rows], dtype=torch.float64).log()
    y = torch.tensor([row[key] for row in rows], dtype=torch.float64).log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    offset = float(y.mean() - slope * x.mean())
    off = float((y - offset - slope * x).square().mean().sqrt())
    return {"exponent": slope, "factor": math.exp(offset), "deviation": off}


def drawn(rows: list[dict[str, Any]], extractor: str) -> tuple[Figure, dict[str, Any]]:
    """The figure, with the laws of all rows and of the best."""
    figure, panels = axes("Figure 10: distance", "bits/dim")
    fits: dict[str, Any] = {}
    for panel, key in zip(panels, ("fd", "bpd"), strict=True):
        for width in dict.fromkeys(row["width"] for row in rows):
            mine = [row for row in rows if row["width"] == width]
            panel.plot(
                [r["flops"] for r in mine], [r[key] for r in mine], "o-", label=f"width {width}"
            )
        for name, chosen, style in (("all", rows, "k--"), ("best", best(rows, key), "k:")):
            law = fits.setdefault(key, {})[name] = fit(chosen, key)
            ends = [min(r["flops"] for r in rows), max(r["flops"] for r in rows)]
            line = [law["factor"] * c ** law["exponent"] for c in ends]
            panel.plot(ends, line, style, linewidth=1, label=f"{name}: C^{law['exponent']:.3f}")
        panel.set(xscale="log", yscale="log", xlabel="training compute C in FLOPs")
        plain_numbers(panel.yaxis)
        panel.legend(fontsize=8)
    panels[0].set_ylabel(f"FD-{extractor}")
    return figure, fits


def main() -> None:
    """Trains each width for each number of steps and fits lines through the logarithms."""
    flags = arguments(
        __doc__, checkpoint=False, widths=([32, 64, 96, 128], [32, 64]),
        train_steps=([250, 500, 1000, 2000], [4, 12]), samples=(500, 30), references=(5000, 60),
        images=(100, 8), budget=(100, 20), sample_steps=(50, 10), diffusion_steps=(4000, 100),
        extractor=("efficientnet-lite0-112", "pixels"),
    )  # fmt: skip
    rows = []
    for width in flags.widths:
        for steps in progress(flags.train_steps, f"width {width}"):
            model, _ = trained(
                flags, f"fig10 {width}", data=flags.data, steps=steps, model_channels=width,
                diffusion_steps=flags.diffusion_steps, lr=1e-3 / (width / 32) ** 0.5, log_every=10,
            )  # fmt: skip
            compute = 3 * forward_flops(model) * SMALL["batch_size"] * steps
            value, half = distance(model, flags.data, flags, steps=flags.sample_steps)
            found = bits(model, flags)
            rows.append({
                "width": width, "steps": steps, "flops": float(compute), "fd": value, "ci95_half": half,
                "bpd": found.bpd,
            })  # fmt: skip
    figure, fits = drawn(rows, flags.extractor)
    write(flags, "fig10_scaling", rows, figure, fits=fits)


if __name__ == "__main__":
    main()

"""Figure 10: distance and bits/dim against the compute of training, for networks of several widths.

The fit is FD = b C^-a over all points (the paper adds a constant, which it chose by hand). Compute
counts 3 forward passes per image and step, 2 operations per multiply-add, and lr falls as
1e-3 / sqrt(width / 32).
"""

from __future__ import annotations

import torch
from common import SMALL, arguments, axes, bits, distance, plain_numbers, progress, trained, write
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


def main() -> None:
    """Trains each width for each number of steps and fits a line through the logarithms."""
    flags = arguments(
        __doc__, checkpoint=False, widths=([32, 64, 96], [32, 64]),
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
    figure, panels = axes("Figure 10: distance", "bits/dim")
    fits = {}
    for panel, key in zip(panels, ("fd", "bpd"), strict=True):
        for width in flags.widths:
            mine = [row for row in rows if row["width"] == width]
            panel.plot(
                [r["flops"] for r in mine], [r[key] for r in mine], "o-", label=f"width {width}"
            )
        x = torch.tensor([row["flops"] for row in rows], dtype=torch.float64).log()
        y = torch.tensor([row[key] for row in rows], dtype=torch.float64).log()
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
        fits[key] = {"exponent": slope, "factor": float((y.mean() - slope * x.mean()).exp())}
        line = (y.mean() + slope * (x.sort().values - x.mean())).exp()
        panel.plot(x.sort().values.exp(), line, "k--", linewidth=1, label=f"C^{slope:.2f}")
        panel.set(xscale="log", yscale="log", xlabel="training compute C in FLOPs")
        plain_numbers(panel.yaxis)
        panel.legend(fontsize=8)
    panels[0].set_ylabel(f"FD-{flags.extractor}")
    write(flags, "fig10_scaling", rows, figure, fits=fits)


if __name__ == "__main__":
    main()

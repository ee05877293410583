"""Figures 6 and 7: learning curves and gradient-noise scale of L_vlb, L_hybrid and importance sampling.

Trainings of one small network: L_hybrid and L_vlb, each with t drawn uniformly and by the losses'
second moments. Uniform t makes L_vlb's curve and gradient noisy; importance sampling makes both
smooth, and does not help L_hybrid. The noise scale is that of McCandlish et al. 2018, from two
halves of each batch.
"""

from __future__ import annotations

import math

from ablation import FLAGS, ablation
from common import arguments, axes, progress, write

#: name -> (objective, sampler of timesteps, colour)
RUNS = {
    "L_hybrid": ("hybrid", "uniform", "C0"),
    "L_hybrid, importance sampled": ("hybrid", "loss-second-moment", "C9"),
    "L_vlb": ("vlb", "uniform", "C1"),
    "L_vlb, importance sampled": ("vlb", "loss-second-moment", "C3"),
}


def main() -> None:
    """Trains, and draws the curves."""
    flags = arguments(__doc__, checkpoint=False, **FLAGS)
    figure, (curve, noise) = axes(
        "Figure 6: bound while training", "Figure 7: gradient-noise scale"
    )
    rows = []
    for name, (objective, sampler, colour) in progress(list(RUNS.items()), "trainings"):
        _, records = ablation(flags, objective=objective, sampler=sampler, lr=flags.vlb_lr)
        steps = [record["step"] for record in records]
        # vlb_bpd is one term at a t drawn evenly, or weighted to be so: T of them are the bound.
        bound = [record["vlb_bpd"] * flags.long for record in records]
        scale = [record["grad_noise_scale"] for record in records]
        curve.plot(steps, bound, label=name, color=colour, linewidth=1.2)
        # An estimate is a ratio of two noisy ones: where it is negative or infinite it is left out.
        shown = [value if value and value > 0 else math.nan for value in scale]
        noise.plot(steps, shown, ".-", label=name, color=colour, linewidth=0.6, markersize=4)
        for step, value, noisy in zip(steps, bound, scale, strict=True):
            rows.append({"run": name, "step": step, "bound_bpd": value, "grad_noise_scale": noisy})
    curve.set(xlabel="training step", ylabel="bits/dim (training)", yscale="log")
    noise.set(xlabel="training step", ylabel="images", yscale="log")
    curve.legend(fontsize=8)
    write(flags, "fig6_7_objectives", rows, figure, diffusion_steps=flags.long, lr=flags.vlb_lr)


if __name__ == "__main__":
    main()

"""Figure 8: distance and bits/dim against the number of steps, by sampler and variance.

Learned variance, the two fixed ones (the same network with its variance head ignored), DDIM and
DPM-Solver++; --long-chains are sampled with the learned variance alone. In the paper, 50 to 100 steps with
a learned variance are close to the full chain, fixed variances are worse, and DDIM is better for few steps
only.
"""

from __future__ import annotations

from typing import Any

from common import arguments, axes, bits, distance, plain_numbers, progress, write

import iddpm_ext
from iddpm_ext import Diffusion

#: name -> (variance or None for the network's own, sampler)
METHODS = {
    "learned": (None, "ddpm"),
    "beta (fixed large)": ("fixed_large", "ddpm"),
    "beta~ (fixed small)": ("fixed_small", "ddpm"),
    "DDIM": (None, "ddim"),
    "DPM-Solver++": (None, "dpm++"),
}


def fixed(own: Diffusion, variance: str) -> Diffusion:
    """A process with the same chain and another variance."""
    return Diffusion(own.schedule, own.num_train_timesteps, variance, own.prediction)


def main() -> None:
    """Samples with every method and number of steps."""
    flags = arguments(
        __doc__, samples=(500, 30), references=(5000, 60), images=(100, 8), budget=(100, 20),
        steps=([5, 10, 25, 50, 100], [5, 10]), long_chains=([250, 1000], [20]),
        extractor=("efficientnet-lite0-112", "pixels"),
    )  # fmt: skip
    model = iddpm_ext.load(flags.checkpoint)
    own = model.diffusion
    assert own is not None
    figure, (left, right) = axes(
        "Figure 8: distance against steps", "bits/dim of the shorter chain"
    )
    rows: list[dict[str, Any]] = []
    for name, (variance, sampler) in METHODS.items():
        mine = []
        long = flags.long_chains if name == "learned" else []
        for steps in progress([*flags.steps, *long], name):
            # The head for the variance stays; a process of a fixed one does not read it.
            model.diffusion = own if variance is None else fixed(own, variance)
            value, half = distance(model, flags.data, flags, steps=steps, sampler=sampler)
            mine.append({"method": name, "steps": steps, "fd": value, "ci95_half": half})
        left.errorbar(
            [row["steps"] for row in mine], [row["fd"] for row in mine],
            [row["ci95_half"] for row in mine], marker="o", markersize=3, capsize=2, label=name,
        )  # fmt: skip
        rows += mine
    model.diffusion, curve = own, []
    for steps in progress([s for s in [*flags.steps, *flags.long_chains] if s >= 10], "bits/dim"):
        found = bits(model, flags, steps=steps, budget=min(flags.budget, steps))
        curve.append({"method": "learned", "steps": steps, "bpd": found.bpd})
    right.plot([row["steps"] for row in curve], [row["bpd"] for row in curve], marker="o")
    left.set(xscale="log", yscale="log", xlabel="steps", ylabel=f"FD-{flags.extractor}")
    right.set(xscale="log", xlabel="steps", ylabel="bits/dim (learned variance)")
    plain_numbers(left.xaxis, left.yaxis, right.xaxis)
    left.legend(fontsize=7)
    write(flags, "fig8_steps", [*rows, *curve], figure, samples=flags.samples)


if __name__ == "__main__":
    main()

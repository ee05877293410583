"""Figure 2: the terms L_t of the variational bound against t, from real images.

Nearly all of the bound comes from the first steps. Every image is evaluated at --budget steps,
drawn by importance; a point is the mean of a bin of neighbouring steps.
"""

from __future__ import annotations

import itertools

import torch
from common import arguments, axes, bits, write

import iddpm_ext


def main() -> None:
    """Estimates L_t and draws it."""
    flags = arguments(__doc__, images=(64, 8), budget=(400, 60), bins=(60, 30))
    model = iddpm_ext.load(flags.checkpoint)
    found = bits(model, flags)
    seen = (found.per_step_count > 0).nonzero()[:, 0]
    t, terms = found.per_step.timesteps[seen].double() + 1, found.per_step_bpd[seen].double()
    total = len(found.per_step_bpd)
    edges = torch.logspace(0, torch.log10(torch.tensor(float(total))), flags.bins + 1).double()
    rows = []
    for low, high in itertools.pairwise(edges):
        inside = (t >= low) & (t < high)
        if inside.any():
            rows.append({
                "t": float(t[inside].mean()), "L_t_bpd": float(terms[inside].mean()),
                "steps_seen": int(inside.sum()),
            })  # fmt: skip
    figure, (panel,) = axes(f"Figure 2: L_t, {flags.images} test images, {found.bpd:.3f} bits/dim")
    panel.plot([row["t"] for row in rows], [row["L_t_bpd"] for row in rows], marker=".")
    panel.set(xscale="log", yscale="log", xlabel="diffusion step t", ylabel="L_t in bits/dim")
    write(
        flags, "fig2_bound_terms", rows, figure, bpd=found.bpd, ci95=list(found.ci95),
        images=flags.images, budget=flags.budget,
    )  # fmt: skip


if __name__ == "__main__":
    main()

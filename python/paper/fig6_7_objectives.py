"""Figures 6 and 7: learning curves and gradient-noise scale of L_vlb, L_hybrid and importance sampling.

Three trainings of one small network: L_hybrid, L_vlb with uniform t, and L_vlb with t drawn by the
losses' second moments. Uniform t makes L_vlb's curve and gradient noisy; importance sampling makes
both smooth. The noise scale is that of McCandlish et al. 2018, from two halves of each batch.
"""

from __future__ import annotations

from typing import Any

from common import arguments, axes, trained, write

RUNS: dict[str, dict[str, Any]] = {
    "L_hybrid": {"objective": "hybrid"},
    "L_vlb": {"objective": "vlb"},
    "L_vlb, importance sampled": {"objective": "vlb", "timestep_sampler": "loss-second-moment"},
}


def main() -> None:
    """Trains, and draws smoothed curves."""
    flags = arguments(
        __doc__, checkpoint=False, steps=(3000, 24), diffusion_steps=(100, 10), width=(32, 32)
    )
    figure, (curve, noise) = axes(
        "Figure 6: bound while training", "Figure 7: gradient-noise scale"
    )
    rows = []
    for name, settings in RUNS.items():
        _, records = trained(
            flags, f"fig6 {name}", data=flags.data, steps=flags.steps, accumulate=2,
            diffusion_steps=flags.diffusion_steps, model_channels=flags.width, noise_scale=True,
            log_every=max(1, flags.steps // 60), **settings,
        )  # fmt: skip
        steps = [record["step"] for record in records]
        # vlb_bpd is one term at a t drawn evenly, or weighted to be so: T of them are the bound.
        bound = [record["vlb_bpd"] * flags.diffusion_steps for record in records]
        scale = [record["grad_noise_scale"] for record in records]
        curve.plot(steps, bound, label=name, linewidth=1)
        noise.plot(steps, scale, label=name, linewidth=1)
        for step, value, noisy in zip(steps, bound, scale, strict=True):
            rows.append({"run": name, "step": step, "bound_bpd": value, "grad_noise_scale": noisy})
    curve.set(xlabel="training step", ylabel="bits/dim (training)", yscale="log")
    noise.set(xlabel="training step", ylabel="images", yscale="log")
    curve.legend(fontsize=8)
    write(flags, "fig6_7_objectives", rows, figure, diffusion_steps=flags.diffusion_steps)


if __name__ == "__main__":
    main()

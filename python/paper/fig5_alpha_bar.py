"""Figure 5: alpha_bar_t through the linear and the cosine schedule."""

from __future__ import annotations

from common import arguments, axes, write

from iddpm_ext import Diffusion


def main() -> None:
    """Draws both and writes them at a hundred places."""
    flags = arguments(__doc__, checkpoint=False, steps=(4000, 4000))
    figure, (panel,) = axes("Figure 5: the signal that is left")
    rows = []
    for schedule in ("linear", "cosine"):
        chain = Diffusion(schedule, flags.steps)
        place = (chain.timesteps + 1) / flags.steps
        panel.plot(place, chain.alphas_cumprod, label=schedule)
        for i in range(0, flags.steps, max(1, flags.steps // 100)):
            x, y = float(place[i]), float(chain.alphas_cumprod[i])
            rows.append({"schedule": schedule, "t_over_T": x, "alpha_bar": y})
        share = float((chain.alphas_cumprod < 1e-2).double().mean())
        rows.append({"schedule": schedule, "share_of_steps_below_0.01": share})
    panel.set(xlabel="t / T", ylabel="alpha_bar_t")
    panel.legend()
    write(flags, "fig5_alpha_bar", rows, figure)


if __name__ == "__main__":
    main()

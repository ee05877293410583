"""Figure 1: beta~_t / beta_t for cosine chains of several lengths.

The two bounds of the reverse variance are nearly equal except in the first steps, and the more so
the longer the chain.
"""

from __future__ import annotations

from common import arguments, axes, write

from iddpm_ext import Diffusion


def main() -> None:
    """Draws the ratio and writes it at a hundred places."""
    flags = arguments(__doc__, checkpoint=False, steps=([100, 1000, 4000], [100, 1000, 4000]))
    figure, (panel,) = axes("Figure 1: the two choices of the reverse variance")
    rows = []
    for total in flags.steps:
        chain = Diffusion("cosine", total)
        previous = chain.alphas_cumprod[:-1]
        # beta~_t = beta_t (1 - ab_{t-1}) / (1 - ab_t); at t = 0 it is 0.
        ratio = (1 - previous) / (1 - chain.alphas_cumprod[1:])
        place = (chain.timesteps[1:] + 1) / total
        panel.plot(place, ratio, label=f"T = {total}")
        every = max(1, total // 100)
        for x, y in zip(place[::every].tolist(), ratio[::every].tolist(), strict=True):
            rows.append({"T": total, "t_over_T": x, "ratio": y})
    panel.set(xlabel="t / T", ylabel="beta~_t / beta_t", xscale="log")
    panel.legend()
    write(flags, "fig1_variance_ratio", rows, figure)


if __name__ == "__main__":
    main()

"""Figure 3: one image at evenly spaced t, by the linear schedule (top) and the cosine one.

The last quarter of the linear chain is noise already; the cosine chain adds it evenly.
"""

from __future__ import annotations

import torch
from common import arguments, images_of, write
from matplotlib.figure import Figure

from iddpm_ext import Diffusion
from iddpm_ext.random import STREAM_FORWARD, NoiseKey


def main() -> None:
    """Draws the strips and writes the share of the image in each."""
    flags = arguments(__doc__, checkpoint=False, columns=(10, 10), steps=(4000, 4000), image=(3, 3))
    x_0 = images_of(flags.data, flags.image + 1)[0][flags.image :]
    t = torch.linspace(0, flags.steps - 1, flags.columns).round().long()
    figure = Figure(figsize=(flags.columns * 0.9, 2.4), layout="constrained")
    panels = figure.subplots(2, flags.columns)
    rows = []
    for schedule, line in zip(("linear", "cosine"), panels, strict=True):
        chain = Diffusion(schedule, flags.steps)
        key = NoiseKey(0, STREAM_FORWARD, torch.zeros(len(t), dtype=torch.int64), 0)
        x_t = chain.q_sample(x_0.expand(len(t), -1, -1, -1).contiguous(), t, key)
        for panel, step, image in zip(line, t.tolist(), x_t, strict=True):
            level = ((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).squeeze(-1)
            panel.imshow(level, cmap="gray", vmin=0, vmax=1)
            panel.set(xticks=[], yticks=[], title=f"t={step}")
            panel.title.set_fontsize(8)
            rows.append({
                "schedule": schedule, "t": step, "sqrt_alpha_bar": float(chain.alphas_cumprod[step] ** 0.5),
            })  # fmt: skip
        line[0].set_ylabel(schedule)
    write(flags, "fig3_schedule_strip", rows, figure)


if __name__ == "__main__":
    main()

"""Table 5: one stage against two: a small base and an upsampler, trained alike.

Both pairs see the same number of steps in all: the single stage gets the sum of the two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import arguments, axes, distance, images_of, trained, write

import iddpm_ext


def halved(images: torch.Tensor) -> torch.Tensor:
    """Images of half the size, by averaging."""
    return torch.nn.functional.avg_pool2d(images, 2)


def main() -> None:
    """Trains three networks, samples both ways, measures and shows both."""
    flags = arguments(
        __doc__, checkpoint=False, train_steps=(1500, 8), width=(32, 32), samples=(500, 30),
        references=(5000, 60), sample_steps=(50, 10), diffusion_steps=(1000, 100),
        training_images=(10000, 64), extractor=("efficientnet-lite0-112", "pixels"),
    )  # fmt: skip
    images, _ = images_of(flags.data, flags.training_images, split="train")
    options: dict[str, Any] = {
        "model_channels": flags.width, "diffusion_steps": flags.diffusion_steps,
        "log_every": flags.train_steps,
    }  # fmt: skip
    small = flags.out / "runs" / "table5-halved.npz"
    small.parent.mkdir(exist_ok=True)
    levels = ((halved(images) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    np.savez(small, levels.numpy())
    base, _ = trained(
        flags, "table5 base", data=str(small), steps=flags.train_steps,
        **{**options, "channel_mult": (1, 1)},
    )  # fmt: skip
    single, _ = trained(
        flags, "table5 single", data=flags.data, steps=2 * flags.train_steps, **options
    )
    enlarging, _ = trained(
        flags, "table5 upsampler", data=flags.data, steps=flags.train_steps,
        super_resolution=images.shape[-1] // 2, **options,
    )  # fmt: skip
    two = iddpm_ext.sample_two_stage(
        base, enlarging, flags.sample_steps, n=flags.samples, dtype=flags.precision, progress=False
    ).images
    one = iddpm_ext.sample(
        single, flags.sample_steps, n=flags.samples, dtype=flags.precision, progress=False
    )
    rows = []
    figure, panels = axes("one stage", "two stages", size=(2.4, 2.6))
    for name, x, panel in (("one stage", one, panels[0]), ("two stages", two, panels[1])):
        value, half = distance(x, flags.data, flags)
        rows.append({"model": name, "fd": value, "ci95_half": half})
        grid = torch.cat([torch.cat(list(row), -1) for row in x[:16].split(4)], -2)
        panel.imshow(
            (grid.clamp(-1, 1) + 1).div(2).permute(1, 2, 0).squeeze(-1), cmap="gray", vmin=0, vmax=1
        )
        panel.set(xticks=[], yticks=[])
        panel.set_title(f"{name}: FD {value:.4g}", fontsize=10)
    write(flags, "table5_two_stage", rows, figure, extractor=flags.extractor)


if __name__ == "__main__":
    main()

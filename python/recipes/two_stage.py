"""Train a small base and an upsampler, and compare two stages with bicubic enlargement of the base's samples.

    python python/recipes/two_stage.py --out runs/two-stage

Both networks are trained one after the other by `iddpm_ext.training.train`; stopped and called again, they go
on from their newest sound checkpoints. OUT/two_stage.json then has the Fréchet distance of three sets of
images to the training data: the upsampler's, of the base's samples; those same samples enlarged bicubically;
and the upsampler's of real images, reduced. OUT/two_stage.png shows some of each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import iddpm_ext
from iddpm_ext.data import open_data
from iddpm_ext.files import write_whole
from iddpm_ext.training import TrainConfig, train

SHOWN = 8


def configurations(arguments: argparse.Namespace) -> dict[str, TrainConfig]:
    """Of the base, whose images are small, and of the upsampler, which is given such images."""
    common: dict[str, Any] = {
        "data": arguments.data, "batch_size": arguments.batch_size, "num_res_blocks": 1,
        "model_channels": arguments.width, "attention_resolutions": (7,), "lr": 1e-3,
        "lr_warmup": 200, "lr_decay": True, "ema": (0.998,), "grad_clip": 1.0,
        "dtype": arguments.dtype, "cache": True, "save_every": 500, "keep": 1, "sample_every": 0,
        "progress": False,
    }  # fmt: skip
    return {
        "base": TrainConfig(
            **common, out=str(arguments.out / "base"), steps=arguments.base_steps,
            image_size=arguments.small, channel_mult=(1, 1),
        ),
        "upsampler": TrainConfig(
            **common, out=str(arguments.out / "upsampler"), steps=arguments.upsampler_steps,
            super_resolution=arguments.small, channel_mult=(1, 1, 1),
        ),
    }  # fmt: skip


def trained(config: TrainConfig) -> iddpm_ext.UNet:
    """The averaged weights at the run's last step. Raises KeyboardInterrupt where it was stopped before."""
    checkpoint = train(config)
    if checkpoint.name != f"step-{config.steps}":
        raise KeyboardInterrupt
    return iddpm_ext.load(checkpoint)


def bicubic(low_res: Tensor, side: int) -> Tensor:
    """[N, C, h, w] -> [N, C, side, side]."""
    return F.interpolate(low_res, (side, side), mode="bicubic").clamp(-1, 1)


def real_images(data: str, small: int, n: int) -> Tensor:
    """Images of the test split, reduced as the upsampler's training reduces its own."""
    images, _, _ = open_data(data, split="test").images(torch.arange(n, dtype=torch.int64))
    return F.interpolate(images, (small, small), mode="area")


def drawn(arguments: argparse.Namespace, base: Any, upsampler: Any) -> dict[str, Tensor]:
    """What is compared, by name, and the base's samples."""
    n, steps = arguments.samples, arguments.sample_steps
    options: dict[str, Any] = {"batch_size": 50, "seed": 1, "progress": False}
    two = iddpm_ext.sample_two_stage(base, upsampler, steps, n=n, **options)
    real = real_images(arguments.data, arguments.small, n)
    return {
        "base": two.low_res,
        "two stages": two.images,
        "bicubic": bicubic(two.low_res, two.images.shape[-1]),
        "upsampled real images": iddpm_ext.sample(upsampler, steps, low_res=real, **options),
    }


def distances(arguments: argparse.Namespace, sets: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The Fréchet distance of each set of full-sized images to the training data, with its interval."""
    rows = []
    for name, images in sets.items():
        if name == "base":
            continue
        found = iddpm_ext.evaluate(
            images, arguments.data, extractor=arguments.extractor, metrics=("fid",),
            reference_n=arguments.references, resamples=20, progress=False,
        )  # fmt: skip
        (score,) = found.scores.values()
        interval = score.ci95 and [round(score.ci95.low, 2), round(score.ci95.high, 2)]
        rows.append({"images": name, "fd": round(score.value, 2), "ci95": interval})
        print(rows[-1], flush=True)
    return rows


def sheet(sets: dict[str, Tensor]) -> Tensor:
    """Some of each set, the same ones below one another; the base's at its size, with a border."""
    side = sets["two stages"].shape[-1]
    rows = []
    for name, images in sets.items():
        shown = images[:SHOWN]
        if name == "base":
            room = side - shown.shape[-1]
            shown = F.pad(shown, (room // 2, room - room // 2) * 2, value=1.0)
        rows.append(shown)
    return torch.cat(rows)


def parser() -> argparse.ArgumentParser:
    """The command line's."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--small", type=int, default=14, help="side of the base's images")
    found.add_argument("--base-steps", type=int, default=3000)
    found.add_argument("--upsampler-steps", type=int, default=1500)
    found.add_argument("--batch-size", type=int, default=32)
    found.add_argument("--width", type=int, default=64)
    found.add_argument("--dtype", default="bfloat16")
    found.add_argument("--samples", type=int, default=1000)
    found.add_argument("--references", type=int, default=10000)
    found.add_argument("--sample-steps", type=int, default=50)
    found.add_argument("--extractor", default="efficientnet-lite0-112")
    return found


def main() -> int:
    """Train both, draw, measure and show."""
    began, arguments = time.monotonic(), parser().parse_args()
    networks = {name: trained(config) for name, config in configurations(arguments).items()}
    seconds = time.monotonic() - began
    sets = drawn(arguments, networks["base"], networks["upsampler"])
    facts = {
        "command": " ".join(["python", *sys.argv]), "samples": arguments.samples,
        "references": arguments.references, "extractor": arguments.extractor,
        "training_seconds": round(seconds), "iddpm_ext": iddpm_ext.__version__,
        "torch": torch.__version__, "threads": torch.get_num_threads(),
        "distances": distances(arguments, sets),
    }  # fmt: skip
    write_whole(arguments.out / "two_stage.json", (json.dumps(facts, indent=1) + "\n").encode())
    iddpm_ext.save_images(sheet(sets), arguments.out / "two_stage.png", columns=SHOWN)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Train a head that predicts the variance of every pixel, and store it in the checkpoint.

Example: iddpm covariance runs/mine --data DIR --out with-head.safetensors
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from iddpm_ext.cli._common import Count, pick_device, quiet, result, starting, target_of


def run(
    checkpoint: Annotated[str, tyro.conf.Positional],
    *,
    data: Path,
    classes: str = "auto",
    value_range: tuple[float, ...] | None = None,
    alpha: Literal["refuse", "drop", "black", "white"] = "refuse",
    split: Literal["train", "test", "all"] = "train",
    n: Count = 4096,
    updates: int = 2000,
    out: Path | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Trains a small head beside the frozen network; `--variance optimal` of sample and nll takes it then.

    Minutes on a CPU for the bundled models: 16 evaluations an update, and 4096 more.

    Args:
        checkpoint: a bundled name, a file, a run's folder, or hf://org/name.
        data: a folder, zip or array of images, of training best; classes are taken by their names.
        classes: where they come from: auto, folders, names, file (dataset.json), ids, none or a column.
        value_range: the values of black and white, 0,1 or 0,4095 or =-1,1, where their type does not tell.
        alpha: what becomes of transparent pixels: refuse; drop (the colours below show); black or white.
        split: of data that has both.
        n: how many images of the data, a random choice.
        updates: of Adam, 16 images each.
        out: the checkpoint to write; in place if not given.
        seed: names the noise and the choice of images.
        device: auto, cpu, cuda or cuda:1.
    """
    starting("covariance", f"loading {checkpoint}")
    import iddpm_ext
    from iddpm_ext.data import open_data
    from iddpm_ext.engines.spec import weights_fingerprint
    from iddpm_ext.likelihood import find_covariance
    from iddpm_ext.text import duration

    target = target_of(checkpoint, out)
    model = iddpm_ext.load(checkpoint).to(pick_device(device))
    images = open_data(
        data, split=split, image_size=model.config.image_size, bad_images="stop",
        classes=classes, value_range=value_range, alpha=alpha,
    )  # fmt: skip
    began = time.perf_counter()
    found = find_covariance(
        model, images, limit=n, updates=updates, seed=seed, split=split, progress=not quiet()
    )
    seconds = time.perf_counter() - began
    model.extra = {**model.extra, "covariance": found.to_extra(weights_fingerprint(model))}
    iddpm_ext.save(model, target)
    values = found.weight.numel() + found.bias.numel()
    result(
        f"a head of {values} weights, {updates} updates, {duration(seconds)}\n{target}",
        {"file": str(target), "weights": values, "updates": updates, "seconds": round(seconds, 3)},
    )

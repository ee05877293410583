"""Find the best step schedule for every number of steps, and store them in the checkpoint.

Example: iddpm steps runs/mine --data DIR --out with-steps.safetensors
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from iddpm_ext.cli._common import MaybeCount, pick_device, quiet, result, starting, target_of

if TYPE_CHECKING:
    from iddpm_ext.networks.unet import UNet

_SHOWN = (2, 5, 10, 25, 50, 100, 250)


def run(
    checkpoint: Annotated[str, tyro.conf.Positional],
    *,
    data: Path | None = None,
    purpose: Annotated[Literal["bound", "pictures"], tyro.conf.arg(name="for")] = "bound",
    classes: str = "auto",
    value_range: tuple[float, ...] | None = None,
    alpha: Literal["refuse", "drop", "black", "white"] = "refuse",
    split: Literal["train", "test", "all"] = "train",
    n: MaybeCount = None,
    candidates: int | None = None,
    most: int | None = None,
    first: int | None = None,
    out: Path | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
) -> None:
    """Finds the schedules of 2 to `most` steps with the best bound, for `--steps optimal-25`.

    With --for pictures: those whose images stay closest to those of many steps, for `--steps pictures-25`.
    For the bound, the moments of the network's outputs are stored too, for `--variance analytic`.

    After an interruption, the same call continues. Under torchrun, the processes divide the
    steps among them; the first one writes.

    Args:
        checkpoint: a bundled name, a file, a run's folder, or hf://org/name.
        data: a folder, zip or array of images, preferably training images; classes are matched by their
            names. Needed for the bound.
        purpose: bound or pictures.
        classes: source of the classes: auto, folders, names, file (dataset.json), ids, none or a column.
        value_range: the values of black and white, 0,1 or 0,4095 or =-1,1, if the type does not imply them.
        alpha: handling of transparent pixels: refuse; drop (keep their colours); black or white.
        split: train or test, for data that has both.
        n: how many images: by default 64 random ones of the data; for pictures 256, which are drawn.
        candidates: how many of the chain's steps to consider; each costs an evaluation per image. By default
            500; for pictures 128.
        most: the largest number of steps: by default 250; for pictures 100.
        first: for pictures, the step of the training chain to begin with; by default the noisiest where the
            network's predictions from pure noise agree.
        out: the checkpoint to write; by default in place.
        seed: of the noise.
        batch_size: maximum number of evaluations at once.
        device: auto, cpu, cuda or cuda:1.
    """
    starting("steps", f"loading {checkpoint}")
    import iddpm_ext
    from iddpm_ext.data import open_data
    from iddpm_ext.engines.spec import weights_fingerprint
    from iddpm_ext.files import beside
    from iddpm_ext.likelihood.request import make_likelihood_request
    from iddpm_ext.likelihood.schedules import check_counts, search
    from iddpm_ext.sampling.distributed import Processes
    from iddpm_ext.text import duration

    if first is not None and purpose != "pictures":
        raise ValueError(f"first must go with --for pictures, got {first} for the bound")
    target = target_of(checkpoint, out)
    model = iddpm_ext.load(checkpoint).to(pick_device(device))
    if purpose == "pictures":
        _for_pictures(
            model, target, n or 256, candidates or 128, most or 100, first, seed, batch_size
        )
        return
    if data is None:
        raise ValueError("data must be given for the bound, got None")
    candidates, most = candidates or 500, most or 250
    check_counts(candidates, most)
    with Processes.of_torchrun() as processes:
        images = open_data(
            data, split=split, image_size=model.config.image_size, bad_images="stop",
            classes=classes, value_range=value_range, alpha=alpha,
        )  # fmt: skip
        request = make_likelihood_request(
            model, images, labels=None, low_res=None, budget=None, steps=None, clip=True, exact=False,
            batch_size=batch_size, seed=seed, split=split, limit=n or 64, diffusion=None, dtype=None,
            engine=True, backend="auto", progress=processes.rank == 0 and not quiet(), who="find_schedules",
            shuffle=True,
        )  # fmt: skip
        began = time.perf_counter()
        # Beside the checkpoint, so that an interrupted search can continue.
        state = beside(target, ".steps")
        found = search(request, candidates, most, state, processes)
        seconds = time.perf_counter() - began
        if processes.rank > 0:
            return
    model.extra = {
        **model.extra,
        "step_schedules": found.to_extra(),
        "moments": found.moments.to_extra(weights_fingerprint(model)),
    }
    iddpm_ext.save(model, target)
    shown = sorted({*_SHOWN, max(found.steps)} & set(found.steps))
    lines = [f"{len(found.timesteps)} candidates, {len(request.x_0)} images, {duration(seconds)}"]
    lines += [f"optimal-{k:<4} {found.bpd[k]:.4f} bits/dim on these images" for k in shown]
    result(
        "\n".join([*lines, str(target)]),
        {
            "file": str(target), "candidates": len(found.timesteps), "images": len(request.x_0),
            "seconds": round(seconds, 3), "bpd": {k: found.bpd[k] for k in sorted(found.steps)},
        },
    )  # fmt: skip


def _for_pictures(
    model: UNet,
    target: Path,
    n: int,
    candidates: int,
    most: int,
    first: int | None,
    seed: int,
    batch_size: int | None,
) -> None:
    """Stores the schedules whose images stay closest to those of many steps."""
    from iddpm_ext.checkpoint import save
    from iddpm_ext.sampling.pictures import find_picture_schedules
    from iddpm_ext.text import duration

    began = time.perf_counter()
    found = find_picture_schedules(
        model, n=n, candidates=candidates, most=most, first=first, seed=seed, batch_size=batch_size
    )
    model.extra = {**model.extra, "picture_schedules": found.to_extra()}
    save(model, target)
    seconds = time.perf_counter() - began
    shown = sorted({*_SHOWN, max(found.steps)} & set(found.steps))
    lines = [f"{n} images, {duration(seconds)}; chains begin at step {found.first}"]
    lines += [f"pictures-{k:<4} at most {found.distance[k]:.4f} from many steps" for k in shown]
    result(
        "\n".join([*lines, str(target)]),
        {
            "file": str(target), "images": n, "seconds": round(seconds, 3), "first": found.first,
            "distance": {k: found.distance[k] for k in sorted(found.steps)},
        },
    )  # fmt: skip

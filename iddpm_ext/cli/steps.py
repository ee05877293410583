"""Find the best steps to take for every number of steps, and store them in the checkpoint.

Example: iddpm steps runs/mine --data DIR --out with-steps.safetensors
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from iddpm_ext.cli._common import MaybeCount, pick_device, quiet, result, starting

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
    out: Path | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
) -> None:
    """Finds the schedules of 2 to `most` steps with the best bound; `--steps optimal-25` takes them then.

    With --for pictures, those whose images stay nearest to a fine walk's, for `--steps pictures-25`.
    The moments that evaluations for the bound give are stored too, for `--variance analytic`.

    After an interruption, the same call goes on where it was. Under torchrun, the steps are shared out
    among the processes; the first one writes.

    Args:
        checkpoint: a bundled name, a file, a run's folder, or hf://org/name.
        data: a folder, zip or array of images, of training best; classes are taken by their names. Needed for
            the bound.
        purpose: bound or pictures.
        classes: where they come from: auto, folders, names, file (dataset.json), ids, none or a column.
        value_range: the values of black and white, 0,1 or 0,4095 or =-1,1, where their type does not tell.
        alpha: what becomes of transparent pixels: refuse; drop (the colours below show); black or white.
        split: of data that has both.
        n: how many images: of the data, a random choice of 64; for pictures, 256 that are drawn.
        candidates: how many of the chain's steps may be chosen; each costs an evaluation an image. 500; for
            pictures 128.
        most: the most steps of a schedule: 250; for pictures 100.
        out: the checkpoint to write; in place if not given.
        seed: names the noise.
        batch_size: most evaluations at once.
        device: auto, cpu, cuda or cuda:1.
    """
    starting("steps", f"loading {checkpoint}")
    import iddpm_ext
    from iddpm_ext.checkpoint import bundled
    from iddpm_ext.data import open_data
    from iddpm_ext.engines.spec import weights_fingerprint
    from iddpm_ext.files import beside
    from iddpm_ext.likelihood.request import make_likelihood_request
    from iddpm_ext.likelihood.schedules import check_counts, search
    from iddpm_ext.sampling.distributed import Processes

    target = Path(checkpoint) if out is None else out
    if out is None and (checkpoint in bundled() or target.suffix != ".safetensors"):
        raise ValueError(
            f"out must be given where the checkpoint is not a .safetensors file of yours, got {checkpoint}"
        )
    model = iddpm_ext.load(checkpoint).to(pick_device(device))
    if purpose == "pictures":
        _for_pictures(model, target, n or 256, candidates or 128, most or 100, seed, batch_size)
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
        # Beside the checkpoint, so that an interrupted search finds it.
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
    lines = [f"{len(found.timesteps)} candidates, {len(request.x_0)} images, {seconds:.0f} s"]
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
    seed: int,
    batch_size: int | None,
) -> None:
    """Stores the schedules whose images stay nearest to those of a fine walk."""
    from iddpm_ext.checkpoint import save
    from iddpm_ext.sampling.pictures import find_picture_schedules

    began = time.perf_counter()
    found = find_picture_schedules(
        model, n=n, candidates=candidates, most=most, seed=seed, batch_size=batch_size
    )
    model.extra = {**model.extra, "picture_schedules": found.to_extra()}
    save(model, target)
    seconds = time.perf_counter() - began
    shown = sorted({*_SHOWN, max(found.steps)} & set(found.steps))
    lines = [f"{n} images, {seconds:.0f} s"]
    lines += [f"pictures-{k:<4} {found.distance[k]:.4f} from the fine walk, at most" for k in shown]
    result(
        "\n".join([*lines, str(target)]),
        {
            "file": str(target), "images": n, "seconds": round(seconds, 3),
            "distance": {k: found.distance[k] for k in sorted(found.steps)},
        },
    )  # fmt: skip

"""Compare samples with a reference: FID, KID, Inception Score, precision and recall.

Example: iddpm evaluate fashion-mnist --reference DIR --extractor efficientnet-lite0 -n 2000
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from iddpm_ext.cli._common import MaybeCount, pick_device, pick_dtype, read_steps, result, starting


def run(
    samples: Annotated[str, tyro.conf.Positional],
    *,
    reference: str,
    extractor: str = "efficientnet-lite0",
    metrics: tuple[str, ...] = ("fid", "precision_recall"),
    n: MaybeCount = None,
    reference_n: int | None = None,
    split: Literal["train", "test", "all"] = "train",
    image_size: int | tuple[int, ...] | None = None,
    classes: str = "auto",
    value_range: tuple[float, ...] | None = None,
    alpha: Literal["refuse", "drop", "black", "white"] = "refuse",
    steps: str = "50",
    sampler: Literal["ddpm", "ddim", "dpm++", "dpm++3", "dpm++sde", "unipc", "unipc3"] = "ddpm",
    eta: float = 0.0,
    variance: Literal["fixed_small", "fixed_large", "analytic", "optimal"] | None = None,
    guidance_scale: float = 1.0,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    seed: int = 0,
    neighbours: tuple[int, ...] = (3, 5),
    resamples: int = 20,
    batch_size: int = 64,
    device: str = "auto",
    cache: str | None = None,
    out: Path | None = None,
) -> None:
    """Evaluates samples and prints every number with its interval.

    Args:
        samples: a folder, .zip or .npz of images, or a checkpoint, which is sampled.
        reference: a folder, .zip, .npz, IDX or CIFAR data, usually what the model was trained on.
        extractor: efficientnet-lite0 (-112 to resize to 112), pixels, or a file: FID's
            inception-2015-12-05.pt, pt_inception-2015-12-05-6726825d.pth, TorchScript or ONNX.
        metrics: any of fid, sfid, kid, inception_score, precision_recall.
        n: how many samples; by default all, or 10000 of a checkpoint.
        reference_n: how many reference images; by default all.
        split: train or test, for data that has both.
        image_size: side, or height,width, that images of files are resized and cropped to, as in training;
            by default that of the checkpoint, if there is one.
        classes: source of the classes: auto, folders, names, file (dataset.json), ids, none or a column.
            A checkpoint draws those of its classes that occur in the reference.
        value_range: the values of black and white, 0,1 or 0,4095 or =-1,1, if the type does not imply them.
        alpha: handling of transparent pixels: refuse; drop (keep their colours); black or white.
        steps: for sampling from a checkpoint, as in `iddpm sample`.
        sampler: ancestral (ddpm), DDIM, DPM-Solver++ (dpm++, dpm++3, dpm++sde) or UniPC (unipc, unipc3).
        eta: the noise of DDIM, from 0 to 1.
        variance: as in `iddpm sample`; by default the network's own.
        guidance_scale: of classifier-free guidance; 1 for none.
        dtype: precision of the checkpoint's network.
        seed: of all noise.
        neighbours: the k of precision and recall.
        resamples: number of random halves of the samples for the intervals; 0 for no intervals.
        batch_size: images at once.
        device: auto, cpu, cuda or cuda:1.
        cache: folder for the reference's statistics; "" for none.
        out: a .json file for the numbers.
    """
    starting("evaluate", samples)
    import json

    from iddpm_ext.evaluation import evaluate
    from iddpm_ext.files import write_whole

    if out is not None and not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"out must be in a folder that exists, got {str(out)!r}")
    found = evaluate(
        samples, reference, extractor=extractor, metrics=metrics, n=n, reference_n=reference_n,
        split=split, image_size=image_size, classes=classes, value_range=value_range, alpha=alpha,
        steps=read_steps(steps), sampler=sampler, eta=eta, variance=variance,
        guidance_scale=guidance_scale, dtype=pick_dtype(dtype),
        seed=seed, neighbours=neighbours, resamples=resamples,
        batch_size=batch_size, device=pick_device(device), cache=cache,
    )  # fmt: skip
    result(str(found), json.loads(found.to_json()))
    if out is not None:
        write_whole(out, (found.to_json() + "\n").encode())

"""`evaluate`: from two sets of images to named numbers."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iddpm_ext.evaluation.extraction import FeatureSet, cached_extract, extract
from iddpm_ext.evaluation.extractors import INCEPTION, Extractor, ExtractorSpec, open_extractor
from iddpm_ext.evaluation.images import (
    Images,
    ImageSet,
    Reading,
    Recipe,
    is_model,
    model_classes,
    open_images,
    open_source,
)
from iddpm_ext.files import cache_folder
from iddpm_ext.metrics import (
    Interval,
    Neighbourhoods,
    frechet_distance,
    half_sample_interval,
    inception_score,
    kernel_distance,
)
from iddpm_ext.networks.foreign import unwrapped
from iddpm_ext.networks.unet import UNet
from iddpm_ext.scalars import plain
from iddpm_ext.sizes import checked_size

METRICS = ("fid", "sfid", "kid", "inception_score", "precision_recall")
# Reference images that neighbourhoods are computed from, as in the original evaluator.
_KEPT = 10_000


@dataclass(frozen=True)
class Score:
    """A number and its 95 % interval; None if it was not requested or cannot be estimated."""

    value: float
    ci95: Interval | None


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    scores: by name: fid, sfid, kid for FID's Inception and fd, sfd, kd for any other network,
    inception_score, precision_k3, recall_k3 and so on, each followed by "-" and the extractor.
    samples, reference: what they were. sample_count, reference_count: how many. extractor: its
    name. image_size: (height, width) of both. seconds: the time it took.
    """

    scores: dict[str, Score]
    samples: str
    sample_count: int
    reference: str
    reference_count: int
    extractor: str
    image_size: tuple[int, int]
    seconds: float

    def __getitem__(self, name: str) -> float:
        """The value of a score."""
        return self.scores[name].value

    def to_json(self) -> str:
        """Everything, as an object."""
        scores = {
            name: {"value": score.value, "ci95": score.ci95 and list(score.ci95)}
            for name, score in self.scores.items()
        }
        return json.dumps({**self.__dict__, "scores": scores}, indent=1)

    def __str__(self) -> str:
        lines = [
            f"{self.sample_count} samples ({self.samples})",
            f"{self.reference_count} reference images ({self.reference})",
            f"{self.image_size[1]}x{self.image_size[0]} pixels",
        ]
        for name, score in self.scores.items():
            interval = ""
            if score.ci95 is not None:
                interval = f"  95 % {score.ci95.low:.6g} .. {score.ci95.high:.6g}"
            lines.append(f"{name:<44}{score.value:>12.6g}{interval}")
        return "\n".join(lines)


def evaluate(
    samples: Images,
    reference: Images,
    *,
    extractor: ExtractorSpec,
    metrics: Sequence[str] = ("fid", "precision_recall"),
    n: int | None = None,
    reference_n: int | None = None,
    split: str = "train",
    image_size: int | Sequence[int] | None = None,
    classes: str = "auto",
    value_range: Sequence[float] | None = None,
    alpha: str = "refuse",
    steps: Any = 50,
    sampler: str = "ddpm",
    eta: float = 0.0,
    variance: str | None = None,
    guidance_scale: float = 1.0,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    neighbours: Sequence[int] = (3, 5),
    resamples: int = 20,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Compares samples with a reference by the features of a network.

    Args:
        samples: a folder, zip, .npz (`arr_0`) or anything else that `open_data` reads; a tensor or
            an iterable of tensors [N, C, H, W], floating in [-1, 1] or uint8; a `UNet` or a name or
            file of `load`, which is sampled while features are extracted. Its classes take turns; if the
            reference has classes, only those of the same names.
        reference: the same; usually the training data.
        extractor: as in `open_extractor`; for FID's Inception a file that you have.
        metrics: any of "fid", "sfid", "kid", "inception_score", "precision_recall". With an extractor
            other than FID's Inception the first three are called fd, sfd and kd.
        n: how many samples; by default all, or 10,000 of a model. The paper uses 50,000.
        reference_n: how many reference images; all if None.
        split: "train" or "test", for data that has both.
        image_size: side, or (height, width), that images of files are resized and cropped to, as in training;
            None: the size of the model if one is sampled, else no change. The sizes of both sets must agree.
        classes, value_range, alpha: as in `open_data`, for both sets if they are paths.
        steps, sampler, eta, variance, guidance_scale, dtype, seed: as in `sample`, for a model.
        neighbours: the k of precision and recall, with real neighbourhoods of the first 10,000 reference
            images; "kid" compares with these too.
        resamples: number of random halves of the samples for the intervals; 0 for no intervals, so that
            feature vectors are stored for "kid" and "precision_recall" alone.
        batch_size: images at once.
        device: of the sampled model and of the extractor.
        cache: folder for the reference's statistics, .npz files; `iddpm_ext` in the user's cache
            folder if None, "" for none.
        progress: show a bar if stderr is a terminal.

    Returns:
        an `Evaluation`. Intervals are over the samples for a fixed reference (for recall: over the
        reference); see `half_sample_interval`. They do not include the bias of a Fréchet distance of few
        samples.

    Raises:
        ValueError, TypeError, FileNotFoundError, RuntimeError: for an argument that cannot be used.
    """
    n, reference_n, image_size, neighbours, resamples, batch_size = plain(
        (n, reference_n, image_size, neighbours, resamples, batch_size)
    )
    steps, eta, guidance_scale, seed = plain((steps, eta, guidance_scale, seed))
    _check(metrics, n, reference_n, neighbours, resamples, batch_size)
    size = None if image_size is None else checked_size("evaluate", image_size)
    began = time.perf_counter()
    network = open_extractor(extractor, device)
    how: dict[str, Any] = {
        "steps": steps, "sampler": sampler, "eta": eta, "variance": variance,
        "guidance_scale": guidance_scale, "dtype": dtype,
    }  # fmt: skip
    drawn, real = _open_both(
        samples, reference,
        (Recipe(n or 10_000, seed=seed, **how), n),
        (Recipe(reference_n or 10_000, seed=seed + 1, **how), reference_n),
        Reading(split, size, classes, None if value_range is None else tuple(value_range), alpha),
        batch_size, device,
    )  # fmt: skip
    others = {"kid", "precision_recall"} & set(metrics)
    b = cached_extract(real, network, keep=_KEPT, cache=_cache(cache), progress=progress)
    keep = None if others or resamples else 0
    a = extract(drawn, network, keep=keep, progress=progress)
    scores: dict[str, Score] = {}
    for metric in metrics:
        scores.update(_SCORES[metric](a, b, network, tuple(neighbours), resamples))
    return Evaluation(
        scores, drawn.what, a.count, real.what, b.count, network.name, drawn.size,
        round(time.perf_counter() - began, 1),
    )  # fmt: skip


def _open_both(
    samples: Images,
    reference: Images,
    of_samples: tuple[Recipe, int | None],
    of_reference: tuple[Recipe, int | None],
    reading: Reading,
    batch_size: int,
    device: torch.device | str,
) -> tuple[ImageSet, ImageSet]:
    """Both sets, with equal sizes. of_samples, of_reference: how to sample a model, and the most images."""
    given = {"samples": samples, "reference": reference}
    wanted = {"samples": of_samples, "reference": of_reference}
    sources: dict[str, Any] = {}
    # Models first: their size is that of the files.
    for name, images in sorted(given.items(), key=lambda pair: not is_model(pair[1])):
        sources[name] = open_source(name, images, reading, device)
        model = unwrapped(sources[name])
        if reading.image_size is None and isinstance(model, UNet):
            reading = replace(reading, image_size=model.config.image_size)
    sets = []
    for name, other in (("samples", "reference"), ("reference", "samples")):
        recipe, n = wanted[name]
        words = ""
        model = unwrapped(sources[name])
        if isinstance(model, UNet):
            chosen, words = model_classes(other, model, sources[other], name)
            recipe = replace(recipe, classes=chosen)
        found = open_images(
            name, given[name], sources[name], n=n, batch_size=batch_size, recipe=recipe,
            reading=reading,
        )  # fmt: skip
        sets.append(replace(found, what=found.what + words))
    drawn, real = sets
    if drawn.size != real.size:
        raise ValueError(
            "evaluate: samples and reference must have one size, or image_size say which files are "
            f"brought to, got {drawn.size[1]}x{drawn.size[0]} and {real.size[1]}x{real.size[0]}"
        )
    return drawn, real


def _named(metric: str, extractor: Extractor) -> str:
    """The metric's name for this extractor: FID only for FID's Inception, else FD."""
    if extractor.name != INCEPTION:
        metric = {"fid": "fd", "sfid": "sfd", "kid": "kd"}.get(metric, metric)
    return f"{metric}-{extractor.name}"


def _fid(
    a: FeatureSet, b: FeatureSet, extractor: Extractor, _: tuple[int, ...], resamples: int
) -> dict[str, Score]:
    # With fewer samples than dimensions, features are faster than their covariance.
    few = len(a.features) == a.count <= a.features.shape[1]
    value = frechet_distance(a.features if few else a.statistics, b.statistics)

    def of_half(half: Tensor) -> float:
        return frechet_distance(a.features[half], b.statistics)

    interval = _interval(value, a.count, of_half, resamples)
    return {_named("fid", extractor): Score(value, interval)}


def _sfid(
    a: FeatureSet, b: FeatureSet, extractor: Extractor, _: tuple[int, ...], resamples: int
) -> dict[str, Score]:
    if a.spatial is None or b.spatial is None:
        raise ValueError(
            "evaluate: metrics must be without 'sfid' where the extractor gives no spatial "
            f"features, got {extractor.name}"
        )
    # Its 2023 features per image are not stored, so there is no interval.
    return {_named("sfid", extractor): Score(frechet_distance(a.spatial, b.spatial), None)}


def _kid(
    a: FeatureSet, b: FeatureSet, extractor: Extractor, _: tuple[int, ...], resamples: int
) -> dict[str, Score]:
    value = kernel_distance(a.features, b.features).value

    def of_half(half: Tensor) -> float:
        return kernel_distance(a.features[half], b.features, subsets=10).value

    interval = _interval(value, a.count, of_half, resamples)
    return {_named("kid", extractor): Score(value, interval)}


def _inception_score(
    a: FeatureSet, b: FeatureSet, extractor: Extractor, _: tuple[int, ...], resamples: int
) -> dict[str, Score]:
    p = a.probabilities
    if p is None:
        raise ValueError(
            "evaluate: metrics must be without 'inception_score' where the extractor gives no "
            f"probabilities, got {extractor.name}"
        )
    splits = min(10, a.count)
    value = inception_score(p, splits=splits).value
    halves = min(splits, max(1, a.count // 2))

    def of_half(half: Tensor) -> float:
        return inception_score(p[half], splits=halves).value

    interval = _interval(value, a.count, of_half, resamples)
    return {_named("inception_score", extractor): Score(value, interval)}


def _precision_recall(
    a: FeatureSet, b: FeatureSet, extractor: Extractor, neighbours: tuple[int, ...], resamples: int
) -> dict[str, Score]:
    scores = {}
    for k in neighbours:
        precision = Neighbourhoods(b.features, k).contain(a.features)
        recall = Neighbourhoods(a.features, k).contain(b.features)
        for name, inside in ((f"precision_k{k}", precision), (f"recall_k{k}", recall)):
            share = float(inside.double().mean())
            interval = _share_interval(share, len(inside)) if resamples else None
            scores[_named(name, extractor)] = Score(share, interval)
    return scores


_SCORES = {
    "fid": _fid,
    "sfid": _sfid,
    "kid": _kid,
    "inception_score": _inception_score,
    "precision_recall": _precision_recall,
}


def _interval(value: float, count: int, of_half: Any, resamples: int) -> Interval | None:
    if resamples == 0 or count < 4:
        return None
    with warnings.catch_warnings():
        # The warning of few samples was given for the whole set, or does not matter for halves.
        warnings.simplefilter("ignore", UserWarning)
        return half_sample_interval(value, count, of_half, resamples=resamples)


def _share_interval(share: float, count: int) -> Interval:
    """Wilson's interval of a share of `count`."""
    z = 1.96
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count)
    reach *= math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Interval(max(0.0, centre - reach), min(1.0, centre + reach))


def _cache(given: str | os.PathLike[str] | None) -> Path | None:
    if given is not None:
        return Path(given) if os.fspath(given) else None
    folder = cache_folder()
    return None if folder is None else folder / "reference"


def _check(
    metrics: Sequence[str],
    n: int | None,
    reference_n: int | None,
    neighbours: Sequence[int],
    resamples: int,
    batch_size: int,
) -> None:
    unknown = [metric for metric in metrics if metric not in METRICS]
    if isinstance(metrics, str) or unknown or not metrics:
        raise ValueError(f"evaluate: metrics must be of {', '.join(METRICS)}, got {metrics!r}")
    checks = [("n", n, 2), ("reference_n", reference_n, 2), ("batch_size", batch_size, 1)]
    checks += [("neighbours", k, 1) for k in neighbours]
    for name, value, least in checks:
        if value is not None and not _is_int(value, least):
            raise ValueError(f"evaluate: {name} must be an int of at least {least}, got {value!r}")
    if resamples != 0 and not _is_int(resamples, 2):
        raise ValueError(
            f"evaluate: resamples must be 0 or an int of at least 2, got {resamples!r}"
        )


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least

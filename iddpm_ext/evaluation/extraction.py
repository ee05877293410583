"""Extracts features of an image set: accumulates moments, and stores features if a metric needs them."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from iddpm_ext.evaluation.extractors import Extractor
from iddpm_ext.evaluation.images import ImageSet
from iddpm_ext.files import write_whole
from iddpm_ext.metrics import FeatureStatistics, Moments

_FORMAT = 2


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """The features of one set of images.

    statistics: moments of all features. spatial: those of sFID's features, or None. features: [M, D] of the
    first M images. probabilities: float32 [N, K] of all, or None. count: N.
    """

    count: int
    statistics: FeatureStatistics
    spatial: FeatureStatistics | None
    features: Tensor
    probabilities: Tensor | None


def extract(
    images: ImageSet, extractor: Extractor, *, keep: int | None, progress: bool
) -> FeatureSet:
    """The features of a set, in one pass.

    keep: how many feature vectors to hold in memory; None for all.
    """
    from tqdm import tqdm

    moments, spatial = Moments(), Moments()
    kept: list[Tensor] = []
    probabilities: list[Tensor] = []
    count, with_spatial = 0, True
    with tqdm(
        total=images.count, desc=images.what, unit="image", leave=False,
        disable=None if progress else True,
    ) as bar:  # fmt: skip
        for batch in images:
            # Independent of the caller's autocast.
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                found = extractor(batch)
            features = found.features.cpu()
            moments.update(features)
            with_spatial = with_spatial and found.spatial is not None
            if found.spatial is not None:
                spatial.update(found.spatial.cpu())
            if keep is None or count < keep:
                kept.append(features[: None if keep is None else keep - count])
            if found.probabilities is not None:
                probabilities.append(found.probabilities.cpu().float())
            count += len(batch)
            bar.update(len(batch))
    if count < 2:
        raise ValueError(f"evaluate: {images.what} must have at least 2 images, got {count}")
    return FeatureSet(
        count,
        moments.statistics(),
        spatial.statistics() if with_spatial else None,
        torch.cat(kept)
        if kept
        else torch.empty((0, len(moments.statistics().mean)), dtype=torch.float64, device="cpu"),
        torch.cat(probabilities) if probabilities else None,
    )


def cached_extract(
    images: ImageSet, extractor: Extractor, *, keep: int, cache: Path | None, progress: bool
) -> FeatureSet:
    """`extract`, or its cached result for the same images, extractor and `keep`.

    cache: a folder of .npz files; nothing is cached if it is None, or the set or extractor has no
    fingerprint.
    Probabilities are not cached, since only samples need them. If the folder cannot be read or written, there
    is a warning, and nothing is cached.
    """
    if cache is None or not images.fingerprint or not extractor.fingerprint:
        return extract(images, extractor, keep=keep, progress=progress)
    key = json.dumps([_FORMAT, images.fingerprint, extractor.fingerprint, keep])
    # Shortened, since an extractor can have the name of a file, as long as the system allows.
    path = cache / f"{extractor.name[:50]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    try:
        if path.exists():
            return _read(path)
    except OSError as error:
        _warn_not_cached(path, error)
    found = extract(images, extractor, keep=keep, progress=progress)
    try:
        _write(path, found, json.dumps({"images": images.what, "extractor": extractor.name}))
    except OSError as error:
        _warn_not_cached(path, error)
    return found


def _warn_not_cached(path: Path, error: OSError) -> None:
    warnings.warn(
        f"evaluate: cache must be a folder that can be read and written, or '' for none, got {path.parent} "
        f"({error.strerror or error}): the reference's statistics are not kept",
        stacklevel=4,
    )


def _write(path: Path, found: FeatureSet, description: str) -> None:
    arrays = {
        "count": np.array(found.count),
        "mean": found.statistics.mean.numpy(),
        "covariance": found.statistics.covariance.numpy(),
        "features": found.features.numpy(),
        "description": np.array(description),
    }
    if found.spatial is not None:
        arrays["spatial_mean"] = found.spatial.mean.numpy()
        arrays["spatial_covariance"] = found.spatial.covariance.numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    write_whole(path, file.getvalue())


def _read(path: Path) -> FeatureSet:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files if name[0] != "d"}
        count = int(arrays["count"])
        spatial = None
        if "spatial_mean" in arrays:
            spatial = FeatureStatistics(arrays["spatial_mean"], arrays["spatial_covariance"], count)
        statistics = FeatureStatistics(arrays["mean"], arrays["covariance"], count)
        return FeatureSet(count, statistics, spatial, arrays["features"], None)
    except OSError:
        raise
    except Exception as error:  # zipfile, numpy and the keys each have their own
        raise ValueError(
            f"evaluate: cache must hold whole files, got {path}, which cannot be read ({error}): "
            "delete it"
        ) from error

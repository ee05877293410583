"""The Fréchet distance between two sets of features, each taken for a normal distribution."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from . import checks
from .checks import Features
from .statistics import FeatureStatistics, feature_statistics


def frechet_distance(a: Features | FeatureStatistics, b: Features | FeatureStatistics) -> float:
    """The squared Fréchet distance; with FID's Inception features it is FID.

        |mean_a - mean_b|^2 + tr C_a + tr C_b - 2 tr (C_a C_b)^(1/2)

    The last trace is the sum of the square roots of the eigenvalues of C_a C_b. With C = F F^T
    these roots are the singular values of F_a^T F_b, which neither overflow nor turn complex
    where a matrix square root would; F is the centred features themselves where they are fewer
    than their dimensions.

    Args:
        a, b: floating [N, D], N at least 2, or their `FeatureStatistics`. With N <= D a
            covariance is singular and the distance biased upwards: a warning says so.

    Returns:
        the distance, 0 or more.

    Raises:
        TypeError, ValueError: for an argument of a wrong type, shape or value.

    Source: Heusel et al. 2017, equation 6; Dowson & Landau 1982.
    """
    (mean_a, factor_a), (mean_b, factor_b) = _factored("a", a), _factored("b", b)
    checks.pair("frechet_distance", a=mean_a, b=mean_b)
    factor_b = factor_b.to(factor_a.device)
    overlap = torch.linalg.svdvals(factor_a.T @ factor_b).sum()
    # The trace of F F^T is the sum of its squares.
    spread = factor_a.square().sum() + factor_b.square().sum()
    distance = (mean_a - mean_b.to(mean_a.device)).square().sum() + spread - 2 * overlap
    return max(0.0, float(distance))


def _factored(name: str, value: Features | FeatureStatistics) -> tuple[Tensor, Tensor]:
    """The mean [D], and F [D, r] with F F^T the covariance."""
    if isinstance(value, FeatureStatistics):
        _warn_if_few(name, value.count, len(value.mean))
        return value.mean, _factor(value.covariance)
    x = checks.features("frechet_distance", name, value, least=2)
    _warn_if_few(name, *x.shape)
    if len(x) > x.shape[1]:
        statistics = feature_statistics(x)
        return statistics.mean, _factor(statistics.covariance)
    mean = x.mean(0)
    return mean, (x - mean).T / (len(x) - 1) ** 0.5


def _factor(covariance: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(covariance.double())
    return vectors * eigenvalues.clamp(min=0).sqrt()


def _warn_if_few(name: str, count: int, dimensions: int) -> None:
    if count <= dimensions:
        warnings.warn(
            f"frechet_distance: {name} has {count} samples of {dimensions} features: its "
            "covariance is singular, and only the order of such distances means anything",
            stacklevel=4,
        )

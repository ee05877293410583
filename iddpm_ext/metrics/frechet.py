"""The Fréchet distance between the normal distributions of two sets of features."""

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

    The last trace is the sum of the square roots of the eigenvalues of C_a C_b. With C_b = F F^T these are
    the eigenvalues of the symmetric F^T C_a F, and therefore real, unlike those of a numerical matrix
    square root.
    If there are fewer samples than dimensions, F is the matrix of centred features, which is cheaper.

    Args:
        a, b: floating [N, D], N at least 2, or their `FeatureStatistics`. With N <= D a
            covariance is singular and the distance biased upwards: a warning says so.

    Returns:
        the distance, 0 or more.

    Raises:
        TypeError, ValueError: for an argument of a wrong type, shape or value.

    Source: Heusel et al. 2017, equation 6; Dowson & Landau 1982.
    """
    first, second = _Normal.of("a", a), _Normal.of("b", b)
    checks.pair("frechet_distance", a=first.mean, b=second.mean)
    if first.rank < second.rank:
        first, second = second, first
    factor = second.factor.to(first.mean.device)
    eigenvalues = torch.linalg.eigvalsh(first.between(factor))
    # Eigenvalues below this are rounding errors, whose square roots would add up.
    floor = eigenvalues[-1:].clamp(min=0) * len(eigenvalues) * torch.finfo(torch.float64).eps
    overlap = eigenvalues.where(eigenvalues > floor, 0).sqrt().sum()
    shift = (first.mean - second.mean.to(first.mean.device)).square().sum()
    return max(0.0, float(shift + first.trace + second.trace - 2 * overlap))


class _Normal:
    """A mean [D] and a covariance, stored as a matrix or, if smaller, as centred features."""

    def __init__(self, mean: Tensor, rows: Tensor | None, whole: FeatureStatistics | None) -> None:
        self.mean, self._rows, self._whole = mean, rows, whole
        self.rank = len(mean) if rows is None else len(rows)

    @classmethod
    def of(cls, name: str, value: Features | FeatureStatistics) -> _Normal:
        if isinstance(value, FeatureStatistics):
            _warn_if_few(name, value.count, len(value.mean))
            return cls(value.mean, None, value)
        x = checks.features("frechet_distance", name, value, least=2)
        _warn_if_few(name, *x.shape)
        if len(x) > x.shape[1]:
            whole = feature_statistics(x)
            return cls(whole.mean, None, whole)
        mean = x.mean(0)
        return cls(mean, (x - mean) / (len(x) - 1) ** 0.5, None)

    @property
    def factor(self) -> Tensor:
        """F [D, r] with F F^T the covariance."""
        if self._rows is not None:
            return self._rows.T
        assert self._whole is not None
        return self._whole.factor

    @property
    def trace(self) -> Tensor:
        """The trace of the covariance."""
        if self._rows is not None:
            return self._rows.square().sum()
        assert self._whole is not None
        return self._whole.covariance.diagonal().sum()

    def between(self, factor: Tensor) -> Tensor:
        """F^T C F [r, r], for a factor F [D, r] of the other covariance."""
        if self._rows is not None:
            product = self._rows @ factor
            return product.T @ product
        assert self._whole is not None
        return factor.T @ self._whole.covariance.double() @ factor


def _warn_if_few(name: str, count: int, dimensions: int) -> None:
    if count <= dimensions:
        warnings.warn(
            f"frechet_distance: {name} has {count} samples of {dimensions} features: its "
            "covariance is singular, and only the order of such distances means anything",
            stacklevel=4,
        )

"""Mean and covariance of features, of a whole array or accumulated batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import checks
from .checks import Features


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """The moments of n feature vectors.

    mean: float64 [D]. covariance: float64 [D, D], with n - 1. count: n, at least 2.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    @cached_property
    def factor(self) -> Tensor:
        """F [D, D] with F F^T the covariance; cached, since a reference is compared with many sets."""
        eigenvalues, vectors = torch.linalg.eigh(self.covariance.double())
        return vectors * eigenvalues.clamp(min=0).sqrt()


class Moments:
    """Mean and covariance accumulated batch by batch, in float64, about the running mean.

    Uses the pairwise update of Chan, Golub & LeVeque 1983, which does not cancel like E[x^2] - E[x]^2. Needs
    D^2 numbers, however many samples there are.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean = torch.empty(0, dtype=torch.float64, device="cpu")
        self._scatter = torch.empty((0, 0), dtype=torch.float64, device="cpu")

    def update(self, features: Features) -> None:
        """Adds feature vectors, floating [N, D]."""
        x = checks.features("Moments.update", "features", features)
        n, mean = len(x), x.mean(0)
        centred = x - mean
        if self._count == 0:
            self._count, self._mean, self._scatter = n, mean, centred.T @ centred
            return
        checks.pair("Moments.update", features=x, earlier=self._mean)
        total, shift = self._count + n, mean - self._mean
        self._scatter += centred.T @ centred
        self._scatter += torch.outer(shift, shift) * (self._count * n / total)
        self._mean = self._mean + shift * (n / total)
        self._count = total

    def statistics(self) -> FeatureStatistics:
        """The moments of everything added; ValueError before there are two vectors."""
        if self._count < 2:
            raise ValueError(f"Moments: features must be at least 2 vectors, got {self._count}")
        return FeatureStatistics(self._mean, self._scatter / (self._count - 1), self._count)


def feature_statistics(features: Features) -> FeatureStatistics:
    """Mean and covariance of features, floating [N, D] with N of at least 2."""
    moments = Moments()
    moments.update(features)
    return moments.statistics()

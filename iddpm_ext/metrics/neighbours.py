"""Precision and recall by neighbourhoods of feature vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from iddpm_ext.scalars import plain

from . import checks
from .checks import Features

_ROWS = 1024  # of distances held at once


class PrecisionRecall(NamedTuple):
    """Shares from 0 to 1: of generated images that look real, of real ones that could be generated."""

    precision: float
    recall: float


class Neighbourhoods:
    """Balls around feature vectors; the radius is the distance to the k-th nearest other vector of the set.

    features: floating [N, D], N above k. k: at least 1.
    """

    def __init__(self, features: Features, k: int = 3) -> None:
        k = plain(k)
        checks.positive("Neighbourhoods", "k", k)
        self._features = checks.features("Neighbourhoods", "features", features, least=k + 1)
        # Every vector is its own nearest neighbour, at distance 0.
        blocks = _squared_distances(self._features, self._features)
        self._squared_radii = torch.cat([part.kthvalue(k + 1, dim=1).values for part in blocks])

    def contain(self, features: Features) -> Tensor:
        """Which of some vectors, floating [M, D], lie in at least one neighbourhood: bool [M]."""
        x = checks.features("Neighbourhoods.contain", "features", features)
        checks.pair("Neighbourhoods.contain", features=x, members=self._features)
        x = x.to(self._features.device)
        blocks = _squared_distances(x, self._features)
        return torch.cat([(part <= self._squared_radii).any(1) for part in blocks])


def precision_recall(real: Features, generated: Features, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall by k nearest neighbours.

    precision: the share of generated vectors within the distance of some real vector to its k-th
    nearest real neighbour; recall: the same with the two sets exchanged. Both depend on the numbers of
    vectors; the original evaluator uses 10,000 real ones and k = 3.

    Args:
        real, generated: floating [N, D], more than k each.
        k: which neighbour gives the radius.

    Raises:
        TypeError, ValueError: for an argument of a wrong type, shape or value.

    Source: Kynkäänniemi et al. 2019, equations 1 and 2.
    """
    k = plain(k)
    checks.positive("precision_recall", "k", k)
    x = checks.features("precision_recall", "real", real, least=k + 1)
    y = checks.features("precision_recall", "generated", generated, least=k + 1).to(x.device)
    checks.pair("precision_recall", real=x, generated=y)
    precision = Neighbourhoods(x, k).contain(y).double().mean()
    recall = Neighbourhoods(y, k).contain(x).double().mean()
    return PrecisionRecall(float(precision), float(recall))


def _squared_distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Squared distances of x's rows to all of y, some rows at a time.

    By |x|^2 + |y|^2 - 2 x.y, which has rounding errors for equal vectors: squares below 1e-12 of those of the
    vectors are set to 0, so that copies are at distance 0.
    """
    centre = y.mean(0)
    y = y - centre
    y_squares = y.square().sum(1)
    for rows in x.split(_ROWS):
        rows = rows - centre
        scale = rows.square().sum(1, keepdim=True) + y_squares
        squares = scale - 2 * rows @ y.T
        yield squares.where(squares > 1e-12 * scale, 0)

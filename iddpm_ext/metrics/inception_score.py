"""The Inception Score of a classifier's probabilities."""

from __future__ import annotations

from typing import NamedTuple

import torch

from iddpm_ext.scalars import plain

from . import checks
from .checks import Features


class InceptionScore(NamedTuple):
    """The mean over the splits, and their standard deviation."""

    value: float
    deviation: float


def inception_score(probabilities: Features, *, splits: int = 10, seed: int = 0) -> InceptionScore:
    """exp of the mean over images of KL(p(y | x) || p(y)), where p(y) is the mean over a split.

    Args:
        probabilities: floating [N, K], each row a distribution.
        splits: number of parts of (nearly) equal size, each of which has one score.
        seed: of the order in which the images are split.

    Returns:
        mean and standard deviation over the splits, from 1 to K.

    Raises:
        TypeError, ValueError: for an argument of a wrong type, shape or value.

    Source: Salimans et al. 2016, section 4.
    """
    splits, seed = plain((splits, seed))
    checks.positive("inception_score", "splits", splits)
    p = checks.features("inception_score", "probabilities", probabilities, least=splits)
    if bool((p < 0).any()) or bool(((p.sum(1) - 1).abs() > 1e-3).any()):
        raise ValueError("inception_score: probabilities must be rows of sum 1, got others")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    order = torch.randperm(len(p), generator=generator, dtype=torch.int64, device="cpu").to(
        p.device
    )
    scores = []
    for part in p[order].tensor_split(splits):
        marginal = part.mean(0)
        # xlogy: classes of probability 0 contribute 0.
        divergence = torch.special.xlogy(part, part) - torch.special.xlogy(part, marginal)
        scores.append(float(divergence.sum(1).mean().exp()))
    each = torch.tensor(scores, dtype=torch.float64, device="cpu")
    return InceptionScore(float(each.mean()), float(each.std(correction=0)))

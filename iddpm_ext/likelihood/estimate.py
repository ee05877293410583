"""The mean bound and its confidence intervals, from evaluated terms."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from iddpm_ext.likelihood.design import Design


class Estimate(NamedTuple):
    """mean; ci95, over steps and noise for these images; population_ci95, over images; per_image [N]."""

    mean: float
    ci95: tuple[float, float]
    population_ci95: tuple[float, float]
    per_image: Tensor


def estimate(design: Design, terms: Tensor, prior: Tensor) -> Estimate:
    """The bound of the images in bits/dim, with 95 % intervals.

    terms: [N, M] of the design. prior: [N].

    ci95 is that of Student's distribution, with Satterthwaite's degrees of freedom for a sum of variances
    with one degree each. Without pairs (M = 1) it uses the variance between images, which is larger.
    """
    values = design.scale * terms.double()
    per_image = values.sum(1) + prior.double()
    count, mean = len(per_image), float(per_image.mean())
    nothing = (math.nan, math.nan)
    population = nothing
    if count > 1:
        error = float(per_image.std()) / math.sqrt(count)
        population = interval(mean, error, count - 1)
    if values.shape[1] == 1:
        return Estimate(mean, population, population, per_image)
    squares = (values[:, 0::2] - values[:, 1::2]).square()
    total = float(squares.sum())
    # E[v^2] = 3 V^2 for a normal difference; the correction gives a single pair one degree of freedom.
    freedom = 3 * total**2 / max(float(squares.square().sum()), 1e-300) - 2 if total else math.inf
    error = math.sqrt(total) / count
    return Estimate(mean, interval(mean, error, max(1.0, freedom)), population, per_image)


def interval(mean: float, error: float, freedom: float) -> tuple[float, float]:
    """The central 95 % interval of a mean with this standard error."""
    half = student_quantile(0.975, freedom) * error
    return mean - half, mean + half


def student_quantile(probability: float, freedom: float) -> float:
    """The quantile of Student's t distribution, for probabilities above 1/2; to 1e-4.

    With t = sqrt(nu) tan(a), P(|T| < t) is the integral of cos^(nu - 1) to a over that to pi / 2.
    """
    if freedom > 1e4:
        twice = torch.tensor(2 * probability - 1.0, dtype=torch.float64, device="cpu")
        return math.sqrt(2) * float(torch.erfinv(twice))
    edges = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64, device="cpu")
    mass = ((edges[1:] + edges[:-1]) / 2).cos().pow(freedom - 1).cumsum(0)
    wanted = (2 * probability - 1) * float(mass[-1])
    angle = np.interp(wanted, mass.numpy(), edges[1:].numpy())
    return math.sqrt(freedom) * math.tan(angle)

"""How far a metric would move with other samples."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from iddpm_ext.scalars import plain

from . import checks


class Interval(NamedTuple):
    """A 95 % interval, its ends in order."""

    low: float
    high: float


def half_sample_interval(
    value: float,
    count: int,
    metric: Callable[[Tensor], float],
    *,
    resamples: int = 20,
    seed: int = 0,
) -> Interval:
    """value +- 1.96 standard deviations of the metric over random halves of the samples.

    The halves are drawn without replacement: the bootstrap's repeated samples would shrink a
    covariance's rank, put neighbours at distance 0 and add k(x, x) to a kernel's mean. A half has
    twice the variance of the whole set, and what the halves share takes half of that away again
    (the delete-half jackknife). Only what varies is seen: a bias that depends on the number of
    samples, such as the Fréchet distance's, moves all halves alike.

    Args:
        value: the metric of all samples.
        count: how many there are, at least 4.
        metric: from int64 [count // 2], which samples, to the metric of these.
        resamples: how many halves.
        seed: names them.

    Source: Shao & Wu 1989.
    """
    value, count, resamples, seed = plain((value, count, resamples, seed))
    checks.positive("half_sample_interval", "count", count, least=4)
    checks.positive("half_sample_interval", "resamples", resamples, least=2)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    values = []
    for _ in range(resamples):
        order = torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu")
        values.append(metric(order[: count // 2]))
    reach = 1.96 * statistics.stdev(values)
    return Interval(value - reach, value + reach)

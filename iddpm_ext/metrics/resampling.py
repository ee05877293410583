"""Confidence intervals of metrics, by resampling."""

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

    The halves are drawn without replacement: repeated samples, as in the bootstrap, would reduce a
    covariance's rank, put neighbours at distance 0 and add k(x, x) to a kernel's mean. The variance over a
    half is twice that over the whole set, and the overlap of the halves cancels that factor (delete-half
    jackknife). A bias that depends on the number of samples, such as the Fréchet distance's, is not included.

    Args:
        value: the metric of all samples.
        count: how many there are, at least 4.
        metric: indices of samples, int64 [count // 2] -> the metric of these.
        resamples: how many halves.
        seed: of their choice.

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

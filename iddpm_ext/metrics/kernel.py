"""The kernel distance (with FID's Inception features: KID): an unbiased squared MMD."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from iddpm_ext.scalars import plain

from . import checks
from .checks import Features


class KernelDistance(NamedTuple):
    """The mean over the subsets, which may be a little below 0, and their standard deviation."""

    value: float
    deviation: float


def kernel_distance(
    a: Features,
    b: Features,
    *,
    subsets: int = 100,
    subset_size: int | None = None,
    seed: int = 0,
) -> KernelDistance:
    """The squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, without bias.

        mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j)

    averaged over random subsets, as is usual for KID. Unlike the Fréchet distance it is unbiased for any
    number of samples.

    Args:
        a, b: floating [N, D], N at least 2.
        subsets: how many to average.
        subset_size: samples in each; the smaller of 1000 and both N if None.
        seed: of the choice of subsets.

    Returns:
        mean and standard deviation over the subsets (0 if each is the whole set).

    Raises:
        TypeError, ValueError: for an argument of a wrong type, shape or value.

    Source: Bińkowski et al. 2018, section 4.
    """
    subsets, subset_size, seed = plain((subsets, subset_size, seed))
    x = checks.features("kernel_distance", "a", a, least=2)
    y = checks.features("kernel_distance", "b", b, least=2).to(x.device)
    checks.pair("kernel_distance", a=x, b=y)
    checks.positive("kernel_distance", "subsets", subsets)
    if subset_size is None:
        subset_size = min(1000, len(x), len(y))
    checks.positive("kernel_distance", "subset_size", subset_size, least=2)
    if subset_size > min(len(x), len(y)):
        raise ValueError(
            f"kernel_distance: subset_size must be at most {min(len(x), len(y))}, got {subset_size}"
        )
    generator = torch.Generator(device="cpu").manual_seed(seed)
    values = [
        squared_mmd(*(_subset(features, subset_size, generator) for features in (x, y)))
        for _ in range(subsets)
    ]
    each = torch.tensor(values, dtype=torch.float64, device="cpu")
    return KernelDistance(float(each.mean()), float(each.std(correction=0)))


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate from all of x [N, D] and y [M, D], float64."""
    within_x, within_y = (_kernel(z, z).fill_diagonal_(0) for z in (x, y))
    n, m = len(x), len(y)
    within = within_x.sum() / (n * (n - 1)) + within_y.sum() / (m * (m - 1))
    return float(within - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _subset(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    if size == len(x):
        return x
    order = torch.randperm(len(x), generator=generator, dtype=torch.int64, device="cpu")
    return x[order[:size].to(x.device)]

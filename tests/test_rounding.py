"""The bounds of `rounding.py` hold for any order of additions, and little more."""

from __future__ import annotations

import pytest
import rounding
import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm_ext.engines.cpu.pack import POINTS, filter_transform


def one_by_one(products: Tensor) -> Tensor:
    total = torch.zeros_like(products[..., 0])
    for i in range(products.shape[-1]):
        total = total + products[..., i]
    return total


def by_pairs(products: Tensor) -> Tensor:
    while products.shape[-1] > 1:
        products = F.pad(products, (0, products.shape[-1] % 2))
        products = products[..., ::2] + products[..., 1::2]
    return products[..., 0]


@pytest.mark.parametrize("order", [one_by_one, by_pairs, lambda products: products.sum(-1)])
@pytest.mark.parametrize("terms", [33, 600, 4000])
def test_no_order_of_a_sum_errs_by_more(order, terms):
    generator = torch.Generator().manual_seed(terms)
    a, b = (torch.randn(500, terms, generator=generator) for _ in range(2))
    exact = (a.double() * b.double()).sum(-1)
    worst = float((order(a * b) - exact).abs().max() / exact.abs().max())
    assert worst < rounding.of_sums(terms)
    if order is one_by_one:
        assert worst > rounding.of_sums(terms) / 10


@pytest.mark.parametrize("tile", [2, 4])
def test_the_amplification_is_that_of_the_transforms(tile):
    """By the spread of what is added for random filters and images, in one dimension, squared."""
    generator = torch.Generator().manual_seed(0)
    g = filter_transform(tile)
    back = torch.tensor([[p**i for p in POINTS[tile]] for i in range(tile)], dtype=torch.float64)
    back = torch.cat([back, torch.zeros(tile, 1, dtype=torch.float64)], 1)
    back[-1, -1] = 1
    # B^T is what makes it the convolution: solved for, from d = unit vectors and filters.
    forth = []
    for d in torch.eye(tile + 2, dtype=torch.float64):
        wanted = d.unfold(0, 3, 1)  # [tile, 3]: outputs of the three unit filters
        system = torch.einsum("ip,pa->iap", back, g).flatten(0, 1)
        forth.append(torch.linalg.lstsq(system, wanted.flatten()[:, None]).solution[:, 0])
    f = torch.randn(20_000, 3, generator=generator, dtype=torch.float64) @ g.T
    d = torch.randn(20_000, tile + 2, generator=generator, dtype=torch.float64) @ torch.stack(forth)
    spread = (f * d)[:, None].mul(back).square().sum(-1).mean(0) / 3
    assert float(spread.max()) == pytest.approx(rounding.amplification(tile), rel=0.05)

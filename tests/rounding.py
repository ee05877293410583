"""Bounds of float32's rounding that no processor enters: of any order of the additions.

They are derived from what is compared: how many numbers are added, and how these spread. The terms are
taken for independent and centred, as random inputs make them: a partial sum then spreads no more than the
whole, and each of n additions rounds it by half an eps at most, so that the errors spread by at most
eps / 2 sqrt(n) of what the results do. The largest of many errors, over the largest of as many results,
stays below twice that, since both are normal.
"""

from __future__ import annotations

import math

import torch

from iddpm_ext.engines.cpu.pack import POINTS

EPS = torch.finfo(torch.float32).eps


def of_sums(terms: int) -> float:
    """Of sums of so many products in float32: max over max, and so norm over norm."""
    return EPS * math.sqrt(terms)


def of_winograd(tile: int, channels: int) -> float:
    """Of convolutions 3x3 by F(tile x tile, 3x3): sums over channels between two transforms."""
    return amplification(tile) * of_sums(channels + 2 * (tile + 2))


def amplification(tile: int) -> float:
    """How much further than its result the terms of F(tile x tile, 3x3) spread, for inputs of spread one.

    With a, g and b the sums of squares in a row of A^T, G and B^T of one dimension, point p, output i:
    sum_p a_ip^2 g_p b_p / 3, squared for two dimensions and under a root; of the worst output.
    """
    points = POINTS[tile]
    whole = [1.0]
    for p in points:
        whole = _times(whole, p)
    spread = []
    for p in points:
        row, norm = [1.0], 1.0
        for q in points:
            if q != p:
                row, norm = _times(row, q), norm * (p - q)
        spread.append((1 + p**2 + p**4) / norm**2 * _square(row))
    return max(
        sum(p ** (2 * i) * s for p, s in zip(points, spread, strict=True))
        + (_square(whole) if i == tile - 1 else 0)
        for i in range(tile)
    ) / 3  # fmt: skip


def of_attention(largest_score: float, width: int, tokens: int) -> float:
    """Of softmax(scores) v: a score's error moves its weight by as much, exp rounds twice, then sums."""
    return of_sums(width) * largest_score + 2 * EPS + of_sums(tokens)


def _times(coefficients: list[float], root: float) -> list[float]:
    """Of a polynomial, lowest first, times (x - root)."""
    shifted, scaled = [0.0, *coefficients], [-root * c for c in coefficients] + [0.0]
    return [a + b for a, b in zip(shifted, scaled, strict=True)]


def _square(row: list[float]) -> float:
    return sum(c * c for c in row)

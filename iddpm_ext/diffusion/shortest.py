"""Optimal schedules of every length, by dynamic programming over the terms of single jumps."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class JumpTerms(NamedTuple):
    """Mean terms in bits/dim of G candidate steps, ascending, c_0 < c_1 < ...

    jumps: float64 [G, G], entry (i, j) for j < i is L(c_i -> c_j). decoders: float64 [G, G], entry (i, k) for
    k > i is -log p(x_0 | x_t) at t = c_i in a chain whose second step is c_k. priors: float64 [G], L_T of a
    chain that ends at c_i.
    """

    jumps: Tensor
    decoders: Tensor
    priors: Tensor

    def bound(self, path: list[int]) -> float:
        """The bound of the chain that visits these candidates, ascending, two or more."""
        total = float(self.decoders[path[0], path[1]] + self.priors[path[-1]])
        return total + sum(float(self.jumps[b, a]) for a, b in pairwise(path))


def shortest_paths(terms: JumpTerms, most: int) -> dict[int, list[int]]:
    """For every K from 2 to `most`, the K candidates with the lowest bound, as ascending indices.

        B_2(i) = min_j decoders(j, i) + jumps(i, j),  B_K(i) = min_j B_{K-1}(j) + jumps(i, j),

    and the bound of K steps is min_i B_K(i) + priors(i). Exact over the candidates.

    Source: Watson et al. 2021, "Learning to Efficiently Sample from Diffusion Probabilistic Models".
    """
    count = len(terms.priors)
    earlier = torch.ones(count, count, dtype=torch.bool, device="cpu").tril(-1)
    jumps = terms.jumps.masked_fill(~earlier, torch.inf)
    best, origin = (jumps + terms.decoders.T.masked_fill(~earlier, torch.inf)).min(1)
    origins, paths = [origin], {}
    for steps in range(2, min(most, count) + 1):
        if steps > 2:
            best, origin = (best + jumps).min(1)
            origins.append(origin)
        at = int((best + terms.priors).argmin())
        path = [at]
        for before in reversed(origins):
            at = int(before[at])
            path.append(at)
        paths[steps] = path[::-1]
    return paths

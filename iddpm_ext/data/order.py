"""The order in which a run sees its images: a pure function of the seed and the position."""

from __future__ import annotations

import torch
from torch import Tensor

from iddpm_ext.random import STREAM_CHOICE, NoiseKey, words
from iddpm_ext.scalars import plain

_ORDER_DRAW = 1


class Order:
    """Endless passes over `count` images, each pass in its own random order.

    `at(positions)` returns the image at each position, the number of images before it since the start of the
    run. So that number is all that a resumed run needs.
    """

    def __init__(self, count: int, seed: int):
        count, seed = plain((count, seed))
        if count < 1:
            raise ValueError(f"Order: count must be at least 1, got {count}")
        self.count, self.seed = count, seed
        self._passes: dict[int, Tensor] = {}

    def at(self, positions: Tensor) -> Tensor:
        """positions: int64 [N], at least 0. Returns the image indices, int64 [N]."""
        passes = positions // self.count
        indices = torch.empty_like(positions)
        for number in passes.unique().tolist():
            chosen = passes == number
            indices[chosen] = self._pass(number)[positions[chosen] % self.count]
        return indices

    def _pass(self, number: int) -> Tensor:
        if number not in self._passes:
            places = torch.arange(self.count, dtype=torch.int64, device="cpu")
            key = NoiseKey(self.seed, STREAM_CHOICE, places, number, _ORDER_DRAW)
            # 63 bits, so that ties, which favour the lower index, do not occur in practice.
            pair = words(key, (self.count, 2), "cpu")
            keys = (pair[:, 0] << 31) ^ pair[:, 1]
            kept = {n: p for n, p in self._passes.items() if n == number - 1}
            self._passes = {**kept, number: keys.argsort(stable=True)}
        return self._passes[number]

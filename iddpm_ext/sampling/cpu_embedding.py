"""The timestep path of the CPU engine: every block's embedding projection, computed ahead.

In a sampler the timesteps are known before the first step, so all projections of a schedule are one
matrix product. The path up to the projection is float64: it costs nothing and is exact in t.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm_ext.unet import ResBlock, UNet, timestep_embedding

_TABLE_BYTES = 256 << 20  # a larger table is made step by step


class Projections:
    """The embedding projections of all residual blocks, side by side in the order of the plan."""

    def __init__(self, model: UNet):
        layers_of_t: Any = model.time_embed
        self._time_embed = layers_of_t[0], layers_of_t[2]
        self._width = model.config.model_channels
        self._labels = None if model.config.num_classes is None else model.label_emb
        blocks: list[Any] = [*model.input_blocks, model.middle_block, *model.output_blocks]
        layers: list[Any] = [m.emb_layers[1] for b in blocks for m in b if isinstance(m, ResBlock)]
        self.weight = torch.cat([layer.weight.detach().float() for layer in layers])
        self.bias = torch.cat([layer.bias.detach().float() for layer in layers])
        self.floats = self.weight.shape[0]

    def __call__(self, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        """timesteps [R], labels [R] or None -> float32 [R, floats]."""
        with torch.no_grad():
            first, second = self._time_embed
            h = timestep_embedding(timesteps.double(), self._width)
            h = F.silu(F.linear(h, first.weight.double(), first.bias.double()))
            h = F.linear(h, second.weight.double(), second.bias.double())
            if labels is not None and self._labels is not None:
                rows = self._labels.weight[labels.clamp(min=0)].double()
                h = h + rows * (labels >= 0)[:, None]
            return F.linear(F.silu(h).float(), self.weight, self.bias)


class Schedule:
    """Projections of all steps of a schedule and all labels of a batch, and where each sample's are."""

    def __init__(self, project: Projections, timesteps: Tensor, labels: Tensor | None):
        self.timesteps, self.labels = timesteps, labels
        self._project = project
        self._distinct: Tensor | None = None
        self._which = torch.zeros(1, dtype=torch.int64)
        if labels is not None:
            self._distinct, self._which = labels.unique(return_inverse=True)
        self._per_step = 1 if self._distinct is None else self._distinct.numel()
        self._table: Tensor | None = None
        self._step = -1
        if 4 * len(timesteps) * self._per_step * project.floats <= _TABLE_BYTES:
            self._table = self._rows(timesteps)

    def _rows(self, timesteps: Tensor) -> Tensor:
        labels = None
        if self._distinct is not None:
            labels = self._distinct.repeat(len(timesteps))
        return self._project(timesteps.repeat_interleave(self._per_step), labels)

    def rows(self, step: int, n: int) -> tuple[Tensor, Tensor]:
        """(table, offset in floats of each of n samples' rows in it) of one step."""
        first = step * self._per_step
        if self._table is None or self._step >= 0:
            if self._step != step:
                self._table, self._step = self._rows(self.timesteps[step : step + 1]), step
            first = 0
        which = self._which[:n] if self.labels is not None else self._which.expand(n)
        assert self._table is not None
        return self._table, (which + first) * self._project.floats

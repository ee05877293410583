"""The timestep path of the engines: every block's embedding projection, computed in advance.

A sampler knows its timesteps before the first step, so all projections of a schedule are one matrix
product. The path up to the projection is float64, which costs next to nothing here and resolves every t.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm_ext.engines.base import undisturbed
from iddpm_ext.networks.unet import ResBlock, UNet, timestep_embedding

_TABLE_BYTES = 256 << 20  # larger tables are computed step by step


class Projections:
    """The embedding projections of all residual blocks, side by side in the network's order.

    Holds copies of the model's present weights, and computes on its device.
    """

    def __init__(self, model: UNet):
        layers_of_t: Any = model.time_embed
        self._time_embed = [
            (layer.weight.detach().double().clone(), layer.bias.detach().double().clone())
            for layer in (layers_of_t[0], layers_of_t[2])
        ]
        self._width = model.config.model_channels
        labels: Any = None if model.config.num_classes is None else model.label_emb
        self._labels = None if labels is None else labels.weight.detach().clone()
        blocks: list[Any] = [*model.input_blocks, model.middle_block, *model.output_blocks]
        layers: list[Any] = [m.emb_layers[1] for b in blocks for m in b if isinstance(m, ResBlock)]
        self.weight = torch.cat([layer.weight.detach().float() for layer in layers])
        self.bias = torch.cat([layer.bias.detach().float() for layer in layers])
        self.floats = self.weight.shape[0]
        self.device = self.weight.device

    def __call__(self, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        """timesteps [R], labels [R] or None -> float32 [R, floats]."""
        with undisturbed(self.device.type):
            first, second = self._time_embed
            h = timestep_embedding(timesteps.double(), self._width)
            h = F.linear(F.silu(F.linear(h, *first)), *second)
            if labels is not None and self._labels is not None:
                rows = self._labels[labels.clamp(min=0)].double()
                h = h + rows * (labels >= 0)[:, None]
            return F.linear(F.silu(h).float(), self.weight, self.bias)


class Schedule:
    """The projections of all steps of a schedule for all labels of a batch, and the row of each sample.

    timesteps: [S]. labels: int64 [N], -1 for none; None for an unconditional network.
    """

    def __init__(self, project: Projections, timesteps: Tensor, labels: Tensor | None):
        self.timesteps, self.labels = timesteps, labels
        self._project = project
        self._distinct: Tensor | None = None
        #: the row of each sample among those of one step, int64 [N], or [1] where all share one
        self.which = torch.zeros(1, dtype=torch.int64, device=project.device)
        if labels is not None:
            self._distinct, self.which = labels.unique(return_inverse=True)
        self.rows_a_step = 1 if self._distinct is None else self._distinct.numel()
        self._whole: Tensor | None = None
        self._single: tuple[int, Tensor] | None = None
        if 4 * len(timesteps) * self.rows_a_step * project.floats <= _TABLE_BYTES:
            self._whole = self.block(0, len(timesteps))

    def block(self, first: int, last: int) -> Tensor:
        """The projections of the steps from first to last - 1, float32 [steps * rows_a_step, floats]."""
        if self._whole is not None:
            return self._whole[first * self.rows_a_step : last * self.rows_a_step]
        labels = None
        if self._distinct is not None:
            labels = self._distinct.repeat(last - first)
        timesteps = self.timesteps[first:last].repeat_interleave(self.rows_a_step)
        return self._project(timesteps, labels)

    def rows(self, step: int, n: int) -> tuple[Tensor, Tensor]:
        """The table of projections, and the row of each of n samples in it, for one step."""
        which = self.which[:n] if self.labels is not None else self.which.expand(n)
        if self._whole is not None:
            return self._whole, which + step * self.rows_a_step
        single = self._single  # read once: another thread may replace it
        if single is None or single[0] != step:
            self._single = single = step, self.block(step, step + 1)
        return single[1], which

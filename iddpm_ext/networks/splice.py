"""Two networks as one: one for both ends of the chain, the other in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from iddpm_ext.diffusion import Diffusion
from iddpm_ext.networks.config import UNetConfig
from iddpm_ext.networks.unet import UNet
from iddpm_ext.scalars import plain

_SHARED = ("image_size", "in_channels", "out_channels", "num_classes", "super_resolution")


class Splice(nn.Module):
    """Evaluates one network at both ends of the training chain and another one in between.

    With a network trained on L_vlb at the ends and one trained on L_hybrid in between, samples are as good
    as the latter's and likelihoods nearly those of the former. `sample` and `nll` take it like a `UNet`.

    Args:
        ends: used at the first `low` and the last `high` steps, of L_vlb in the paper.
        between: used at the others. Both must have the same inputs, outputs and process.
        low, high: how many steps, at least 0, together at most T.

    Raises:
        TypeError, ValueError: for networks that do not go together, or other numbers.

    Source: Improved DDPM, appendix D.
    """

    def __init__(self, ends: UNet, between: UNet, low: int = 100, high: int = 100) -> None:
        super().__init__()
        for name, network in (("ends", ends), ("between", between)):
            if not isinstance(network, UNet):
                kind = type(network).__name__
                raise TypeError(f"Splice: {name} must be an iddpm_ext.UNet, got {kind}")
        for key in _SHARED:
            values = [getattr(network.config, key) for network in (ends, between)]
            if values[0] != values[1]:
                raise ValueError(
                    f"Splice: ends and between must have the same {key}, got {values[0]} and "
                    f"{values[1]}"
                )
        if ends.diffusion is None or ends.diffusion != between.diffusion:
            raise ValueError(
                f"Splice: ends and between must have the same diffusion, "
                f"got {ends.diffusion!r} and {between.diffusion!r}"
            )
        low, high = plain((low, high))
        total = ends.diffusion.num_train_timesteps
        for name, count in (("low", low), ("high", high)):
            if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= total:
                raise ValueError(f"Splice: {name} must be an int from 0 to {total}, got {count!r}")
        if low + high > total:
            raise ValueError(f"Splice: low + high must be at most {total}, got {low + high}")
        self.ends, self.between, self.low, self.high = ends, between, low, high

    @property
    def config(self) -> UNetConfig:
        """The configuration of the network in between."""
        return self.between.config

    @property
    def diffusion(self) -> Diffusion:
        """The process of both networks."""
        assert self.between.diffusion is not None
        return self.between.diffusion

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.between.dtype

    @property
    def extra(self) -> dict[str, Any]:
        """The `extra` of the network in between."""
        return self.between.extra

    def at_ends(self, timesteps: Tensor) -> Tensor:
        """Which of the timesteps, as the network is told them, belong to `ends`: bool, same shape."""
        total = self.diffusion.num_train_timesteps
        scale = total / 1000 if self.diffusion.rescale_timesteps else 1.0
        step = (timesteps.double() * scale).round()
        return (step < self.low) | (step >= total - self.high)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        low_res: Tensor | None = None,
    ) -> Tensor:
        """As `UNet.forward`: x [N, C, H, W], timesteps [N] -> [N, C_out, H, W]."""
        given = {"y": y, "low_res": low_res}

        def run(network: UNet, rows: Tensor) -> Tensor:
            named = {name: value[rows] for name, value in given.items() if value is not None}
            return network(x[rows], timesteps[rows], **named)

        return joined(
            self.at_ends(timesteps),
            lambda rows: run(self.ends, rows),
            lambda rows: run(self.between, rows),
        )


def joined(
    first: Tensor, of_first: Callable[[Tensor], Tensor], of_others: Callable[[Tensor], Tensor]
) -> Tensor:
    """One tensor of the rows that two functions compute: `of_first` where `first` (bool [N]) holds.

    of_first, of_others: indices of rows int64 [n] -> [n, ...]; called only if there are such rows.
    """
    parts, places = [], []
    for call, chosen in ((of_first, first), (of_others, ~first)):
        rows = chosen.nonzero()[:, 0]
        if len(rows):
            parts.append(call(rows))
            places.append(rows)
    return torch.cat(parts)[torch.cat(places).argsort()]

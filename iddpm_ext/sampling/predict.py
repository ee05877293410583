"""The network's output along a chain, with labels, classifier-free guidance and low_res."""

from __future__ import annotations

import torch
from torch import Tensor

from iddpm_ext.engines.choosing import Network
from iddpm_ext.engines.spec import NetworkSpec


class Predictor:
    """The guided network for some of the images of a call; several predictors may share a network.

    samples: int64 [n], the indices of the images.
    """

    def __init__(
        self, spec: NetworkSpec, network: Network, samples: Tensor, guidance_scale: float
    ) -> None:
        self._network, self._scale, self._finish = network, guidance_scale, spec.finish
        self.labels = None if spec.labels is None else spec.labels[samples]
        self.low_res = None if spec.low_res is None else spec.low_res[samples]
        self._network_labels, self._network_low_res = self.labels, self.low_res
        self._guided = guidance_scale != 1.0
        if not spec.network_takes_labels:
            self._network_labels = None
        elif self._guided:
            assert self.labels is not None
            self._network_labels = torch.cat([self.labels, torch.full_like(self.labels, -1)])
            if self.low_res is not None:
                self._network_low_res = torch.cat([self.low_res, self.low_res])
        self.timesteps = spec.diffusion.model_timesteps(all_steps(spec)).to(spec.device)

    def begin(self) -> None:
        """Gives the network the timesteps, labels and low-resolution images of the following calls."""
        self._network.begin(self.timesteps, self._network_labels, self._network_low_res)

    def __call__(self, x: Tensor, step: int) -> Tensor:
        """x: [n, C, H, W] -> [n, C or 2C, H, W] at a step of the chain."""
        self.begin()
        if self._guided:
            out = _guide(self._network(torch.cat([x, x]), step), x.shape[1], self._scale)
        else:
            out = self._network(x, step)
        if self._finish is None:
            return out
        return self._finish(out, torch.full((len(x),), step, dtype=torch.int64, device=x.device))


def _guide(out: Tensor, channels: int, scale: float) -> Tensor:
    """The guided output, from the outputs with labels followed by those without; v is that with labels.

    The combination is the same for networks that predict eps, x_0, x_prev or the velocity, as each of these
    is affine in the others.
    """
    labelled, unlabelled = out.chunk(2)
    predicted = unlabelled[:, :channels].lerp(labelled[:, :channels], scale)
    return torch.cat([predicted, labelled[:, channels:]], dim=1)


def all_steps(spec: NetworkSpec) -> Tensor:
    """The steps of the chain, int64 [T] on the CPU."""
    return torch.arange(spec.diffusion.num_timesteps, dtype=torch.int64, device="cpu")

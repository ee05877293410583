"""A training step as the original repository formulates it, in PyTorch's own functions.

Rebuilt from the description of openai/improved-diffusion: GroupNorm in float32 with casts around it,
SiLU as x * sigmoid(x), attention as two einsums around a float32 softmax, the hybrid loss operation by
operation, AdamW, and the average of the weights tensor by tensor.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks import sequences
from iddpm_ext import ops
from iddpm_ext.diffusion import Diffusion
from iddpm_ext.networks.unet import GroupNormSiLU, UNet

EMA_DECAY = 0.9999
LEARNING_RATE = 1e-4


class GroupNorm32(GroupNormSiLU):
    """The normalisation and what follows it, one operation after the other."""

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        channel_bias: Tensor | None = None,
    ) -> Tensor:
        """As `GroupNormSiLU.forward`."""
        if channel_bias is not None:
            x = x + channel_bias[..., None, None]
        return sequences.group_norm_silu(
            x, self.num_groups, self.weight, self.bias,
            eps=self.eps, scale=scale, shift=shift, silu=self.silu,
        )  # fmt: skip


def original_network(model: UNet) -> UNet:
    """A copy of the network in the original's operations, with the same weights."""
    model = copy.deepcopy(model)
    model.backend = "plain"
    for module in model.modules():
        if isinstance(module, GroupNormSiLU):
            module.__class__ = GroupNorm32
    return model


def hybrid_loss(
    network: nn.Module,
    diffusion: Diffusion,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The mean hybrid loss, operation by operation; the network under autocast to `dtype`."""
    table = diffusion.table(x_0.device, dtype=torch.promote_types(x_0.dtype, torch.float32))
    x_t = ops.q_sample(x_0, t, table, noise, backend="reference")
    with torch.autocast(x_0.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        output = network(x_t, diffusion.model_timesteps(t))
    return ops.hybrid_loss(output, x_0, x_t, noise, t, table, backend="reference").loss.mean()


@dataclass
class Trainer:
    """Trains `network`; with `best`, by PyTorch's fused optimiser and a batched average."""

    network: nn.Module
    diffusion: Diffusion
    dtype: torch.dtype | None = None
    best: bool = False
    channels_last: bool = False
    parameters: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        if self.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=self.best
        )
        self.average = [p.detach().clone() for p in self.parameters]

    def step(self, x_0: Tensor) -> None:
        """Forward, loss, backward, optimiser, average."""
        t = torch.randint(0, self.diffusion.num_timesteps, (len(x_0),), device=x_0.device)
        if self.channels_last:
            x_0 = x_0.contiguous(memory_format=torch.channels_last)
        noise = torch.randn_like(x_0)
        self.optimizer.zero_grad()
        hybrid_loss(self.network, self.diffusion, x_0, t, noise, self.dtype).backward()
        self.optimizer.step()
        with torch.no_grad():
            if self.best:
                torch._foreach_lerp_(self.average, self.parameters, 1 - EMA_DECAY)
            else:
                for target, source in zip(self.average, self.parameters, strict=True):
                    target.mul_(EMA_DECAY).add_(source, alpha=1 - EMA_DECAY)

"""Networks and noise that the tests of the interoperation with diffusers share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from iddpm_ext import UNet, UNetConfig
from iddpm_ext.random import STREAM_INITIAL, STREAM_REVERSE, NoiseKey, normal

SMALL = UNetConfig(
    image_size=16, model_channels=32, num_res_blocks=1, channel_mult=(1, 2), num_heads=2,
    attention_resolutions=(8,),
)  # fmt: skip


def filled(model: nn.Module, scale: float = 0.4) -> nn.Module:
    """The model with weights that keep activations of order one everywhere, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(scale * noise / p[0].numel() ** 0.5 if p.dim() > 1 else p.round() + 0.1 * noise)
    return model.eval()


def small_network(config: UNetConfig = SMALL) -> UNet:
    model = filled(UNet(config))
    assert isinstance(model, UNet)
    return model


def noise_of(seed: int, timesteps: Tensor, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The noise of `iddpm_ext.sample(seed=seed)`, in order: x_T, then one tensor per step.

    timesteps: of the chain, ascending.
    """
    samples = torch.arange(shape[0])
    yield normal(NoiseKey(seed, STREAM_INITIAL, samples, 0), shape)
    for step in timesteps.flip(0).tolist():
        yield normal(NoiseKey(seed, STREAM_REVERSE, samples, step), shape)


class InjectedNoise:
    """A substitute for diffusers' `randn_tensor`: returns the given tensors, one per call."""

    def __init__(self, noise: Iterator[Tensor]) -> None:
        self.noise = noise
        self.drawn = 0

    def __call__(self, shape: tuple[int, ...], *_: object, **__: object) -> Tensor:
        self.drawn += 1
        tensor = next(self.noise)
        assert tuple(tensor.shape) == tuple(shape)
        return tensor

"""Shared by the parts: samplers, numbers of steps, images of the data."""

from __future__ import annotations

import torch
from torch import Tensor

from iddpm_ext.data import ImageData, Order
from iddpm_ext.report.subject import Subject

_FEW = 25  # steps, up to which the solver's images look better than the ancestral chain's


def usual_sampler(steps: int) -> str:
    """The stochastic solver for few steps, else ancestral sampling."""
    return "dpm++sde" if steps <= _FEW else "ddpm"


def possible(subject: Subject, counts: tuple[int, ...]) -> list[int]:
    """Those of the numbers of steps that the chain has, or all its steps."""
    chain = subject.model.diffusion
    assert chain is not None
    return sorted({min(count, chain.num_timesteps) for count in counts})


def images_of(data: ImageData, count: int) -> Tensor:
    """A random choice of the data, always the same one: float32 [N, C, H, W]."""
    indices = Order(len(data), seed=0).at(
        torch.arange(min(count, len(data)), dtype=torch.int64, device="cpu")
    )
    return torch.cat([data.images(part)[0] for part in indices.split(256)])

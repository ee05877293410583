"""What a chain is given of its images: known ones to begin with, or parts that stay (inpainting)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from iddpm_ext import ops
from iddpm_ext.engines.spec import NetworkSpec
from iddpm_ext.ops.rows import compute_dtype
from iddpm_ext.random import STREAM_FORWARD, STREAM_INITIAL, NoiseKey, normal


@dataclass(frozen=True, eq=False)
class Known:
    """The images that a call is given, checked.

    x_0: [n, C, H, W]. mask: like x_0, 1 where the chain paints and 0 where x_0 stays; None for
    everywhere. steps: how many of the chain's last steps are taken. repaint: how often each of them is.
    """

    x_0: Tensor
    mask: Tensor | None
    steps: int
    repaint: int

    def begin(self, spec: NetworkSpec, seed: int, samples: Tensor, x_T: Tensor | None) -> Tensor:
        """The x that the first step is taken from, [n, C, H, W]."""
        i = self.steps - 1
        if self.steps < spec.diffusion.num_timesteps:
            key = NoiseKey(seed, STREAM_INITIAL, samples, 0)
            return self._noised(spec, i, samples, key)
        if x_T is None:
            key = NoiseKey(seed, STREAM_INITIAL, samples, 0)
            x_T = normal(key, self.x_0[samples].shape, spec.device).to(self.x_0.dtype)
        return self.kept(spec, seed, samples, x_T, i, 0)

    def kept(
        self, spec: NetworkSpec, seed: int, samples: Tensor, x: Tensor, i: int, again: int
    ) -> Tensor:
        """x, the images at step i (-1 for those without noise), with what is known in its place.

        again: how often the step was taken before.
        """
        if self.mask is None:
            return x
        if i < 0:
            known = self.x_0[samples]
        else:
            step = int(spec.diffusion.timesteps[i])
            key = NoiseKey(seed, STREAM_FORWARD, samples, step, 2 * again)
            known = self._noised(spec, i, samples, key)
        return torch.lerp(known, x, self.mask[samples])

    def renoised(
        self, spec: NetworkSpec, seed: int, samples: Tensor, x: Tensor, i: int, again: int
    ) -> Tensor:
        """x_{i-1} taken back to step i by one step of the forward process (equation 2)."""
        beta, step = float(spec.diffusion.betas[i]), int(spec.diffusion.timesteps[i])
        key = NoiseKey(seed, STREAM_FORWARD, samples, step, 2 * again + 1)
        noise = normal(key, x.shape, x.device).to(x.dtype)
        return math.sqrt(1 - beta) * x + math.sqrt(beta) * noise

    def _noised(self, spec: NetworkSpec, i: int, samples: Tensor, key: NoiseKey) -> Tensor:
        x_0 = self.x_0[samples]
        t = torch.full((len(samples),), i, dtype=torch.int64, device=spec.device)
        table = spec.diffusion.table(spec.device, dtype=compute_dtype(x_0))
        return ops.q_sample(x_0, t, table, key, backend=spec.backend)


def known_images(
    spec: NetworkSpec,
    *,
    x_0: Tensor | None,
    mask: Tensor | None,
    strength: float,
    repaint: int,
    x_T: Tensor | None,
    sampler: str,
) -> Known | None:
    """The arguments of `sample` of these names, checked; None where there is no x_0.

    Raises ValueError or TypeError.
    """
    who = spec.who
    number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
    if not number or not 0 < strength <= 1:
        raise ValueError(f"{who}: strength must be a number above 0, at most 1, got {strength!r}")
    if isinstance(repaint, bool) or not isinstance(repaint, int) or repaint < 1:
        raise ValueError(f"{who}: repaint must be an int above 0, got {repaint!r}")
    if x_0 is None:
        for name, given in (("mask", mask is not None), ("strength", strength != 1),
                            ("repaint", repaint != 1)):  # fmt: skip
            if given:
                raise ValueError(f"{who}: x_0 must be given with {name}, got None")
        return None
    if not bool((x_0.abs() <= 1).all()):
        raise ValueError(
            f"{who}: x_0 must lie in [-1, 1], got {float(x_0.min()):g} .. {float(x_0.max()):g}"
        )
    if mask is None and strength == 1:
        raise ValueError(
            f"{who}: strength must be below 1, or mask given, for x_0 to have an effect, got 1"
        )
    if strength < 1 and x_T is not None:
        raise ValueError(f"{who}: x_T must be None with strength below 1, got a tensor")
    if repaint > 1 and (mask is None or sampler not in ("ddpm", "ddim")):
        raise ValueError(
            f"{who}: repaint must be 1 without a mask and with solvers of several steps, got {repaint}"
        )
    steps = max(1, round(strength * spec.diffusion.num_timesteps))
    return Known(x_0, None if mask is None else _mask(spec, mask, x_0), steps, repaint)


def _mask(spec: NetworkSpec, mask: Tensor, x_0: Tensor) -> Tensor:
    """The mask in the shape and dtype of x_0."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{spec.who}: mask must be a tensor, got {type(mask).__name__}")
    if mask.device != x_0.device:
        raise ValueError(f"{spec.who}: mask must be on {x_0.device}, got {mask.device}")
    try:
        whole = mask.to(x_0.dtype).expand_as(x_0)
    except RuntimeError:
        raise ValueError(
            f"{spec.who}: mask must fit {list(x_0.shape)} by broadcasting, got {list(mask.shape)}"
        ) from None
    if not bool(((whole >= 0) & (whole <= 1)).all()):
        raise ValueError(
            f"{spec.who}: mask must lie in [0, 1], got {float(mask.min()):g} .. {float(mask.max()):g}"
        )
    return whole

"""Large images in two stages: a small image from one network, its details from an upsampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from iddpm_ext.networks.unet import UNet
from iddpm_ext.sampling.loop import batches, run
from iddpm_ext.sampling.request import Request, Steps, make_request

# The upsampler's seed is the other's with this bit flipped: no number of the noise is used twice.
_SEED_BIT = 1 << 63


class TwoStage(NamedTuple):
    """images: float32 [n, C, H, W]. low_res: [n, C, h, w] as the upsampler saw them, whole levels of
    8 bits. labels: int64 [n], or None where neither network takes them."""

    images: Tensor
    low_res: Tensor
    labels: Tensor | None


def sample_two_stage(
    base: UNet,
    upsampler: UNet,
    steps: Steps = 50,
    *,
    upsampler_steps: Steps = None,
    n: int | None = None,
    sampler: str = "ddpm",
    eta: float = 0.0,
    labels: Sequence[int] | Tensor | None = None,
    guidance_scale: float = 1.0,
    seed: int = 0,
    clip: bool = True,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    engine: bool = True,
    exact: bool = False,
    backend: str = "auto",
    progress: bool = True,
) -> TwoStage:
    """Draws small images from `base` and enlarges them by `upsampler`, with the same labels.

    Between the stages images are rounded to 8 bits, as files of them are (the original's upsampler
    reads such files, whose levels it truncates instead).

    Args:
        base, upsampler: of the same image channels on the same device; the second one with
            super_resolution. Where both take labels, they have the same classes.
        steps, upsampler_steps: as `sample`'s steps, of each chain; None for as many as `steps`.
        guidance_scale: of the base alone. batch_size: of the base; the upsampler's follows its size.
        All else as in `sample`, for both stages.

    Returns:
        (images, low_res, labels).

    Raises:
        As `sample`, before any work.

    Source: Nichol & Dhariwal 2021; super_res_sample.py of openai/improved-diffusion.
    """
    request = make_request(
        base, steps, n=n, sampler=sampler, eta=eta, labels=labels, guidance_scale=guidance_scale,
        low_res=None, seed=seed, x_T=None, clip=clip, batch_size=batch_size, diffusion=None,
        image_shape=None, dtype=dtype, engine=engine, exact=exact, backend=backend,
        progress=progress,
    )  # fmt: skip
    second = upsampler_request(
        request, upsampler, steps if upsampler_steps is None else upsampler_steps
    )
    low_res = rounded_to_levels(run(request, batches(request)))
    second = replace(second, low_res=low_res)
    images = run(second, batches(second))
    return TwoStage(images, low_res, second.labels if request.labels is None else request.labels)


def upsampler_request(base: Request, upsampler: Callable[..., Tensor], steps: Steps) -> Request:
    """The second stage of what `base` asks for, checked; its `low_res` has the shape and no content."""
    if not isinstance(upsampler, UNet) or not upsampler.config.super_resolution:
        got = "a network without" if isinstance(upsampler, UNet) else type(upsampler).__name__
        raise ValueError(f"sample: upsampler must be a UNet with super_resolution, got {got}")
    labels, classes = base.labels, upsampler.config.num_classes
    if classes is None:
        labels = None
    elif isinstance(base.model, UNet) and base.model.config.num_classes not in (None, classes):
        raise ValueError(
            f"sample: upsampler must have the {base.model.config.num_classes} classes of the base, "
            f"got {classes}"
        )
    return make_request(
        upsampler, steps, n=base.n, sampler=base.sampler, eta=base.eta, labels=labels,
        guidance_scale=1.0, low_res=torch.zeros(base.n, *base.image_shape, device=base.device),
        seed=base.seed ^ _SEED_BIT, x_T=None, clip=base.clip, batch_size=None, diffusion=None,
        image_shape=None, dtype=base.dtype, engine=base.engine, exact=base.exact,
        backend=base.backend, progress=base.progress,
    )  # fmt: skip


def rounded_to_levels(x: Tensor) -> Tensor:
    """Images in [-1, 1] at the nearest of the 256 levels of 8 bits, as a file of them would give."""
    return ((x + 1) * 127.5).clamp(0, 255).round() / 127.5 - 1

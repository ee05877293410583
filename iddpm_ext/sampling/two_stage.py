"""Large images in two stages: one network draws small images, an upsampler enlarges them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iddpm_ext.engines.spec import Steps, describing
from iddpm_ext.networks.unet import UNet
from iddpm_ext.sampling.loop import batches, network_of, run
from iddpm_ext.sampling.request import Request, make_request

# Flipped in the seed for the upsampler, so that the stages share no noise.
_SEED_BIT = 1 << 63


class TwoStage(NamedTuple):
    """The results of `sample_two_stage`.

    images: float32 [n, C, H, W]. low_res: [n, C, h, w], the upsampler's input, rounded to 8 bits. labels:
    int64 [n], or None where neither network takes them.
    """

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
    variance: str | None = None,
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

    Between the stages images are rounded to 8 bits, as in image files. (The original writes such files
    between the stages, truncating instead of rounding.)

    Args:
        base, upsampler: networks for the same image channels on the same device; the upsampler has
            super_resolution. If both take labels, their classes must agree.
        steps, upsampler_steps: as `steps` of `sample`, for each stage; upsampler_steps=None means `steps`.
        guidance_scale: for the base alone. batch_size: for the base; the upsampler chooses by image size.
        All else as in `sample`, for both stages.

    Returns:
        (images, low_res, labels).

    Raises:
        As `sample`, before any work.

    Source: Nichol & Dhariwal 2021; super_res_sample.py of openai/improved-diffusion.
    """
    request = make_request(
        "sample_two_stage", base, steps, n=n, sampler=sampler, eta=eta, labels=labels,
        guidance_scale=guidance_scale, seed=seed, clip=clip, batch_size=batch_size, dtype=dtype,
        engine=engine, exact=exact, backend=backend, progress=progress, variance=variance,
    )  # fmt: skip
    second = upsampler_request(
        request, upsampler, steps if upsampler_steps is None else upsampler_steps
    )
    networks = network_of(request), network_of(second)
    first = batches(request.n, request.batch_size)
    low_res = rounded_to_levels(run(request, first, network=networks[0]))
    second = second.with_low_res(low_res)
    images = run(second, batches(second.n, second.batch_size), network=networks[1])
    drawn = request.spec.labels
    return TwoStage(images, low_res, second.spec.labels if drawn is None else drawn)


def upsampler_request(base: Request, upsampler: Callable[..., Tensor], steps: Steps) -> Request:
    """The checked request of the second stage; its `low_res` is a placeholder of the right shape."""
    spec, ours, first = base.spec, describing(upsampler), describing(base.spec.model)
    if not isinstance(ours, UNet) or not ours.config.super_resolution:
        got = "a network without" if isinstance(ours, UNet) else type(upsampler).__name__
        raise ValueError(f"{spec.who}: upsampler must be a UNet with super_resolution, got {got}")
    labels, classes = spec.labels, ours.config.num_classes
    if classes is None:
        labels = None
    elif isinstance(first, UNet) and first.config.num_classes not in (None, classes):
        raise ValueError(
            f"{spec.who}: upsampler must have the {first.config.num_classes} classes of the base, "
            f"got {classes}"
        )
    none = torch.zeros(base.n, *spec.image_shape, dtype=torch.float32, device=spec.device)
    return make_request(
        spec.who, upsampler, steps, n=base.n, sampler=base.sampler, eta=base.eta, labels=labels,
        low_res=none, seed=base.seed ^ _SEED_BIT, clip=base.clip, dtype=spec.dtype,
        engine=spec.engine, exact=spec.exact, backend=spec.backend, progress=base.progress,
        variance=base.variance,
    )  # fmt: skip


def rounded_to_levels(x: Tensor) -> Tensor:
    """Images in [-1, 1] rounded to the nearest of 256 levels, as an image file stores them."""
    return ((x + 1) * 127.5).clamp(0, 255).round() / 127.5 - 1

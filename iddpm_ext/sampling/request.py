"""The arguments of one call of `sample`, checked in full before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from iddpm_ext.checkpoint.unlabelled import warn_if_never_unlabelled
from iddpm_ext.diffusion import SAMPLERS as ONE_STEP_SAMPLERS
from iddpm_ext.diffusion import Diffusion
from iddpm_ext.diffusion.solvers import SOLVERS, Solver
from iddpm_ext.engines.spec import (
    NetworkSpec,
    Steps,
    batch_size_of,
    check_flags,
    check_like,
    check_network,
    check_seed,
    count_of,
    describing,
)
from iddpm_ext.interop.process import diffusion_of
from iddpm_ext.interop.twin import twin
from iddpm_ext.networks import foreign
from iddpm_ext.networks.unet import UNet
from iddpm_ext.random import STREAM_CHOICE, NoiseKey, integers
from iddpm_ext.sampling.inpainting import Known, known_images
from iddpm_ext.sampling.variance import COMPUTED, FIXED, with_variance
from iddpm_ext.scalars import plain

SAMPLERS = (*ONE_STEP_SAMPLERS, *SOLVERS)
_DEFAULT_N = 16


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of `sample`, resolved, with every default filled in.

    spec: the network, its chain and its inputs. x_T: [n, C, H, W], or None for noise from the seed.
    known: the images to change, or None.
    """

    spec: NetworkSpec
    n: int
    batch_size: int
    x_T: Tensor | None = None
    sampler: str = "ddpm"
    eta: float = 0.0
    guidance_scale: float = 1.0
    cond_fn: Callable[..., Tensor] | None = None
    denoised_fn: Callable[[Tensor], Tensor] | None = None
    seed: int = 0
    clip: bool = True
    progress: bool = True
    variance: str | None = None
    known: Known | None = None

    @property
    def steps(self) -> int:
        """How many of the chain's steps are taken, the last ones."""
        return self.spec.diffusion.num_timesteps if self.known is None else self.known.steps

    @property
    def solver(self) -> Solver | None:
        """The sampler's multistep solver, if it has one."""
        return SOLVERS.get(self.sampler)

    @property
    def noisy(self) -> bool:
        """Whether the steps add noise."""
        stochastic = self.solver is not None and self.solver.eta > 0
        return self.sampler == "ddpm" or self.eta > 0 or stochastic or self.variance in COMPUTED

    def table(self, chain: Diffusion | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The coefficients of the sampler's `reverse_step`, [T, 16] on the device.

        chain: None for the request's own, or that chain with another prediction.
        """
        chain, solver = chain or self.spec.diffusion, self.solver
        if self.sampler == "ddpm":
            return chain.table(self.spec.device, dtype=dtype)
        eta = self.eta if solver is None else solver.eta
        return chain.table(self.spec.device, sampler="ddim", eta=eta, dtype=dtype)

    def with_low_res(self, low_res: Tensor) -> Request:
        """The same request with other low-resolution images [n, C, h, w]."""
        return replace(self, spec=replace(self.spec, low_res=low_res))


def make_request(
    who: str,
    model: Callable[..., Tensor],
    steps: Steps,
    *,
    n: int | None = None,
    sampler: str = "ddpm",
    eta: float = 0.0,
    labels: Sequence[int] | Tensor | None = None,
    guidance_scale: float = 1.0,
    low_res: Tensor | None = None,
    seed: int = 0,
    x_T: Tensor | None = None,
    x_0: Tensor | None = None,
    mask: Tensor | None = None,
    strength: float = 1.0,
    repaint: int = 1,
    clip: bool = True,
    batch_size: int | None = None,
    diffusion: Diffusion | None = None,
    image_shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    engine: bool = True,
    exact: bool = False,
    backend: str = "auto",
    progress: bool = True,
    cond_fn: Callable[..., Tensor] | None = None,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
    variance: str | None = None,
) -> Request:
    """Checks the arguments of `sample` and fills in what they leave open.

    who: the function that errors name.

    Raises ValueError, TypeError or RuntimeError as `sample` documents.
    """
    check_flags(who, clip=clip, progress=progress)
    n, eta, seed, batch_size = plain((n, eta, seed, batch_size))
    strength, repaint = plain((strength, repaint))
    for name, function in (("cond_fn", cond_fn), ("denoised_fn", denoised_fn)):
        if function is not None and not callable(function):
            raise TypeError(f"{who}: {name} must be callable, got {type(function).__name__}")
    _check_sampler(who, sampler, eta, variance)
    check_seed(who, seed)
    spec = network_spec(
        who, model, steps, diffusion=diffusion, image_shape=image_shape, dtype=dtype, engine=engine,
        exact=exact, backend=backend, labels=labels, low_res=low_res,
        images=("x_T", x_T) if x_0 is None else ("x_0", x_0),
        labels_for_guidance=cond_fn is not None,
    )  # fmt: skip
    if x_0 is not None and x_T is not None:
        check_like(who, "x_T", x_T, x_0)
    known = known_images(
        spec, x_0=x_0, mask=mask, strength=strength, repaint=repaint, x_T=x_T, sampler=sampler
    )
    spec = with_variance(spec, variance, sampling=True, sampler=sampler, eta=float(eta))
    if cond_fn is not None and sampler != "ddpm" and float(spec.diffusion.alphas_cumprod[-1]) == 0:
        raise ValueError(
            f"{who}: cond_fn must be None with ddim and the solvers for a chain of zero terminal SNR, "
            "at whose last step eps moves x_0 without bound, got a function"
        )
    count = count_of(who, n, _DEFAULT_N, labels=spec.labels, low_res=low_res, x_T=x_T, x_0=x_0)
    ours = describing(spec.model)
    if spec.labels is None and ours is not None and ours.config.num_classes is not None:
        numbers = torch.arange(count, dtype=torch.int64, device="cpu")
        key = NoiseKey(seed, STREAM_CHOICE, numbers, 0)
        drawn = integers(key, ours.config.num_classes, (count, 1))[:, 0]
        spec = replace(spec, labels=drawn.to(spec.device))
    return Request(
        spec=spec,
        n=count,
        batch_size=batch_size_of(who, batch_size, count, spec.image_shape, spec.device),
        x_T=x_T,
        sampler=sampler,
        eta=float(eta),
        guidance_scale=checked_scale(spec, guidance_scale),
        cond_fn=cond_fn,
        denoised_fn=denoised_fn,
        seed=seed,
        clip=clip,
        progress=progress,
        variance=variance,
        known=known,
    )


def network_spec(
    who: str,
    model: Callable[..., Tensor],
    steps: Steps,
    *,
    diffusion: Diffusion | None,
    image_shape: Sequence[int] | None,
    engine: bool,
    **others: Any,
) -> NetworkSpec:
    """`check_network` that also takes networks and pipelines of diffusers."""
    if foreign.is_pipeline(model):
        pipeline: Any = model
        model = pipeline.unet
        diffusion = diffusion_of(pipeline.scheduler.config) if diffusion is None else diffusion
    if foreign.is_unet2d(model):
        assert isinstance(model, nn.Module)
        ours = twin(model) if engine else None
        if ours is not None:
            model = ours
        else:
            model = network = foreign.UNet2DNetwork(model)
            image_shape = network.image_shape if image_shape is None else image_shape
    return check_network(
        who, model, steps, diffusion=diffusion, image_shape=image_shape, engine=engine, **others
    )


def _check_sampler(who: str, sampler: str, eta: float, variance: str | None) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"{who}: sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0 <= eta <= 1:
        raise ValueError(f"{who}: eta must be a number from 0 to 1, got {eta!r}")
    if eta and sampler != "ddim":
        raise ValueError(f"{who}: eta must be 0 with sampler {sampler!r} (it is DDIM's), got {eta}")
    if variance in FIXED and sampler != "ddpm":
        raise ValueError(
            f"{who}: variance must be None, 'analytic' or 'optimal' with sampler {sampler!r}, "
            f"got {variance!r}"
        )
    if variance in COMPUTED and sampler in SOLVERS:
        raise ValueError(
            f"{who}: variance must be None with sampler {sampler!r}, which solves an equation, "
            f"got {variance!r}"
        )


def checked_scale(spec: NetworkSpec, scale: float) -> float:
    """The scale of classifier-free guidance; ValueError for a network that it cannot guide."""
    scale = plain(scale)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"{spec.who}: guidance_scale must be a finite number, got {scale!r}")
    ours = describing(spec.model)
    unlabelled = isinstance(ours, UNet) and ours.config.num_classes is None
    if scale != 1 and (spec.labels is None or unlabelled):
        raise ValueError(
            f"{spec.who}: guidance_scale must be 1 for a model without labels, got {scale}"
        )
    if scale != 1:
        warn_if_never_unlabelled(spec.model, spec.who)
    return float(scale)

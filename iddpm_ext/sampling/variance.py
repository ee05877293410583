"""The variances of a chain: its own, a fixed choice, analytic ones from moments, or those of heads."""

from __future__ import annotations

from dataclasses import replace

import torch

from iddpm_ext.diffusion.analytic import AnalyticDiffusion, with_fixed_variance
from iddpm_ext.diffusion.covariance import Covariance
from iddpm_ext.engines.kept import kept_of
from iddpm_ext.engines.spec import NetworkSpec, moments_of, weights_fingerprint
from iddpm_ext.networks.head import last_convolution, with_last_convolution
from iddpm_ext.networks.unet import UNet

FIXED = ("fixed_small", "fixed_large")
#: Estimated from the variance of x_0 given x_t; with ancestral steps and DDIM's.
COMPUTED = ("analytic", "optimal")
CHOICES = (*FIXED, *COMPUTED)
# Standard deviation of the noise that remains in the images, in levels of 8 bits, on average at most.
_NOISE_LEVELS = 1.0


def with_variance(
    spec: NetworkSpec,
    variance: str | None,
    *,
    sampling: bool,
    sampler: str = "ddpm",
    eta: float = 0.0,
) -> NetworkSpec:
    """`spec` with a chain, and where need be a network, of these variances; None leaves it as it is.

    sampling: limit the noise of the last noisy step, which no later step removes. sampler, eta: as in
    `sample`.

    Raises ValueError for an unknown name, or where the checkpoint has no moments or head of its weights.
    """
    if variance is None:
        return spec
    if variance not in CHOICES:
        raise ValueError(
            f"{spec.who}: variance must be None or one of {', '.join(CHOICES)}, got {variance!r}"
        )
    if variance in FIXED:
        return replace(spec, diffusion=with_fixed_variance(spec.diffusion, variance))
    noise_levels = _NOISE_LEVELS if sampling else None
    if variance == "optimal":
        return _with_head(spec, noise_levels, sampler, eta)
    moments = moments_of(spec.who, spec.model, spec.diffusion)
    known = moments.x_0_variance(spec.diffusion)
    return replace(spec, diffusion=AnalyticDiffusion(spec.diffusion, known, noise_levels))


def _with_head(
    spec: NetworkSpec, noise_levels: float | None, sampler: str, eta: float
) -> NetworkSpec:
    model = bare_network(spec)
    channels = model.config.in_channels
    weight, bias = last_convolution(model, channels)
    found = Covariance.from_extra(
        spec.who, model.extra, weights_fingerprint(model), (channels, weight.shape[1]),
        spec.diffusion.num_train_timesteps,
    )  # fmt: skip
    chain = found.chain(spec.diffusion, noise_levels)
    network = with_last_convolution(
        model,
        torch.cat([weight, found.weight.to(weight.device)]),
        torch.cat([bias, found.bias.to(bias.device)]),
    )
    network.extra = model.extra
    return replace(
        spec,
        model=network,
        diffusion=chain,
        finish=lambda out, t: chain.with_log_variance(out, t, sampler, eta),
    )


def bare_network(spec: NetworkSpec) -> UNet:
    """The call's network, which must be a `UNet` and no more, for a head of variances beside its last layer.

    Raises ValueError, which names what is different.
    """
    model = spec.model
    if not isinstance(model, UNet):
        raise ValueError(
            f"{spec.who}: model must be a UNet of this package for a head of variances, "
            f"got a {type(model).__name__}"
        )
    more = kept_of(model).structure(model)
    if isinstance(more, str):
        raise ValueError(
            f"{spec.who}: model must be as its configuration says for a head of variances, "
            f"got one where {more}"
        )
    return model

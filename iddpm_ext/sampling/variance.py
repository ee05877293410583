"""The variances of a chain: its own, a fixed choice, or analytic ones from the checkpoint's moments."""

from __future__ import annotations

from iddpm_ext.diffusion import Diffusion
from iddpm_ext.diffusion.analytic import AnalyticDiffusion, with_fixed_variance
from iddpm_ext.engines.spec import NetworkSpec, moments_of

FIXED = ("fixed_small", "fixed_large")
CHOICES = (*FIXED, "analytic")
# Standard deviation of the noise that remains in the images, in levels of 8 bits, on average at most.
_NOISE_LEVELS = 1.0


def with_variance(spec: NetworkSpec, variance: str | None, *, sampling: bool) -> Diffusion:
    """The chain of `spec` with these variances; None leaves it as it is.

    sampling: limit the noise of the last noisy step, which no later step removes.

    Raises ValueError for an unknown name, or where the checkpoint has no moments of its weights.
    """
    if variance is None:
        return spec.diffusion
    if variance not in CHOICES:
        raise ValueError(
            f"{spec.who}: variance must be None or one of {', '.join(CHOICES)}, got {variance!r}"
        )
    if variance in FIXED:
        return with_fixed_variance(spec.diffusion, variance)
    moments = moments_of(spec.who, spec.model, spec.diffusion)
    return AnalyticDiffusion(
        spec.diffusion,
        moments.x_0_variance(spec.diffusion),
        _NOISE_LEVELS if sampling else None,
    )

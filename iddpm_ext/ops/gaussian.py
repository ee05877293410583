"""Gaussian terms of the variational bound, in nats, elementwise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Half the distance between two of the 256 levels, on the scale of [-1, 1].
HALF_BIN = 1.0 / 255.0


def normal_kl(
    mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor
) -> Tensor:
    """KL(N(mean_1, exp log_variance_1) || N(mean_2, exp log_variance_2)) in nats.

    Args:
        mean_1, log_variance_1, mean_2, log_variance_2: floating, shapes that broadcast together.

    Returns:
        the broadcast shape. Differentiable in all four.
    """
    difference = log_variance_1 - log_variance_2
    # expm1(d) - d instead of exp(d) - d - 1, which cancels for nearly equal variances, the usual case.
    return 0.5 * (
        torch.expm1(difference)
        - difference
        + (mean_1 - mean_2).square() * torch.exp(-log_variance_2)
    )


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal's distribution function, any shape.

    0.5 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), within 3e-4 of the true value.
    """
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(
    x: Tensor, mean: Tensor, log_scale: Tensor, *, exact: bool = False
) -> Tensor:
    """Log-probability in nats that a Gaussian gives to 8-bit values.

    log of the integral of N(mean, exp(log_scale)^2) over x +- 1/255; the bins of the lowest and highest
    level extend to minus and plus infinity.

    Args:
        x: values 0..255 mapped to [-1, 1], floating, any shape.
        mean, log_scale: like x; log_scale is the log of the standard deviation.
        exact: False takes the tanh approximation of the integral with probabilities clamped to at
            least 1e-12 (no gradient below), as the original does; True takes the integral itself.

    Returns:
        like x. Differentiable in mean and log_scale.
    """
    likelihood = _exact_log_likelihood if exact else _approximate_log_likelihood
    return likelihood(x, mean, log_scale)


def _approximate_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    inverse_scale = torch.exp(-log_scale)
    below_upper = approx_standard_normal_cdf(inverse_scale * (x - mean + HALF_BIN))
    below_lower = approx_standard_normal_cdf(inverse_scale * (x - mean - HALF_BIN))
    inner = torch.where(x > 0.999, 1 - below_lower, below_upper - below_lower)
    probability = torch.where(x < -0.999, below_upper, inner)
    return probability.clamp(min=1e-12).log()


def _exact_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    # float64 throughout: for a bin much narrower than the scale, two close values are subtracted.
    centred, inverse_scale = (x - mean).double(), torch.exp(-log_scale.double())
    upper = inverse_scale * (centred + HALF_BIN)
    lower = inverse_scale * (centred - HALF_BIN)
    # Mirrored to the left tail, where log Phi is accurate.
    mirrored = centred > 0
    left, right = torch.where(mirrored, -upper, lower), torch.where(mirrored, -lower, upper)
    log_right = torch.special.log_ndtr(right)
    inner = log_right + torch.log(-torch.expm1(torch.special.log_ndtr(left) - log_right))
    log_probability = torch.where(
        x < -0.999,
        torch.special.log_ndtr(upper),
        torch.where(x > 0.999, torch.special.log_ndtr(-lower), inner),
    )
    return log_probability.to(torch.result_type(x, mean))

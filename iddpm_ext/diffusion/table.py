"""The coefficient table of a chain: one row of 16 numbers per step.

The products alpha_bar_t are 512-bit fixed-point integers, so that alpha_bar, 1 - alpha_bar and the betas of a
respaced chain are all correctly rounded, although two of them are differences of nearly equal numbers. From
these, the formulas below only add and multiply positive terms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from iddpm_ext.ops.columns import NUM_COLUMNS, Column

VARIANCES = ("learned_range", "learned", "fixed_large", "fixed_small")
PREDICTIONS = ("epsilon", "x_0", "x_prev", "velocity", "edm")
SAMPLERS = ("ddpm", "ddim")

_ONE = 1 << 512


def fixed_point_alpha_bars(betas: Iterable[float]) -> list[int]:
    """alpha_bar_t = prod_{s<=t} (1 - beta_s) as integers in units of 2^-512."""
    product, products = _ONE, []
    for beta in betas:
        numerator, denominator = beta.as_integer_ratio()
        product = product * (denominator - numerator) // denominator
        products.append(product)
    return products


@dataclass(frozen=True)
class Chain:
    """The quantities of a chain from which coefficients are computed, each float64 [T].

    beta_t = 1 - alpha_t; ``one_minus_*`` are stored because the differences would cancel in floating point;
    ``previous`` means t - 1, with alpha_bar = 1 before the first step.
    """

    alpha: Tensor
    beta: Tensor
    alpha_bar: Tensor
    one_minus_alpha_bar: Tensor
    alpha_bar_previous: Tensor
    one_minus_alpha_bar_previous: Tensor

    @classmethod
    def from_fixed_point(cls, alpha_bars: list[int]) -> Chain:
        """The chain that visits these alpha_bars (units of 2^-512), in this order."""
        previous = [_ONE, *alpha_bars[:-1]]
        pairs = list(zip(alpha_bars, previous, strict=True))
        columns = (
            [now / before for now, before in pairs],
            [(before - now) / before for now, before in pairs],
            [now / _ONE for now in alpha_bars],
            [(_ONE - now) / _ONE for now in alpha_bars],
            [before / _ONE for before in previous],
            [(_ONE - before) / _ONE for before in previous],
        )
        return cls(*(torch.tensor(column, dtype=torch.float64, device="cpu") for column in columns))

    @property
    def log_beta(self) -> Tensor:
        return torch.where(self.beta > 0.5, torch.log1p(-self.alpha), self.beta.log())

    @property
    def log_alpha_bar(self) -> Tensor:
        small = self.one_minus_alpha_bar < 0.5
        return torch.where(small, torch.log1p(-self.one_minus_alpha_bar), self.alpha_bar.log())

    @property
    def log_variance_range(self) -> Tensor:
        """log beta_t - log beta~_t, beta~_t = beta_t (1 - ab_{t-1}) / (1 - ab_t) (equation 10).

        beta~_0 is 0; its logarithm is replaced by that of the step after it, as in the original.
        """
        excess = self.beta * self.alpha_bar_previous / self.one_minus_alpha_bar_previous
        excess[0] = self.alpha[1] * self.one_minus_alpha_bar_previous[1] / self.beta[1]
        return excess.log1p()

    @property
    def posterior_log_variance(self) -> Tensor:
        """log beta~_t, at t = 0 that of the step after it."""
        return self.log_beta - self.log_variance_range

    @property
    def log_sigma(self) -> Tensor:
        """log sigma_t of EDM's noise levels, sigma_t^2 = (1 - ab_t) / ab_t."""
        return (self.one_minus_alpha_bar.log() - self.log_alpha_bar) / 2

    def input_scale(self, sigma_data: float) -> Tensor:
        """What brings x_t to unit variance, where that of the data is sigma_data^2."""
        return (self.one_minus_alpha_bar + self.alpha_bar * sigma_data**2).rsqrt()

    def mean_coefficients(self, eta: float) -> tuple[Tensor, Tensor]:
        """(c1, c2) with mean of x_{t-1} = c1 x_0 + c2 x_t, for DDIM's eta; 1 gives the posterior.

        DDIM's mean is sqrt(ab') x_0 + sqrt(1 - ab' - sigma^2) (x_t - sqrt(ab) x_0) / sqrt(1 - ab)
        with sigma^2 = eta^2 beta~ (Song et al. 2021, equations 12 and 16). Collected for x_0 and
        x_t, with 1 - ab = alpha (1 - ab') + beta, the subtractions cancel algebraically. At
        eta = 1 this is the posterior mean (equation 11).
        """
        kept = self.alpha * self.one_minus_alpha_bar_previous
        c2 = (
            self.one_minus_alpha_bar_previous * (kept + (1 - eta * eta) * self.beta)
        ).sqrt() / self.one_minus_alpha_bar
        c1 = (
            self.alpha_bar_previous.sqrt()
            * self.beta
            * (kept * (1 + eta * eta) + self.beta)
            / (self.one_minus_alpha_bar.square() * (1 + c2 * self.alpha.sqrt()))
        )
        return c1, c2


def build_table(
    chain: Chain,
    steps: Tensor,
    variance: str,
    prediction: str,
    sampler: str,
    eta: float,
    sigma_data: float,
) -> Tensor:
    """The coefficients of a chain, float64 [T, 16]; ``Column`` says what each means.

    sigma_data: for the prediction "edm" only. log_alpha_bar is stored as its float32 rounding and the
    remainder.
    """
    table = torch.zeros(len(steps), NUM_COLUMNS, dtype=torch.float64, device="cpu")
    posterior_c1, posterior_c2 = chain.mean_coefficients(1.0)

    if prediction == "epsilon":
        table[:, Column.X0_FROM_XT] = chain.alpha_bar.rsqrt()
        table[:, Column.X0_FROM_OUT] = -(chain.one_minus_alpha_bar / chain.alpha_bar).sqrt()
        table[:, Column.TARGET_NOISE] = 1
    elif prediction == "x_0":
        table[:, Column.X0_FROM_OUT] = 1
        table[:, Column.TARGET_X0] = 1
    elif prediction == "velocity":
        # v = sqrt(ab) noise - sqrt(1 - ab) x_0 (Salimans & Ho 2022, appendix D); x_0 follows from it and x_t.
        signal, noise = chain.alpha_bar.sqrt(), chain.one_minus_alpha_bar.sqrt()
        table[:, Column.X0_FROM_XT] = signal
        table[:, Column.X0_FROM_OUT] = -noise
        table[:, Column.TARGET_NOISE] = signal
        table[:, Column.TARGET_X0] = -noise
    elif prediction == "edm":
        # x_0 = c_skip x_t / sqrt(ab) + c_out out of sigma^2 = (1 - ab) / ab (Karras et al. 2022, table 1).
        signal, noise = chain.alpha_bar.sqrt(), chain.one_minus_alpha_bar.sqrt()
        scale = chain.input_scale(sigma_data)
        table[:, Column.X0_FROM_XT] = signal * (sigma_data * scale).square()
        table[:, Column.X0_FROM_OUT] = noise * sigma_data * scale
        table[:, Column.TARGET_X0] = noise * scale / sigma_data
        table[:, Column.TARGET_NOISE] = -signal * sigma_data * scale
    else:
        table[:, Column.X0_FROM_XT] = -posterior_c2 / posterior_c1
        table[:, Column.X0_FROM_OUT] = 1 / posterior_c1
        table[:, Column.TARGET_X0] = posterior_c1
        table[:, Column.TARGET_XT] = posterior_c2

    if sampler == "ddpm":
        table[:, Column.MEAN_X0] = posterior_c1
        table[:, Column.MEAN_XT] = posterior_c2
        bias, scale = _log_variance(chain, variance)
        table[:, Column.LOG_VARIANCE_BIAS] = bias
        table[:, Column.LOG_VARIANCE_SCALE] = scale
        table[1:, Column.NOISE_SCALE] = 1
    else:
        c1, c2 = chain.mean_coefficients(eta)
        table[:, Column.MEAN_X0] = c1
        table[:, Column.MEAN_XT] = c2
        if eta > 0:
            log_variance = 2 * math.log(eta) + chain.posterior_log_variance
            table[1:, Column.LOG_VARIANCE_BIAS] = log_variance[1:]
            table[1:, Column.NOISE_SCALE] = 1

    log_alpha_bar = chain.log_alpha_bar
    high = log_alpha_bar.float().double()
    table[:, Column.POSTERIOR_LOG_VARIANCE] = chain.posterior_log_variance
    table[:, Column.SQRT_ALPHA_BAR] = chain.alpha_bar.sqrt()
    table[:, Column.SQRT_ONE_MINUS_ALPHA_BAR] = chain.one_minus_alpha_bar.sqrt()
    table[:, Column.LOG_ALPHA_BAR_HIGH] = high
    # -inf, at pure noise, has no remainder.
    table[:, Column.LOG_ALPHA_BAR_LOW] = torch.where(high.isinf(), 0.0, log_alpha_bar - high)
    table[:, Column.STEP] = steps.double()
    return table


def _log_variance(chain: Chain, variance: str) -> tuple[Tensor, Tensor]:
    """(u, w) with log_variance = u + w v (equation 15 for ``learned_range``)."""
    zero, one = torch.zeros_like(chain.beta), torch.ones_like(chain.beta)
    if variance == "learned_range":
        half_range = chain.log_variance_range / 2
        return chain.log_beta - half_range, half_range
    if variance == "learned":
        return zero, one
    small = chain.posterior_log_variance
    if variance == "fixed_small":
        return small, zero
    # beta~ at the first step, for a better likelihood of the decoder.
    return torch.cat([small[:1], chain.log_beta[1:]]), zero

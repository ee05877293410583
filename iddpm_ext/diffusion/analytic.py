"""Chains whose variances are computed, not learned: Analytic-DPM, and the two fixed choices.

Given x_0, a step of the sampler has variance lambda_t^2 (beta~_t in the ancestral chain, eta^2 beta~_t in
DDIM) and mean c1_t x_0 + c2_t x_t. As x_0 is unknown, the best normal distribution of x_{t-1} has variance

    sigma_t^2 = lambda_t^2 + c1_t^2 V_t,    V_t = E Var(x_0 | x_t) / d

which is equation 9 of Bao et al. 2022 with (1 - ab) / ab (1 - E|eps|^2 / d) for V_t.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from iddpm_ext.ops.columns import Column

from .process import Diffusion

# E|z| of a standard normal z.
_MEAN_SIZE = math.sqrt(2 / math.pi)


class AnalyticDiffusion(Diffusion):
    """`Diffusion` with the variances of its steps from V_t; respacing keeps V_t.

    Args:
        chain: whose steps these are.
        x_0_variance: V_t of every step of the training chain, float64 [T], positive.
        noise_levels: limits the noise of the last noisy step, which no later step removes, to so many
            of 256 levels on average; None for no limit, for likelihoods.

    Source: Bao et al. 2022, "Analytic-DPM", theorem 1 and appendix F.2.
    """

    _x_0_variance: Tensor
    _noise_levels: float | None

    def __init__(
        self, chain: Diffusion, x_0_variance: Tensor, noise_levels: float | None = None
    ) -> None:
        total = chain.num_train_timesteps
        if x_0_variance.shape != (total,) or not bool((x_0_variance > 0).all()):
            raise ValueError(
                f"AnalyticDiffusion: x_0_variance must be positive [{total}], "
                f"got {list(x_0_variance.shape)}"
            )
        self._set(**chain.__dict__)
        self._set(
            variance="fixed_small",
            _x_0_variance=x_0_variance.double().cpu(),
            _noise_levels=noise_levels,
            _tables={},
        )

    def table(
        self,
        device: torch.device | str = "cpu",
        *,
        sampler: str = "ddpm",
        eta: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """`Diffusion.table`, with noise for every eta of DDIM."""
        device = torch.device(device)
        key = (device, f"analytic {sampler}", float(eta) if sampler == "ddim" else 0.0, dtype)
        if key not in self._tables:
            plain = super().table(sampler=sampler, eta=eta, dtype=torch.float64)
            with torch.inference_mode(False):
                self._tables[key] = self._filled(plain.clone(), sampler, eta).to(dtype).to(device)
        return self._tables[key]

    def _filled(self, table: Tensor, sampler: str, eta: float) -> Tensor:
        posterior, unknown = self._parts(sampler, eta)
        log_variance = (posterior + unknown).log()
        if self._most_log_variance is not None:
            log_variance[1] = log_variance[1].clamp(max=self._most_log_variance)
        table[:, Column.LOG_VARIANCE_BIAS] = log_variance
        table[:, Column.LOG_VARIANCE_SCALE] = 0
        table[1:, Column.NOISE_SCALE] = 1
        return table

    def _parts(self, sampler: str, eta: float) -> tuple[Tensor, Tensor]:
        """lambda_t^2 and c1_t^2 V_t of every step, each float64 [T] on the CPU."""
        plain = Diffusion.table(self, sampler=sampler, eta=eta, dtype=torch.float64)
        share = 1.0 if sampler == "ddpm" else eta * eta
        posterior = share * plain[:, Column.POSTERIOR_LOG_VARIANCE].exp()
        posterior[0] = 0  # the table has the second step's in its place, as log 0 does not exist
        return posterior, plain[:, Column.MEAN_X0].square() * self._x_0_variance[self.timesteps]

    @property
    def _most_log_variance(self) -> float | None:
        """Of the last step that adds noise."""
        if self._noise_levels is None:
            return None
        return 2 * math.log(self._noise_levels * (2 / 255) / _MEAN_SIZE)

    def to_dict(self) -> dict[str, Any]:
        """As `Diffusion.to_dict`, with V_t. Not for checkpoints, which hold the moments instead."""
        return {
            **super().to_dict(),
            "x_0_variance": self._x_0_variance.tolist(),
            "noise_levels": self._noise_levels,
        }

    def __repr__(self) -> str:
        return super().__repr__().replace("fixed_small", "analytic")

    __hash__ = Diffusion.__hash__


def with_fixed_variance(chain: Diffusion, variance: str) -> Diffusion:
    """The chain with "fixed_small" (beta~) or "fixed_large" (beta), whatever its network learned."""
    fixed = object.__new__(Diffusion)
    fixed._set(**chain.__dict__)
    fixed._set(variance=variance, _tables={})
    return fixed

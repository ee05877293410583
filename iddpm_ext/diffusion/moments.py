"""Moments E|eps_theta|^2 of a network's outputs, and the variances and schedules that follow from them.

For the best predictor, the variance of x_0 given x_t, averaged over x_t and the dimensions, is

    V_t = (1 - alpha_bar_t) / alpha_bar_t (1 - E|eps_theta(x_t, t)|^2 / d)        (Bao et al. 2022, theorem 1)

and for images in [-1, 1] it is at most 1, the variance of -1 and 1 with equal probability (theorem 2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .process import Diffusion
from .shortest import JumpTerms, shortest_paths
from .table import Chain

# Smaller values of V_t are rounding errors.
_LEAST_VARIANCE = 1e-10


@dataclass(frozen=True, eq=False)
class Moments:
    """E|eps_theta|^2 / d of some steps of a training chain.

    timesteps: int64 [G], ascending indices in the training chain. eps_square: float64 [G].
    """

    timesteps: Tensor
    eps_square: Tensor

    def x_0_variance(self, chain: Diffusion) -> Tensor:
        """V_t of every step of the training chain of `chain`, float64 [T], at least 1e-10 and at most 1.

        log V_t is interpolated over log-SNR; beyond the known steps the nearest value is used. The result
        never falls with t, as V_t cannot; the measured values can, near pure noise, where
        1 - E|eps_theta|^2 / d cancels.
        """
        known = training_log_snr(chain)[self.timesteps]
        variance = ((-known).exp() * (1 - self.eps_square)).clamp(_LEAST_VARIANCE, 1)
        return over_log_snr(chain, self.timesteps, variance.cummax(0).values.log()).exp()

    def best_steps(self, chain: Diffusion, count: int) -> list[int]:
        """The `count` steps with the lowest bound for analytic variances, as indices in the training chain.

        The terms have a closed form: with the optimal variance sigma^2 = lambda^2 + c1^2 V_t, E KL(q || p) of
        a jump is log(sigma^2 / lambda^2) / 2 per dimension (Bao et al. 2022, theorem 3).
        """
        paths = shortest_paths(self._jump_terms(chain), count)
        if count not in paths:
            raise ValueError(
                f"best_steps: count must be from 2 to {len(self.timesteps)}, got {count}"
            )
        return self.timesteps[paths[count]].tolist()

    def _jump_terms(self, chain: Diffusion) -> JumpTerms:
        variance = self.x_0_variance(chain)[self.timesteps]
        log_snr = training_log_snr(chain)[self.timesteps]
        alpha_bar, rest = log_snr.sigmoid(), (-log_snr).sigmoid()
        # Entry (i, j): the jump from step i to the earlier step j.
        beta = 1 - alpha_bar[:, None] / alpha_bar[None, :]
        posterior = beta * rest[None, :] / rest[:, None]
        c1 = alpha_bar[None, :].sqrt() * beta / rest[:, None]
        jumps = (c1.square() * variance[:, None] / posterior).log1p() / (2 * math.log(2))
        # The decoder's bits: -log2 of a normal density times the width of an 8-bit level, at least 0.
        density = (2 * math.pi * math.e * variance).log2() / 2 + math.log2(127.5)
        decoders = density.clamp(min=0)[:, None].expand_as(jumps)
        prior = torch.full_like(alpha_bar, torch.inf)
        prior[-1] = 0  # all chains end at the last step, so L_T is the same constant
        earlier = torch.ones_like(jumps, dtype=torch.bool).tril(-1)
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        return JumpTerms(
            torch.where(earlier, jumps, zero), torch.where(earlier.T, decoders, zero), prior
        )

    def to_extra(self, weights: str) -> dict[str, Any]:
        """The entry `extra["moments"]` of a checkpoint; weights: from `weights_fingerprint`."""
        return {
            "timesteps": self.timesteps.tolist(),
            "eps_square": self.eps_square.tolist(),
            "weights": weights,
        }

    @classmethod
    def from_extra(
        cls, who: str, extra: Mapping[str, Any], weights: str, chain: Diffusion
    ) -> Moments:
        """The moments in a checkpoint's `extra`, checked to belong to these weights and this chain.

        Raises ValueError, in the name of the function `who`.
        """
        found = extra.get("moments")
        if found is None:
            raise ValueError(
                f"{who}: variance must go without the checkpoint's moments where it has none (iddpm steps "
                "stores them), got 'analytic'"
            )
        if found.get("weights") != weights:
            raise ValueError(
                f"{who}: variance must come from moments of these weights, got those of "
                f"{found.get('weights')!r} for {weights!r}: run iddpm steps again"
            )
        timesteps = torch.tensor(found["timesteps"], dtype=torch.int64, device="cpu")
        eps_square = torch.tensor(found["eps_square"], dtype=torch.float64, device="cpu")
        total = chain.num_train_timesteps
        sound = (
            len(timesteps) == len(eps_square) >= 2
            and are_ascending(timesteps, total)
            and bool(eps_square.isfinite().all())
        )
        if not sound:
            raise ValueError(
                f"{who}: variance must come from moments of ascending steps of a chain of {total}, "
                f"got {len(timesteps)} steps and {len(eps_square)} moments"
            )
        return cls(timesteps, eps_square)


def training_log_snr(chain: Diffusion) -> Tensor:
    """log(alpha_bar / (1 - alpha_bar)) of every step of the training chain, float64 [T]."""
    whole = Chain.from_fixed_point(chain._train_alpha_bars)
    return whole.log_alpha_bar - whole.one_minus_alpha_bar.log()


def over_log_snr(chain: Diffusion, timesteps: Tensor, values: Tensor) -> Tensor:
    """Values float64 [G] at training steps int64 [G], interpolated over log-SNR to every one, float64 [T].

    Beyond the first and the last of the steps, their values stand.
    """
    # np.interp needs ascending abscissas, and log-SNR falls with t.
    places = -training_log_snr(chain).numpy()
    return torch.from_numpy(np.interp(places, places[timesteps.numpy()], values.numpy()))


def are_ascending(timesteps: Tensor, total: int) -> bool:
    """Whether steps int64 [G >= 1] are ascending indices in a training chain of `total`."""
    return (
        bool((timesteps.diff() > 0).all()) and 0 <= int(timesteps[0]) and int(timesteps[-1]) < total
    )


def spread_steps(chain: Diffusion, count: int) -> list[int]:
    """At most `count` steps of a chain, ascending, both ends included: half evenly in t, half in log-SNR."""
    total = chain.num_timesteps
    if count >= total:
        return list(range(total))
    even = np.linspace(0, total - 1, count // 2).round().astype(int)
    log_snr = -training_log_snr(chain)[chain.timesteps].numpy()
    wanted = np.linspace(log_snr[0], log_snr[-1], count - count // 2)
    nearest = np.interp(wanted, log_snr, np.arange(total)).round().astype(int)
    return sorted({*even.tolist(), *nearest.tolist()})

"""Variances of every pixel: SN-DDPM's and OCM-DPM's optimal diagonal covariance, from what a head predicts.

Heads of the network predict how many times the mean V_t of its step the variance of x_0 given x_t is, for
every element; between the noise levels that they belong to they are interpolated. The best diagonal
covariance of x_{t-1} given the network's mean is then, with lambda_t and c1_t of the forward posterior (see
`analytic.py`),

    sigma_t^2(x_t) = lambda_t^2 + c1_t^2 V_t exp(h(x_t, t)).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iddpm_ext.ops.columns import Column

from .analytic import AnalyticDiffusion
from .moments import are_ascending, over_log_snr
from .process import Diffusion

# Of h: beyond it a head that never saw such an image would be believed anything.
_MOST = 10.0


class CovarianceDiffusion(AnalyticDiffusion):
    """`AnalyticDiffusion` whose network has K heads: its output is [N, C + K C, H, W].

    `with_log_variance` makes of that an output [N, 2C, H, W] with the log-variance in its second half, which
    is what this chain's tables and methods read.

    Args:
        chain, noise_levels: as of `AnalyticDiffusion`.
        x_0_variance: V_t of every training step, the mean over x_t and the elements; float64 [T].
        shares: of the heads in h at every step of the training chain, [T, K].
    """

    _shares: Tensor

    def __init__(
        self,
        chain: Diffusion,
        x_0_variance: Tensor,
        shares: Tensor,
        noise_levels: float | None = None,
    ) -> None:
        super().__init__(chain, x_0_variance, noise_levels)
        self._set(variance="learned", _shares=shares.double().cpu())

    def with_log_variance(
        self, model_output: Tensor, t: Tensor, sampler: str = "ddpm", eta: float = 0.0
    ) -> Tensor:
        """The output of network and heads -> [N, 2C, H, W]; t: int64 [N], steps of this chain."""
        work = torch.promote_types(model_output.dtype, torch.float32)
        row = self._terms(t.device, sampler, eta)[t].to(work)
        known, rest = row[:, 0, None, None, None], row[:, 1, None, None, None]
        channels = model_output.shape[1] // (row.shape[1] - 1)
        h = mixed(model_output[:, channels:].to(work), row[:, 2:])
        ratio = h.clamp(-_MOST, _MOST).exp()
        log_variance = (known + rest * ratio).log()
        most = self._most_log_variance
        if most is not None:
            limited = (t == 1)[:, None, None, None]
            log_variance = torch.where(limited, log_variance.clamp(max=most), log_variance)
        return torch.cat([model_output[:, :channels].to(work), log_variance], dim=1)

    def _terms(self, device: torch.device, sampler: str, eta: float) -> Tensor:
        """lambda_t^2, c1_t^2 V_t and the heads' shares of every step, float64 [T, 2 + K]; kept for a walk."""
        key = (device, f"terms {sampler}", float(eta), torch.float64)
        if key not in self._tables:
            with torch.inference_mode(False):
                parts = torch.stack(self._parts(sampler, eta), dim=1)
                terms = torch.cat([parts, self._shares[self.timesteps]], dim=1)
                self._tables[key] = terms.to(device)
        return self._tables[key]

    def _filled(self, table: Tensor, sampler: str, eta: float) -> Tensor:
        table[:, Column.LOG_VARIANCE_BIAS] = 0
        table[:, Column.LOG_VARIANCE_SCALE] = 1
        table[1:, Column.NOISE_SCALE] = 1
        return table

    def __repr__(self) -> str:
        return Diffusion.__repr__(self).replace("learned", "optimal")

    __hash__ = Diffusion.__hash__


def mixed(outputs: Tensor, shares: Tensor) -> Tensor:
    """h [N, C, H, W] from the heads' outputs [N, K C, H, W] and the shares [N, K] that they have in it."""
    return (outputs.unflatten(1, (shares.shape[1], -1)) * shares[:, :, None, None, None]).sum(1)


def shares_of(chain: Diffusion, knots: Tensor) -> Tensor:
    """What share heads of the training steps `knots` int64 [K] have in every training step, float64 [T, K].

    Linear over log-SNR between two knots; beyond the first and the last, theirs alone.
    """
    each = torch.eye(len(knots), dtype=torch.float64, device="cpu")
    return torch.stack([over_log_snr(chain, knots, one) for one in each], dim=1)


@dataclass(frozen=True, eq=False)
class Covariance:
    """Heads that predict variances, and the means that they predict the ratio to.

    weight: float32 [K C, width, 3, 3] and bias: float32 [K C], of a convolution beside the network's last.
    knots: int64 [K], ascending, the training steps that the heads belong to. timesteps: int64 [G], others.
    x_0_variance: float64 [G], the squared error of the network's clamped x_0 at these, a mean over images,
    noise and elements.
    """

    weight: Tensor
    bias: Tensor
    knots: Tensor
    timesteps: Tensor
    x_0_variance: Tensor

    def chain(self, diffusion: Diffusion, noise_levels: float | None) -> CovarianceDiffusion:
        """The chain that reads the head: between the known steps log V_t is interpolated over log-SNR."""
        mean = over_log_snr(diffusion, self.timesteps, self.x_0_variance.log()).exp()
        return CovarianceDiffusion(diffusion, mean, shares_of(diffusion, self.knots), noise_levels)

    def to_extra(self, weights: str) -> dict[str, Any]:
        """What a checkpoint's `extra["covariance"]` holds; weights: of `weights_fingerprint`."""
        return {
            "weight": _rounded(self.weight),
            "bias": _rounded(self.bias),
            "knots": self.knots.tolist(),
            "timesteps": self.timesteps.tolist(),
            "x_0_variance": self.x_0_variance.tolist(),
            "weights": weights,
        }

    @classmethod
    def from_extra(
        cls, who: str, extra: Mapping[str, Any], weights: str, shape: tuple[int, int], total: int
    ) -> Covariance:
        """That of a checkpoint's `extra`, which must be of the weights `weights`.

        shape: (C, width) of the network. total: steps of the training chain.

        Raises ValueError, which names the function `who`.
        """
        found = extra.get("covariance")
        if found is None:
            raise ValueError(
                f"{who}: variance must go without a head where the checkpoint has none (iddpm covariance "
                "trains one), got 'optimal'"
            )
        if found.get("weights") != weights:
            raise ValueError(
                f"{who}: variance must come from a head of these weights, got that of "
                f"{found.get('weights')!r} for {weights!r}: run iddpm covariance again"
            )
        head = cls(
            torch.tensor(found["weight"], dtype=torch.float32, device="cpu"),
            torch.tensor(found["bias"], dtype=torch.float32, device="cpu"),
            torch.tensor(found["knots"], dtype=torch.int64, device="cpu"),
            torch.tensor(found["timesteps"], dtype=torch.int64, device="cpu"),
            torch.tensor(found["x_0_variance"], dtype=torch.float64, device="cpu"),
        )  # fmt: skip
        steps, means, channels = head.timesteps, head.x_0_variance, len(head.knots) * shape[0]
        sound = (
            head.weight.shape == (channels, shape[1], 3, 3)
            and head.bias.shape == (channels,)
            and are_ascending(head.knots, total)
            and bool(head.weight.isfinite().all() and head.bias.isfinite().all())
            and len(steps) == len(means) >= 2
            and are_ascending(steps, total)
            and bool((means > 0).all() and means.isfinite().all())
        )
        if not sound:
            raise ValueError(
                f"{who}: variance must come from {len(head.knots)} heads of {shape[0]} channels from "
                f"{shape[1]} for a chain of {total}, got {list(head.weight.shape)}, {len(steps)} steps and "
                f"{len(means)} means"
            )
        return head


def _rounded(values: Tensor) -> Any:
    """Nested lists of numbers with seven digits."""
    if values.dim() > 1:
        return [_rounded(part) for part in values]
    return [float(f"{value:.7g}") for value in values.tolist()]

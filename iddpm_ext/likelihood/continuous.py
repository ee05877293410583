"""A network in continuous time: its prediction at any log-SNR between those of its chain's ends.

Between the chain's steps log-SNR is interpolated linearly in t, and the network gets a fractional t.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from iddpm_ext.diffusion.moments import training_log_snr
from iddpm_ext.engines.spec import NetworkSpec
from iddpm_ext.likelihood.journal import Journal
from iddpm_ext.likelihood.request import LikelihoodRequest
from iddpm_ext.sampling.distributed import Processes

_PREDICTIONS = ("epsilon", "x_0")


class ContinuousTime:
    """The map between log-SNR and the network's timestep input. spec: with the whole training chain.

    Raises ValueError for a respaced chain, or a network that predicts neither epsilon nor x_0.
    """

    def __init__(self, spec: NetworkSpec, method: str) -> None:
        chain = spec.diffusion
        if chain.num_timesteps != chain.num_train_timesteps:
            raise ValueError(
                f"{spec.who}: steps must be None with method {method!r}, which has no steps, got {chain!r}"
            )
        if chain.prediction not in _PREDICTIONS:
            raise ValueError(
                f"{spec.who}: method must be 'bound' or 'full' for a network that predicts "
                f"{chain.prediction}, got {method!r}"
            )
        self._log_snr = training_log_snr(chain).numpy()
        self._scale = 1000 / chain.num_train_timesteps if chain.rescale_timesteps else 1.0
        self._predicts_x_0 = chain.prediction == "x_0"
        self.most, self.least = float(self._log_snr[0]), float(self._log_snr[-1])

    def timesteps(self, log_snr: Tensor) -> Tensor:
        """t at these log-SNR, float64, fractional."""
        steps = np.arange(len(self._log_snr), dtype=np.float64)
        at = np.interp(-log_snr.double().numpy(), -self._log_snr, steps)
        return torch.from_numpy(np.atleast_1d(at)).view(log_snr.shape)

    def told(self, log_snr: Tensor) -> Tensor:
        """The network's timestep input, float32."""
        return (self.timesteps(log_snr) * self._scale).float()

    def eps(self, x_t: Tensor, out: Tensor, log_snr: Tensor, clip: bool) -> Tensor:
        """The predicted noise, like x_t. out: [N, C or 2C, H, W]. log_snr: float64 [N] on the CPU."""
        predicted = out[:, : x_t.shape[1]]
        if not clip and not self._predicts_x_0:
            return predicted
        root, rest = (part.to(x_t)[:, None, None, None] for part in scales(log_snr))
        x_0 = predicted if self._predicts_x_0 else (x_t - rest * predicted) / root
        return (x_t - root * (x_0.clamp(-1, 1) if clip else x_0)) / rest


def scales(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar), like log_snr."""
    return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()


def by_image(
    request: LikelihoodRequest,
    journal: Journal,
    processes: Processes,
    width: int,
    evaluate: Callable[[Tensor], Tensor],
    bar: Callable[[int], object],
) -> Tensor:
    """Runs `evaluate`, indices int64 [n] -> float32 [n, width], on all images in batches.

    They are divided among the processes, and results are kept on disk.
    """
    count = len(request.x_0)
    values = torch.full((count, width), torch.nan, dtype=torch.float32, device="cpu")
    values[journal.ids] = journal.values
    every = torch.arange(count, dtype=torch.int64, device="cpu")
    todo = values.isnan().any(1) & (every % processes.size == processes.rank)
    bar(count - int(todo.sum()))
    mine = todo.nonzero()[:, 0]
    for part in mine.split(min(request.batch_size, 64)) if len(mine) else ():
        values[part] = evaluate(part)
        journal.append(part, values[part])
        bar(len(part))
    for rows, theirs in processes.gather((mine, values[mine])):
        values[rows] = theirs
    return values

"""Which step t each training example gets, and the weight that keeps the objective unbiased.

t is a pure function of the seed, the example's global position and, for the importance sampler, the losses so
far: it does not depend on how a batch is split over processes. Nothing here makes the host wait for a device.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from iddpm_ext.random import STREAM_CHOICE, NoiseKey, integers, uniform
from iddpm_ext.scalars import plain

TIMESTEP_SAMPLERS = ("uniform", "loss-second-moment", "log-normal")


class WeightedTimesteps(NamedTuple):
    """t int64 [N] and weights float32 [N] by which to multiply each example's loss."""

    t: Tensor
    weights: Tensor


class TimestepSampler(Protocol):
    """The interface of timestep samplers."""

    def sample(self, samples: Tensor) -> WeightedTimesteps:
        """Steps and weights of the examples at these global positions, int64 [N]."""

    def update(self, t: Tensor, losses: Tensor, *, capacity: int | None = None) -> None:
        """Learns from the unweighted losses [N] of the steps t int64 [N]."""

    def state_dict(self) -> dict[str, Tensor]:
        """The learnt state, for the checkpoint."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what ``state_dict`` returned."""


class UniformTimestepSampler:
    """Every step equally likely, every weight 1.

    Args:
        num_timesteps: T.
        seed: of the draws, stream 3 of the noise contract.
    """

    def __init__(self, num_timesteps: int, *, seed: int = 0) -> None:
        num_timesteps, seed = plain((num_timesteps, seed))
        _check_positive("UniformTimestepSampler", "num_timesteps", num_timesteps)
        self.num_timesteps = num_timesteps
        self.seed = seed

    def sample(self, samples: Tensor) -> WeightedTimesteps:
        """Steps of the examples at these global positions (iteration * global batch + position).

        Args:
            samples: int64 [N]; the result lies on its device.
        """
        key = NoiseKey(self.seed, STREAM_CHOICE, samples, 0)
        t = integers(key, self.num_timesteps, (len(samples), 1))[:, 0]
        return WeightedTimesteps(t, torch.ones(len(t), device=t.device, dtype=torch.float32))

    def update(self, t: Tensor, losses: Tensor, *, capacity: int | None = None) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore; ValueError for another sampler's state."""
        _check_state("UniformTimestepSampler", state, {})


class LogNormalTimestepSampler:
    """Noise levels sigma_t = sqrt((1 - ab_t) / ab_t) from a log-normal distribution, every weight 1.

    The weights are no oversight: this changes the objective, as EDM wants it. Of a chain's steps each
    stands for the log sigma nearest to it.

    Args:
        alphas_cumprod: of the chain, float64 [T], falling, all above 0.
        seed: of the draws, stream 3 of the noise contract.
        mean, deviation: of log sigma, P_mean and P_std.
        device: where probabilities lie.

    Source: Karras et al. 2022, table 1.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        *,
        seed: int = 0,
        mean: float = -1.2,
        deviation: float = 1.2,
        device: torch.device | str = "cpu",
    ) -> None:
        seed, mean, deviation = plain((seed, mean, deviation))
        if not bool((alphas_cumprod > 0).all()):
            raise ValueError(
                "LogNormalTimestepSampler: alphas_cumprod must be above 0, as sigma has no largest in pure "
                f"noise, got {float(alphas_cumprod.min())}"
            )
        if not deviation > 0:
            raise ValueError(
                f"LogNormalTimestepSampler: deviation must be above 0, got {deviation}"
            )
        log_sigma = (torch.log1p(-alphas_cumprod) - alphas_cumprod.log()) / 2
        inner = ((log_sigma[1:] + log_sigma[:-1]) / 2 - mean) / deviation
        self.num_timesteps, self.seed = len(log_sigma), seed
        one = torch.ones(1, dtype=torch.float64, device="cpu")
        self._cumulative = torch.cat([torch.special.ndtr(inner), one]).to(device)

    def probabilities(self) -> Tensor:
        """p_t, float64 [T]."""
        return torch.diff(self._cumulative, prepend=torch.zeros_like(self._cumulative[:1]))

    def sample(self, samples: Tensor) -> WeightedTimesteps:
        """Steps of the examples at these global positions (iteration * global batch + position).

        Args:
            samples: int64 [N] on the sampler's device.
        """
        key = NoiseKey(self.seed, STREAM_CHOICE, samples, 0)
        u = uniform(key, (len(samples), 1), self._cumulative.device)[:, 0].double()
        t = torch.searchsorted(self._cumulative, u, right=True).clamp(max=self.num_timesteps - 1)
        return WeightedTimesteps(t, torch.ones(len(t), device=t.device, dtype=torch.float32))

    def update(self, t: Tensor, losses: Tensor, *, capacity: int | None = None) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to take up; ValueError where another sampler's state is given."""
        _check_state("LogNormalTimestepSampler", state, {})


class LossSecondMomentSampler:
    """Importance sampling of t by the losses' second moments.

    p_t is proportional to sqrt(E[L_t^2]), E over the last ``history`` losses of step t, mixed
    with a little of the uniform distribution; uniform until every step has a full history
    (equation 18). weight_t = 1 / (T p_t).

    Args:
        num_timesteps: T.
        seed: of the draws, stream 3 of the noise contract.
        history: losses kept for each step.
        uniform_prob: share of the uniform distribution, in [0, 1].
        device: of the history and of the probabilities.

    Source: Nichol & Dhariwal 2021, section 3.3.
    """

    def __init__(
        self,
        num_timesteps: int,
        *,
        seed: int = 0,
        history: int = 10,
        uniform_prob: float = 1e-3,
        device: torch.device | str = "cpu",
    ) -> None:
        num_timesteps, seed, history, uniform_prob = plain(
            (num_timesteps, seed, history, uniform_prob)
        )
        _check_positive("LossSecondMomentSampler", "num_timesteps", num_timesteps)
        _check_positive("LossSecondMomentSampler", "history", history)
        if not 0 <= uniform_prob <= 1:
            raise ValueError(
                f"LossSecondMomentSampler: uniform_prob must be from 0 to 1, got {uniform_prob}"
            )
        self.num_timesteps = num_timesteps
        self.seed = seed
        self.history = history
        self.uniform_prob = uniform_prob
        # Row T collects entries to ignore: padding of uneven batches, surplus, non-finite losses.
        self._losses = torch.zeros(num_timesteps + 1, history, dtype=torch.float64, device=device)
        self._counts = torch.zeros(num_timesteps + 1, dtype=torch.int64, device=device)

    def probabilities(self) -> Tensor:
        """p_t, float64 [T], on the sampler's device."""
        moment = self._losses[:-1].square().mean(1).sqrt()
        total = moment.sum()
        learned = (1 - self.uniform_prob) * moment / total + self.uniform_prob / self.num_timesteps
        ready = (self._counts[:-1] >= self.history).all() & (total > 0)
        return torch.where(ready, learned, 1 / self.num_timesteps)

    def sample(self, samples: Tensor) -> WeightedTimesteps:
        """Steps of the examples at these global positions (iteration * global batch + position).

        Args:
            samples: int64 [N] on the sampler's device.
        """
        probabilities = self.probabilities()
        cumulative = probabilities.cumsum(0)
        key = NoiseKey(self.seed, STREAM_CHOICE, samples, 0)
        u = uniform(key, (len(samples), 1), probabilities.device)[:, 0] * cumulative[-1]
        # right=True, so that a step of probability 0 is never chosen.
        t = torch.searchsorted(cumulative, u, right=True).clamp(max=self.num_timesteps - 1)
        return WeightedTimesteps(t, (1 / (self.num_timesteps * probabilities[t])).float())

    def update(self, t: Tensor, losses: Tensor, *, capacity: int | None = None) -> None:
        """Adds losses to the history, those of all processes in the order of the ranks.

        With an initialised process group every rank must call this; batch sizes may differ.

        Args:
            t: int64 [N].
            losses: [N], unweighted; entries that are not finite are ignored.
            capacity: the largest N of any rank, if known; otherwise the ranks agree on it first, for
                which the host waits.

        Raises:
            ValueError: shapes differ, or N exceeds capacity.
        """
        if t.dim() != 1 or t.dtype != torch.int64 or losses.shape != t.shape:
            raise ValueError(
                "LossSecondMomentSampler: t and losses must be int64 [N] and floating [N], got "
                f"{t.dtype} {tuple(t.shape)} and {losses.dtype} {tuple(losses.shape)}"
            )
        t, losses = t.to(self._counts.device), losses.detach().to(self._losses)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            t, losses = _gather(t, losses, capacity, self.num_timesteps)
        self._enter(torch.where(losses.isfinite(), t, self.num_timesteps), losses)

    def _enter(self, t: Tensor, losses: Tensor) -> None:
        """First in, first out for each step, in the order of the losses."""
        t, order = t.sort(stable=True)
        added = torch.zeros_like(self._counts).scatter_add_(0, t, torch.ones_like(t))
        rank = torch.arange(len(t), device=t.device, dtype=torch.int64) - torch.searchsorted(t, t)
        kept = rank >= added[t] - self.history
        row = torch.where(kept, t, self.num_timesteps)
        self._losses[row, (self._counts[t] + rank) % self.history] = losses[order]
        self._counts += added

    def state_dict(self) -> dict[str, Tensor]:
        """``losses`` float64 [T, history], a ring buffer for each step, and ``counts`` int64 [T]."""
        return {"losses": self._losses[:-1].clone(), "counts": self._counts[:-1].clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what ``state_dict`` returned; ValueError if its shapes do not fit."""
        _check_state("LossSecondMomentSampler", state, self.state_dict())
        self._losses[:-1].copy_(state["losses"])
        self._counts[:-1].copy_(state["counts"])


def make_timestep_sampler(
    name: str,
    num_timesteps: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    alphas_cumprod: Tensor | None = None,
) -> TimestepSampler:
    """The sampler called ``"uniform"``, ``"loss-second-moment"`` or ``"log-normal"``.

    alphas_cumprod: of the chain, which ``"log-normal"`` needs.
    """
    if name == "uniform":
        return UniformTimestepSampler(num_timesteps, seed=seed)
    if name == "loss-second-moment":
        return LossSecondMomentSampler(num_timesteps, seed=seed, device=device)
    if name == "log-normal":
        if alphas_cumprod is None:
            raise ValueError(
                "make_timestep_sampler: alphas_cumprod must be given for log-normal, got None"
            )
        return LogNormalTimestepSampler(alphas_cumprod, seed=seed, device=device)
    raise ValueError(
        f"make_timestep_sampler: name must be one of {', '.join(TIMESTEP_SAMPLERS)}, got {name!r}"
    )


def _gather(t: Tensor, losses: Tensor, capacity: int | None, padding: int) -> tuple[Tensor, Tensor]:
    """The batches of all ranks, in their order, padded with ``padding`` as t."""
    if capacity is None:
        largest = torch.tensor(len(t), dtype=torch.int64, device=t.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        capacity = int(largest)
    if len(t) > capacity:
        raise ValueError(
            f"LossSecondMomentSampler: N must be at most the capacity {capacity}, got {len(t)}"
        )
    packed = losses.new_zeros(2, capacity)
    packed[0] = padding
    packed[0, : len(t)] = t  # whole numbers below 2^53: exact in float64
    packed[1, : len(t)] = losses
    gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, packed)
    everything = torch.cat(gathered, dim=1)
    return everything[0].long(), everything[1]


def _check_positive(owner: str, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{owner}: {name} must be an int of at least 1, got {value!r}")


def _check_state(owner: str, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    got = {name: tuple(tensor.shape) for name, tensor in state.items()}
    want = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if got != want:
        raise ValueError(f"{owner}: state must be {want}, got {got}")

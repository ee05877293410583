"""The design of the estimator: which steps are evaluated for which image, and with what weight.

An image's bound is B_i = L_T + sum_t E[l_it], l_it the term of step t for one draw of the noise. Every
design is a list of pairs of evaluations, and its estimate is the sum of a + b over the pairs,
a = scale_a l_a and b = scale_b l_b:

* a single step: two draws of its noise, scale 1/2 each. E[a + b] = E[l_t].
* a stratum: a proposal p maps the steps t >= e to intervals of length p_t in [0, 1), which is divided into K
  equal strata with two independent points each. With scale 1 / (2 K p_t) the K pairs add up to
  sum_{t >= e} E[l_t] in expectation.

So the estimate of every image is unbiased for any p > 0; p comes from other draws (`make_plan`), and given p
the images are independent. In both kinds a and b are independent and identically distributed:
Var(a + b) = E[(a - b)^2], and sum (a - b)^2 is an unbiased estimate of the variance, over t and noise. The
key of the noise is (image, step in the training chain, how often this image drew that step before), so that
results do not depend on the order of evaluation.

The full sum draws every step once. Steps whose terms differ much from their neighbours' (`doubled`) are drawn
twice, as above; the others form pairs of neighbours with scale 1, for which (a - b)^2 overestimates the
variance by the square of the difference of their terms, which is small.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iddpm_ext.random import STREAM_CHOICE, NoiseKey, uniform

#: The `draw` of the pilot's noise; those of replicates count from 0.
PILOT_DRAW = 1 << 20
_DOUBLED = 64
# The `draw` of these choices in stream 3, where 0 is for labels and 1 for the order of the data.
_CHOICE_DRAW = 2
_PILOT_IMAGES = 16
_PILOT_STEPS = 256
# Share of the uniform distribution in the proposal: no weight exceeds T / _UNIFORM.
_UNIFORM = 0.05


@dataclass(frozen=True, eq=False)
class Design:
    """The evaluations of N images: columns 2k and 2k + 1 are a pair, except where M = 1.

    t: int64 [N, M], steps of the chain. scale: float64 [N, M]. draw: int64 [N, M], the replicate of the
    noise of (image, t).
    """

    t: Tensor
    scale: Tensor
    draw: Tensor


@dataclass(frozen=True)
class Plan:
    """How a budget is spent: `pilot_images` and `pilot_steps` int64, then `columns` evaluations per image.

    columns is None for the full sum.
    """

    pilot_images: Tensor
    pilot_steps: Tensor
    columns: int | None


def make_plan(images: int, timesteps: Tensor, budget: float | None) -> Plan:
    """Divides `budget` evaluations per image (at least 1; None: all steps) between pilot and estimate.

    timesteps: int64 [T], the chain's steps in the training chain.
    """
    none, num_timesteps = torch.empty(0, dtype=torch.int64, device="cpu"), len(timesteps)
    if budget is None or budget >= num_timesteps + int(doubled(timesteps).sum()):
        return Plan(none, none, None)
    total = int(images * budget)
    columns = total // images
    pilot_images, pilot_steps = none, none
    # Fewer than three evaluations per image leave none for a pilot.
    allowed = min(total // 8, _PILOT_IMAGES * _PILOT_STEPS)
    if columns >= 3 and allowed >= 8:
        count = min(images, _PILOT_IMAGES, max(1, allowed // 24))
        pilot_images = torch.arange(count, dtype=torch.int64, device="cpu") * images // count
        pilot_steps = _geometric(num_timesteps, min(_PILOT_STEPS, allowed // count))
        columns = (total - len(pilot_images) * len(pilot_steps)) // images
    return Plan(pilot_images, pilot_steps, columns if columns == 1 else columns // 2 * 2)


def doubled(timesteps: Tensor) -> Tensor:
    """Which steps the full sum draws twice, bool [T]: those within 64 jumps (t_i - t_{i-1}) of t = 0.

    Terms fall like jump / t^2, so the terms of all others differ from the next one by some 3 % at most.
    """
    jump = timesteps.diff(prepend=timesteps[:1] - 1)
    return timesteps < _DOUBLED * jump


def full_design(images: int, timesteps: Tensor) -> Design:
    """The design of the full sum; see the docstring of this file. timesteps: int64 [T]."""
    twice_at = doubled(timesteps)
    twice, once = twice_at.nonzero()[:, 0], (~twice_at).nonzero()[:, 0]
    if len(once) % 2:
        twice, once = torch.cat([twice, once[-1:]]), once[:-1]
    t = torch.cat([twice.repeat_interleave(2), once])
    scale = torch.ones(len(t), dtype=torch.float64, device="cpu")
    draw = torch.zeros_like(t)
    scale[: 2 * len(twice)] = 0.5
    draw[1 : 2 * len(twice) : 2] = 1
    return Design(*(column.expand(images, -1) for column in (t, scale, draw)))


def sampled_design(images: int, columns: int, proposal: Tensor, seed: int) -> Design:
    """`columns` evaluations of each image, 1 or an even number.

    proposal: float64 [T], positive, sums to 1.
    """
    alone = _alone(proposal, columns // 2)
    rest = columns - 2 * alone
    conditional = proposal[alone:] / proposal[alone:].sum()
    key = NoiseKey(
        seed, STREAM_CHOICE, torch.arange(images, dtype=torch.int64, device="cpu"), 0, _CHOICE_DRAW
    )
    part = torch.arange(rest, dtype=torch.int64, device="cpu") // 2
    point = (uniform(key, (images, rest)) + part) / max(1, rest // 2)
    # right=True: a point on a border belongs to the next step.
    chosen = torch.searchsorted(conditional.cumsum(0), point, right=True)
    chosen = chosen.clamp(max=len(conditional) - 1)
    first = torch.arange(2 * alone, dtype=torch.int64, device="cpu") // 2
    t = torch.cat([first.expand(images, -1), chosen + alone], dim=1)
    scale = torch.cat(
        [
            torch.full((images, 2 * alone), 0.5, dtype=torch.float64, device="cpu"),
            1 / (rest * conditional[chosen]),
        ],
        dim=1,
    )
    return Design(t, scale, _occurrence(t))


def _alone(proposal: Tensor, pairs: int) -> int:
    """How many of the first steps get a pair of their own: those of at least half a stratum's mass.

    Their terms are the largest and vary the most over the images. At least one pair is left for the others.
    """
    left, alone = 1.0, 0
    while alone < min(pairs, len(proposal)) - 1:
        if float(proposal[alone]) * (pairs - alone) < 0.5 * left:
            break
        left -= float(proposal[alone])
        alone += 1
    return alone


def _occurrence(t: Tensor) -> Tensor:
    """How many earlier columns of the row hold the same step, [N, M]."""
    ordered, order = t.sort(dim=1, stable=True)
    ordered = ordered.contiguous()
    rank = torch.arange(t.shape[1], dtype=torch.int64, device="cpu") - torch.searchsorted(
        ordered, ordered
    )
    return torch.empty_like(t).scatter_(1, order, rank)


def learn_proposal(steps: Tensor, terms: Tensor, num_timesteps: int) -> Tensor:
    """A proposal from the pilot: proportional to the root mean square of the terms, float64 [T].

    Between the pilot's steps its logarithm is interpolated over log(t + 1). Without a pilot, 1 / (t + 1).

    steps: int64 [G], ascending. terms: [P, G] of P images.
    """
    log_t = np.log1p(np.arange(num_timesteps))
    size = 1 / (1.0 + torch.arange(num_timesteps, dtype=torch.float64, device="cpu"))
    if len(steps):
        root = terms.double().square().mean(0).sqrt()
        if float(root.max()) > 0:
            # With an L_t of 0, its neighbours would never be drawn.
            root = root.clamp(min=1e-9 * float(root.max()))
            log_root = np.interp(log_t, np.log1p(steps.numpy()), root.log().numpy())
            size = torch.from_numpy(np.exp(log_root))
    return (1 - _UNIFORM) * size / size.sum() + _UNIFORM / num_timesteps


def _geometric(num_timesteps: int, count: int) -> Tensor:
    """Distinct steps from 0 to T - 1, at most `count`, evenly spread over log(t + 1)."""
    if count >= num_timesteps:
        return torch.arange(num_timesteps, dtype=torch.int64, device="cpu")
    spread = np.geomspace(1, num_timesteps, max(count, 2)) - 1
    return torch.from_numpy(np.unique(spread.round().astype(np.int64)))

"""Optimal step schedules: the K steps of a chain whose respaced chain has the best bound.

The bound of a chain is the sum of the terms L(t -> s) of its jumps, of its decoder and of its prior. One
evaluation of the network at t gives the terms of all jumps from t (`vlb_to_all`), so evaluating some images
at all candidate steps gives the bound of any schedule, and `shortest.py` finds the best ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from iddpm_ext import ops
from iddpm_ext.diffusion import Diffusion
from iddpm_ext.diffusion.moments import Moments
from iddpm_ext.diffusion.shortest import JumpTerms, shortest_paths
from iddpm_ext.likelihood.evaluate import Evaluator, Outputs, Rows, progress_bar
from iddpm_ext.likelihood.images import Data
from iddpm_ext.likelihood.journal import Journal
from iddpm_ext.likelihood.moments import eps_squares
from iddpm_ext.likelihood.request import LikelihoodRequest, make_likelihood_request
from iddpm_ext.sampling.distributed import Processes
from iddpm_ext.scalars import plain

#: So many of the first steps are all candidates, because the terms change fastest there.
_EVERY_EARLY = 64


@dataclass(frozen=True, eq=False)
class StepSchedules:
    """What `find_schedules` found.

    steps: K -> K indices in the training chain, ascending. bpd: K -> the mean bound on the images that were
    given. timesteps: the candidates, indices in the training chain. moments: those of the candidates, for
    `variance="analytic"`.
    """

    steps: dict[int, list[int]]
    bpd: dict[int, float]
    timesteps: list[int]
    moments: Moments

    def to_extra(self) -> dict[str, list[int]]:
        """The schedules as a checkpoint's `extra["step_schedules"]` holds them."""
        return {str(count): indices for count, indices in self.steps.items()}


def find_schedules(
    model: Callable[..., Tensor],
    data: Data,
    *,
    labels: Sequence[int] | Tensor | None = None,
    limit: int | None = 64,
    candidates: int = 500,
    most: int = 250,
    clip: bool = True,
    exact: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    split: str = "train",
    diffusion: Diffusion | None = None,
    engine: bool = True,
    backend: str = "auto",
    state: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> StepSchedules:
    """For every K up to `most`, the K steps whose chain has the lowest bound on these images.

    Costs `candidates` network evaluations per image. The candidates are the first 64 steps and then a
    geometric progression.

    Args:
        model, labels, clip, exact, batch_size, seed, diffusion, engine, backend, state, progress: as in
            `nll`.
        data: as in `nll`; training images rather than those on which the schedules are evaluated.
        limit: how many images to take at random (of a tensor: the first ones); None takes all.
        candidates: how many steps to consider, at least 4; at most those of the chain.
        most: the largest K, at least 2.
        split: "train" or "test", for a path that has both.

    Returns:
        `StepSchedules`; `extra["step_schedules"] = schedules.to_extra()` makes `steps="optimal-K"` work.

    Raises: as `nll`.

    Source: Watson et al. 2021.
    """
    candidates, most = plain((candidates, most))
    check_counts(candidates, most)
    request = make_likelihood_request(
        model, data, labels=labels, low_res=None, budget=None, steps=None, clip=clip, exact=exact,
        batch_size=batch_size, seed=seed, split=split, limit=limit, diffusion=diffusion,
        dtype=None, engine=engine, backend=backend, progress=progress, who="find_schedules",
        shuffle=True,
    )  # fmt: skip
    folder = Path(state) if state is not None else None
    return search(request, candidates, most, folder, Processes())


def search(
    request: LikelihoodRequest,
    candidates: int,
    most: int,
    state: Path | None,
    processes: Processes,
) -> StepSchedules:
    """`find_schedules` for a request, the same in all `processes`, which divide the candidates."""
    chain = request.spec.diffusion
    steps = candidate_steps(chain.num_timesteps, candidates)
    terms, eps_square = jump_terms(request, steps, state, processes)
    paths = shortest_paths(terms, most)
    timesteps = chain.timesteps[steps].tolist()
    return StepSchedules(
        steps={count: [timesteps[i] for i in path] for count, path in paths.items()},
        bpd={count: terms.bound(path) for count, path in paths.items()},
        timesteps=timesteps,
        moments=Moments(chain.timesteps[steps], eps_square),
    )


def check_counts(candidates: int, most: int) -> None:
    """ValueError unless there are at least 4 candidates and 2 steps."""
    for name, value, least in (("candidates", candidates, 4), ("most", most, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"find_schedules: {name} must be an int of at least {least}, got {value!r}"
            )


def candidate_steps(num_timesteps: int, count: int) -> Tensor:
    """At most `count` steps of a chain, ascending, including the first ones and the last; int64."""
    if count >= num_timesteps:
        return torch.arange(num_timesteps, dtype=torch.int64, device="cpu")
    early = min(_EVERY_EARLY, count // 2)
    later = np.geomspace(early, num_timesteps - 1, count - early).round().astype(np.int64)
    return torch.from_numpy(np.unique(np.concatenate([np.arange(early), later])))


def jump_terms(
    request: LikelihoodRequest, steps: Tensor, state: Path | None, processes: Processes
) -> tuple[JumpTerms, Tensor]:
    """The mean terms of all jumps between these steps of the chain, and E|eps_theta|^2 / d at each."""
    chain, images, count = request.spec.diffusion, len(request.x_0), len(steps)
    evaluator = Evaluator(request, request.batch_size)
    means = torch.full((count, count + 1), torch.nan, dtype=torch.float32, device="cpu")
    run = request.fingerprint(str(steps.tolist())) if state is not None else ""
    with Journal(state, run, processes.rank, count + 1) as journal:
        means[journal.ids] = journal.values
        todo = means.isnan().all(1).nonzero()[:, 0]
        mine = todo[todo % processes.size == processes.rank]
        shown = request.progress
        with progress_bar(count * images, (count - len(mine)) * images, shown) as bar:
            for i in mine.tolist():
                means[i] = _from_step(request, evaluator, steps, i)
                journal.append(torch.tensor([i], dtype=torch.int64, device="cpu"), means[i : i + 1])
                bar.update(images)
        for rows, values in processes.gather((mine, means[mine])):
            means[rows] = values
        processes.wait()
        journal.remove()
    later = torch.ones(count, count, dtype=torch.bool, device="cpu").triu(1)
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    priors = [torch.inf]  # no chain ends at the first candidate
    for last in steps[1:].tolist():
        priors.append(float(chain.respace([0, last]).prior_bpd(request.x_0).double().mean()))
    terms, eps_square = means[:, :count].double(), means[:, count].double()
    prior = torch.tensor(priors, dtype=torch.float64, device="cpu")
    jumps, decoders = torch.where(later.T, terms, zero), torch.where(later, terms, zero)
    return JumpTerms(jumps, decoders, prior), eps_square


def _from_step(request: LikelihoodRequest, evaluator: Evaluator, steps: Tensor, i: int) -> Tensor:
    """Means over the images of all terms that the network's outputs at steps[i] give, float32 [G + 1].

    Entry j < i: the jump to steps[j]. Entry k > i: the decoder in a chain whose second step is steps[k].
    Entry i is 0, the last one E|eps_theta|^2 / d.
    """
    spec = request.spec
    chain, device = spec.diffusion, spec.device
    # -1 - r: the decoder of a chain whose first step is this one and whose second is r.
    targets = torch.cat([steps[:i], -1 - steps[i + 1 :]]).to(device)
    total = torch.zeros(len(steps), dtype=torch.float64, device="cpu")
    kept = torch.arange(len(steps), dtype=torch.int64, device="cpu") != i
    eps_square = 0.0
    for image in torch.arange(len(request.x_0), dtype=torch.int64, device="cpu").split(
        request.batch_size
    ):
        t = torch.full_like(image, int(steps[i]))
        x_0, x_t, out, at = evaluator.outputs(Rows(image, t, torch.zeros_like(t)))
        terms = ops.vlb_to_all(
            out, x_0, x_t, at, chain.table(device), targets, clip=request.clip,
            exact=request.exact, backend=spec.backend,
        )  # fmt: skip
        total[kept] += terms.double().sum(0).cpu()
        eps_square += float(eps_squares(chain, Outputs(x_0, x_t, out, at)).sum())
    whole = torch.cat([total, total.new_tensor([eps_square])])
    return (whole / len(request.x_0)).float()

"""Bits per dimension: `nll`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from iddpm_ext.diffusion import Diffusion
from iddpm_ext.engines.spec import Steps, default_batch_size
from iddpm_ext.likelihood.design import (
    PILOT_DRAW,
    Design,
    full_design,
    learn_proposal,
    make_plan,
    sampled_design,
)
from iddpm_ext.likelihood.evaluate import MEASURED, Evaluator, Rows, progress_bar
from iddpm_ext.likelihood.images import Data
from iddpm_ext.likelihood.information import compute_information
from iddpm_ext.likelihood.journal import Journal
from iddpm_ext.likelihood.ode import compute_ode
from iddpm_ext.likelihood.request import LikelihoodRequest, make_likelihood_request
from iddpm_ext.likelihood.result import Likelihood, facts_of, likelihood_of, summarize_steps
from iddpm_ext.sampling.distributed import Processes


def nll(
    model: Callable[..., Tensor],
    data: Data,
    *,
    labels: Sequence[int] | Tensor | None = None,
    low_res: Tensor | None = None,
    budget: float | None = None,
    steps: Steps = None,
    clip: bool = True,
    exact: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    split: str = "test",
    limit: int | None = None,
    diffusion: Diffusion | None = None,
    dtype: torch.dtype | None = None,
    engine: bool = True,
    backend: str = "auto",
    variance: str | None = None,
    method: str = "bound",
    tolerance: float = 1e-4,
    state: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Likelihood:
    """Bits per dimension of images by the variational bound, with confidence intervals.

        bpd = L_T + sum_t L_t,  equations (4) to (7) of Improved DDPM

    either the full sum or, within a budget, an unbiased estimate by stratified importance sampling of the
    steps: strata have two draws each, the first steps are always evaluated, and the proposal comes from a
    pilot pass that the estimate does not use (`likelihood/design.py` has the mathematics). The estimated
    quantity is the expectation over the noise; the full sum is one draw of it. The noise of an evaluation
    depends on the seed, the image, the step and the replicate alone, so the result does not depend on
    batches, processes or order of evaluation, up to the network's rounding.

    Args:
        model: as in `sample`.
        data: float [N, C, H, W] of 8-bit levels in [-1, 1]; what `open_data` returns; or a path for it.
        labels: integers [N], -1 for an unlabelled image; None takes those of the data.
        low_res: [N, C, h, w] in [-1, 1], for a super-resolution model.
        budget: network evaluations per image on average, including the pilot's, at least 1; None for the
            full sum, which evaluates every step once, and those whose terms differ much from their
            neighbours' (64 of 4000) twice, to estimate its error.
        steps: a shorter chain, as in `sample`; "dense-K" also visits every one of the first T/K steps,
            "optimal-K" and "analytic-K" are the checkpoint's schedules; None for the whole chain.
        clip: clamp every predicted x_0 to [-1, 1].
        exact: compute the decoder's likelihood by the normal distribution function, not by the original's
            approximation.
        batch_size: maximum number of evaluations at once; by device and image size if None.
        seed: 0 <= seed < 2^64; determines the noise and the drawn steps.
        split: "train" or "test", for a path that has both. limit: use only the first images.
        diffusion, dtype, engine, backend: as in `sample`; backend is that of `q_sample` and `vlb_terms`, and
            the dtype of "ode" is the weights' own.
        variance: of p(x_{t-1} | x_t), as in `sample`; None for the chain's own, such as a learned one.
        method: "bound", with or without a budget; "full", the bound's full sum; "information" (Kong et al.
            2023), with `budget` points per image (None: 1,000); or "ode", the density by the probability
            flow ODE (Song et al. 2021). `docs/likelihood.md` says which numbers may be compared.
        tolerance: of "ode", relative and absolute, per step.
        state: a folder that keeps evaluations until the run is done: the same call, repeated after an
            interruption, continues.
        progress: show a bar if stderr is a terminal.

    Returns:
        `Likelihood`: bpd, ci95, population_ci95, prior_bpd, per_image_bpd, per_step and more.

    Raises:
        ValueError, TypeError: for an argument of a wrong value, shape or dtype.
        OSError: if `state` cannot be written. RuntimeError: if an explicit backend does not support the call,
            the network overflows float16, or the tolerance is not met.

    Not differentiable. Source: Nichol & Dhariwal 2021; the estimator was designed for this package.
    """
    request = make_likelihood_request(
        model, data, labels=labels, low_res=low_res, budget=budget, steps=steps, clip=clip,
        exact=exact, batch_size=batch_size, seed=seed, split=split, limit=limit,
        diffusion=diffusion, dtype=dtype, engine=engine, backend=backend, progress=progress,
        variance=variance, method=method, tolerance=tolerance,
    )  # fmt: skip
    return compute(request, Path(state) if state is not None else None, Processes())


def compute(request: LikelihoodRequest, state: Path | None, processes: Processes) -> Likelihood:
    """The likelihood of a request, the same in all `processes`, which divide the images among them."""
    if request.method == "information":
        return compute_information(request, state, processes)
    if request.method == "ode":
        return compute_ode(request, state, processes)
    spec, images = request.spec, len(request.x_0)
    chain = spec.diffusion
    plan = make_plan(images, chain.timesteps, request.budget)
    pilot = _pilot_rows(plan.pilot_images, plan.pilot_steps)
    run = request.fingerprint() if state is not None else ""
    with Journal(state, run, processes.rank, len(MEASURED)) as journal:
        work = _Work(request, journal, processes)
        if plan.columns is None:
            design = full_design(images, chain.timesteps)
        else:
            # In batches of a fixed size, for a proposal that does not depend on the user's, even by rounding.
            size = default_batch_size(spec.image_shape, spec.device)
            terms = work.evaluate(pilot, -1 - _count(len(pilot.t)), size, by_batch=True)[:, 0]
            terms = terms.view(len(plan.pilot_images), len(plan.pilot_steps))
            proposal = learn_proposal(plan.pilot_steps, terms, chain.num_timesteps)
            design = sampled_design(images, plan.columns, proposal, request.seed)
        columns = design.t.shape[1]
        image = _count(images)[:, None].expand(-1, columns)
        rows = Rows(image.flatten(), design.t.flatten(), design.draw.flatten())
        measured = work.evaluate(rows, _count(images * columns), request.batch_size)
        result = _result(request, design, measured.view(images, columns, -1), len(pilot.t), work)
        processes.wait()
        journal.remove()
    return result


class _Work:
    """Evaluates this process's share of the rows that the journal lacks, and gathers those of all."""

    def __init__(self, request: LikelihoodRequest, journal: Journal, processes: Processes):
        self._request, self._journal, self._processes = request, journal, processes
        self._evaluators: dict[int, Evaluator] = {}
        self.network_name = self._evaluator(request.batch_size).network.name

    def evaluate(self, rows: Rows, ids: Tensor, batch_size: int, by_batch: bool = False) -> Tensor:
        """The columns of `MEASURED` for all rows, float32 [n, 4].

        ids: int64 [n], 0, 1, 2... or -1, -2, -3...: the sign distinguishes two lists in the journal.
        by_batch: evaluate the whole batches of the list, even if the journal has parts of them.
        """
        count = len(ids)
        shape = (count, len(MEASURED))
        values = torch.full(shape, torch.nan, dtype=torch.float32, device="cpu")
        known = torch.zeros(count, dtype=torch.bool, device="cpu")
        own = torch.zeros_like(known)
        if count:
            position = (self._journal.ids - ids[0]).abs()
            kept = (position < count) & ((self._journal.ids < 0) == (ids[0] < 0))
            values[position[kept]] = self._journal.values[kept]
            known[position[kept]] = True
        with progress_bar(count, int(known.sum()), self._request.progress) as bar:
            for at in self._batches(rows, known, batch_size, by_batch):
                part = Rows(*(column[at] for column in rows))
                values[at] = self._evaluator(batch_size).measure(part)
                own[at] = True
                self._journal.append(ids[at], values[at])
                bar.update(len(at))
        at = own.nonzero()[:, 0]
        for other, theirs in self._processes.gather((at, values[at])):
            values[other] = theirs
        return values

    def _batches(
        self, rows: Rows, known: Tensor, batch_size: int, by_batch: bool
    ) -> Iterator[Tensor]:
        """Indices of the rows that this process evaluates together."""
        rank, size = self._processes.rank, self._processes.size
        if by_batch:
            parts = _count(len(known)).split(batch_size)
            yield from (part for part in parts[rank::size] if not bool(known[part].all()))
        else:
            todo = (~known & (rows.image % size == rank)).nonzero()[:, 0]
            yield from todo.split(batch_size) if len(todo) else ()

    def _evaluator(self, batch_size: int) -> Evaluator:
        if batch_size not in self._evaluators:
            self._evaluators[batch_size] = Evaluator(self._request, batch_size)
        return self._evaluators[batch_size]


def _count(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.int64, device="cpu")


def _pilot_rows(images: Tensor, steps: Tensor) -> Rows:
    image, t = images.repeat_interleave(len(steps)), steps.repeat(len(images))
    return Rows(image, t, torch.full_like(t, PILOT_DRAW))


def _result(
    request: LikelihoodRequest, design: Design, measured: Tensor, pilot: int, work: _Work
) -> Likelihood:
    return likelihood_of(
        request,
        design,
        terms=measured[:, :, 0],
        per_step=summarize_steps(design, measured, request.spec.diffusion.timesteps),
        evaluations=pilot + design.t.numel(),
        facts=facts_of(request, work.network_name, method=request.method, pilot_evaluations=pilot),
    )

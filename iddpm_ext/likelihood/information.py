"""The information-theoretic estimator: bits from the denoising errors at all signal-to-noise ratios.

In the limit of many steps, with lambda the log-SNR, the bound of an image is

    -log P(x) <= L_T + L_0 + 1/2 int E|eps - eps_theta(x_lambda, lambda)|^2 d lambda

between the ends of the network's chain, whatever the learned variance. For discrete x and the optimal
predictor, the integral over all lambda is exactly -log P(x) (Kong et al. 2023). Outside the chain the network
is not trained; there the tails are those of the bound, L_T and L_0, which follow from the same identity with
a normal prior at one end and the discretised decoder at the other.

lambda is drawn by importance sampling in strata of two points each, with a density proportional to the root
mean square of the errors of a pilot. The estimate has a standard error, and no bias from quadrature.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from iddpm_ext.likelihood.continuous import ContinuousTime, by_image, scales
from iddpm_ext.likelihood.design import PILOT_DRAW, Design
from iddpm_ext.likelihood.evaluate import Evaluator, Rows, progress_bar
from iddpm_ext.likelihood.journal import Journal
from iddpm_ext.likelihood.request import LikelihoodRequest
from iddpm_ext.likelihood.result import Likelihood, facts_of, likelihood_of, summarize_steps
from iddpm_ext.random import STREAM_CHOICE, STREAM_FORWARD, NoiseKey, normal, uniform
from iddpm_ext.sampling.distributed import Processes

POINTS = 1000
_PILOT_IMAGES = 8
_CELLS = 64
_UNIFORM = 0.05
# Evaluations of L_0 per image: a large part of the bits with a small variance.
_DECODER = 4
# The `draw` of these choices in stream 3, where 0 to 2 have other uses.
_CHOICE_DRAW = 3
# The `draw` of the noise; those of the bound's replicates count from 0.
_NOISE_DRAW = 1 << 21


class Proposal(NamedTuple):
    """A density over log-SNR that is constant in cells. edges: float64 [G + 1], ascending. mass: [G]."""

    edges: Tensor
    mass: Tensor

    def at(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """The quantiles (log-SNR) at `point` in [0, 1), and the density there."""
        right = self.mass.cumsum(0)
        cell = torch.searchsorted(right, point.contiguous(), right=True).clamp(max=len(right) - 1)
        within = ((point - right[cell] + self.mass[cell]) / self.mass[cell]).clamp(0, 1)
        width = self.edges.diff()[cell]
        return self.edges[cell] + within * width, self.mass[cell] / width


def compute_information(
    request: LikelihoodRequest, state: Path | None, processes: Processes
) -> Likelihood:
    """The estimate with `request.budget` points per image; 1,000 if that is None."""
    time = ContinuousTime(request.spec, "information")
    images, points = len(request.x_0), POINTS if request.budget is None else int(request.budget)
    points = max(2, points // 2 * 2)
    evaluator = Evaluator(request, request.batch_size)
    errors = _Errors(request, evaluator, time)
    pilot = min(images, _PILOT_IMAGES)
    proposal = _proposal(errors, time, pilot, request.batch_size)
    every = torch.arange(images, dtype=torch.int64, device="cpu")
    strata = torch.arange(points, dtype=torch.int64, device="cpu") // 2
    key = NoiseKey(request.seed, STREAM_CHOICE, every, 0, _CHOICE_DRAW)
    placed = (uniform(key, (images, points)).double().cpu() + strata) / (points // 2)
    log_snr, density = proposal.at(placed)

    def evaluate(part: Tensor) -> Tensor:
        columns = [errors(part, log_snr[part, c], _NOISE_DRAW + c) for c in range(points)]
        for draw in range(_DECODER):
            zero = torch.zeros_like(part)
            columns.append(evaluator.measure(Rows(part, zero, zero + draw))[:, 0].double())
        return torch.stack(columns, 1).float()

    width = points + _DECODER
    run = request.fingerprint() if state is not None else ""
    with Journal(state, run, processes.rank, width) as journal:
        with progress_bar(images, 0, request.progress) as bar:
            values = by_image(request, journal, processes, width, evaluate, bar.update)
        processes.wait()
        journal.remove()
    chain = request.spec.diffusion
    half_bits = 1 / (2 * math.log(2) * points * density)
    decoder = torch.full((images, _DECODER), 1 / _DECODER, dtype=torch.float64, device="cpu")
    nearest = time.timesteps(log_snr).round().long()
    design = Design(
        torch.cat([nearest, torch.zeros(images, _DECODER, dtype=torch.int64, device="cpu")], 1),
        torch.cat([half_bits, decoder], 1),
        torch.zeros(images, width, dtype=torch.int64, device="cpu"),
    )
    return likelihood_of(
        request,
        design,
        terms=values,
        per_step=summarize_steps(
            Design(nearest, half_bits, design.draw[:, :points]),
            _measured(values[:, :points], log_snr),
            chain.timesteps,
        ),
        evaluations=images * width + pilot * _CELLS,
        facts=facts_of(request, evaluator.network.name, method="information", points=points),
    )


class _Errors:
    """Computes |eps - eps_theta|^2 / d of images, each at its own log-SNR."""

    def __init__(self, request: LikelihoodRequest, evaluator: Evaluator, time: ContinuousTime):
        self._request, self._evaluator, self._time = request, evaluator, time

    def __call__(self, images: Tensor, log_snr: Tensor, draw: int) -> Tensor:
        """images: int64 [n]. log_snr: float64 [n]. draw: which noise. -> float64 [n] on the CPU."""
        request, spec = self._request, self._request.spec
        root, rest = (part.float().to(spec.device)[:, None, None, None] for part in scales(log_snr))
        x_0 = request.x_0[images].to(spec.device)
        key = NoiseKey(request.seed, STREAM_FORWARD, images.to(spec.device), 0, draw)
        noise = normal(key, x_0.shape, spec.device)
        x_t = root * x_0 + rest * noise
        told = self._time.told(log_snr).to(spec.device)
        out = self._evaluator.at(x_t, told, images).float()
        eps = self._time.eps(x_t, out, log_snr, request.clip)
        return (eps - noise).double().square().flatten(1).mean(1).cpu()


def _proposal(errors: _Errors, time: ContinuousTime, images: int, batch_size: int) -> Proposal:
    """Proportional to the first images' RMS errors at the centres of 64 equal cells of log-SNR."""
    edges = torch.linspace(time.least, time.most, _CELLS + 1, dtype=torch.float64, device="cpu")
    parts = torch.arange(images, dtype=torch.int64, device="cpu").split(batch_size)
    sizes = []
    for g, middle in enumerate((edges[1:] + edges[:-1]) / 2):
        draw = PILOT_DRAW + 1 + g
        found = [errors(part, middle.expand(len(part)), draw) for part in parts]
        sizes.append(torch.cat(found).square().mean().sqrt())
    size = torch.stack(sizes)
    mass = (1 - _UNIFORM) * size / size.sum() + _UNIFORM / _CELLS
    return Proposal(edges, mass)


def _measured(errors: Tensor, log_snr: Tensor) -> Tensor:
    """The columns of `MEASURED`: the errors of eps and of x_0; the others are NaN."""
    nothing = torch.full_like(errors, torch.nan)
    x_0 = errors.double() * (-log_snr).exp()
    return torch.stack([nothing.double(), x_0, errors.double(), nothing.double()], 2)

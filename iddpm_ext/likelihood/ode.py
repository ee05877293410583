"""Likelihood by the probability flow ODE, as papers on score-based models report it.

With lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)), images flow along

    dx / d lambda = sigma^2 x - sigma eps_theta(x, lambda),    sigma^2 = 1 - alpha_bar,

and log p changes by minus the divergence, estimated by Hutchinson's z . J z with random signs z.
First, uniform noise of a level's width dequantises the images; the expectation bounds the bits of the levels.

Source: Song et al. 2021, "Score-Based Generative Modeling through SDEs", appendix D.2; Dormand & Prince 1980.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from iddpm_ext.engines.choosing import EVALUATING
from iddpm_ext.likelihood.continuous import ContinuousTime, by_image, scales
from iddpm_ext.likelihood.design import Design
from iddpm_ext.likelihood.estimate import estimate
from iddpm_ext.likelihood.evaluate import progress_bar
from iddpm_ext.likelihood.journal import Journal
from iddpm_ext.likelihood.request import LikelihoodRequest
from iddpm_ext.likelihood.result import Likelihood, facts_of, summarize_steps
from iddpm_ext.ops.rows import no_autocast
from iddpm_ext.random import STREAM_CHOICE, STREAM_FORWARD, NoiseKey, uniform
from iddpm_ext.sampling.distributed import Processes

_DRAWS = 2
_MOST_EVALUATIONS = 3000
# The `draw` of these numbers in their streams.
_SIGN_DRAW, _SPREAD_DRAW = 16, 1 << 22
# Dormand & Prince's method of fifth order, and the difference from its embedded fourth order.
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_PLACES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)

State = tuple[Tensor, Tensor]


def compute_ode(request: LikelihoodRequest, state: Path | None, processes: Processes) -> Likelihood:
    """-log2 p of the dequantised images a dimension, two draws of dequantisation and signs an image."""
    spec, images = request.spec, len(request.x_0)
    if request.budget is not None:
        raise ValueError(
            f"{spec.who}: budget must be None with method 'ode', whose tolerance determines the "
            f"number of evaluations, got {request.budget}"
        )
    if spec.dtype is not None:
        raise ValueError(
            f"{spec.who}: dtype must be None with method 'ode', whose tolerance is met in the weights' own, "
            f"got {spec.dtype}"
        )
    flow = _Flow(request)
    evaluations = 0

    def evaluate(part: Tensor) -> Tensor:
        nonlocal evaluations
        columns = []
        for draw in range(_DRAWS):
            bits, count = flow.bits(part, draw)
            evaluations += count * len(part)
            columns.append(bits)
        return torch.stack(columns, 1).float()

    run = request.fingerprint() if state is not None else ""
    with Journal(state, run, processes.rank, _DRAWS) as journal:
        with progress_bar(images, 0, request.progress) as bar:
            values = by_image(request, journal, processes, _DRAWS, evaluate, bar.update)
        evaluations = sum(processes.gather(evaluations))
        processes.wait()
        journal.remove()
    none = torch.zeros(images, dtype=torch.float64, device="cpu")
    ends = torch.zeros(images, _DRAWS, dtype=torch.int64, device="cpu")
    half = torch.full_like(ends, 1, dtype=torch.float64) / _DRAWS
    design = Design(ends, half, ends)
    mean, ci95, population, per_image = estimate(design, values, none)
    no_steps = Design(*(column[:, :0] for column in (design.t, design.scale, design.draw)))
    nothing = torch.empty(images, 0, 4, dtype=torch.float64, device="cpu")
    return Likelihood(
        bpd=mean,
        ci95=ci95,
        population_ci95=population,
        prior_bpd=math.nan,
        per_image_bpd=per_image,
        per_step=summarize_steps(no_steps, nothing, spec.diffusion.timesteps),
        evaluations=evaluations,
        facts=facts_of(request, "plain", method="ode", tolerance=request.tolerance),
    )


class _Flow:
    """The ODE of a request's network, which runs as a module, without an engine, for its gradients."""

    def __init__(self, request: LikelihoodRequest):
        self._request = request
        self._time = ContinuousTime(request.spec, "ode")

    def bits(self, images: Tensor, draw: int) -> tuple[Tensor, int]:
        """-log2 p per dimension of some images, float64 [n], and how many evaluations that took."""
        request, spec, time = self._request, self._request.spec, self._time
        x_0 = request.x_0[images].to(spec.device)
        device_images = images.to(spec.device)
        spread = self._uniform(device_images, x_0, STREAM_FORWARD, _SPREAD_DRAW + draw)
        sign = self._uniform(device_images, x_0, STREAM_CHOICE, _SIGN_DRAW + draw)
        z = torch.where(sign < 0.5, -1.0, 1.0).to(x_0)
        root, _ = scales(torch.tensor(time.most, dtype=torch.float64, device="cpu"))
        x = float(root) * (x_0 + (2 * spread - 1).to(x_0) / 255)
        start = torch.zeros(len(images), dtype=torch.float64, device=spec.device)
        with contextlib.ExitStack() as stack:
            if isinstance(spec.model, nn.Module):
                stack.enter_context(EVALUATING.of(spec.model))
            (x_T, change), count = integrate(
                lambda at, x: self._slope(at, x, z, images), (x, start), time.most / 2, time.least / 2,
                request.tolerance, spec.who,
            )  # fmt: skip
        size = x_0[0].numel()
        square = x_T.double().square().flatten(1).sum(1)
        log_p = (
            -square / 2 - size * math.log(2 * math.pi) / 2 + change + size * math.log(float(root))
        )
        return (-log_p / (size * math.log(2)) + math.log2(127.5)).cpu(), count

    def _uniform(self, images: Tensor, like: Tensor, stream: int, draw: int) -> Tensor:
        key = NoiseKey(self._request.seed, stream, images, 0, draw)
        return uniform(key, (len(images), like[0].numel())).view(like.shape)

    def _slope(self, half_log_snr: float, x: Tensor, z: Tensor, images: Tensor) -> State:
        """dx / d lambda, and the divergence by Hutchinson's estimator."""
        spec = self._request.spec
        log_snr = torch.full((len(x),), 2 * half_log_snr, dtype=torch.float64, device="cpu")
        _, rest = scales(log_snr[0])
        sigma = float(rest)
        named = {"y": spec.labels, "low_res": spec.low_res}
        kwargs = {k: v[images.to(v.device)] for k, v in named.items() if v is not None}
        with torch.inference_mode(False), torch.enable_grad(), no_autocast(x.device.type):
            leaf = x.detach().clone().requires_grad_()
            out = spec.model(leaf, self._time.told(log_snr).to(x.device), **kwargs)
            eps = self._time.eps(leaf, out, log_snr, clip=False)
            (gradient,) = torch.autograd.grad((eps * z).sum(), leaf)
        trace = (gradient * z).double().flatten(1).sum(1)
        slope = sigma**2 * x - sigma * eps.detach()
        return slope, sigma**2 * x[0].numel() - sigma * trace


def integrate(
    slope: Callable[[float, Tensor], State],
    start: State,
    begin: float,
    end: float,
    tolerance: float,
    who: str,
) -> tuple[State, int]:
    """The state at `end` of d state / d t = slope(t, x), where state is (x, a number per image).

    A step is accepted if the estimated error of the worst image is at most tolerance (1 + |x|), as root mean
    square over the dimensions; so is that of the number, divided by the dimensions.

    Returns the state and the number of evaluations.

    Raises RuntimeError if the tolerance is not met in 3,000 evaluations, or steps become too small.
    """
    (x, number), at, step = start, begin, (end - begin) / 100
    size, count = x[0].numel(), 1
    slopes = [slope(at, x)]
    while (end - at) * (end - begin) > 0:
        if count > _MOST_EVALUATIONS or abs(step) < 1e-9 * abs(end - begin):
            raise RuntimeError(
                f"{who}: tolerance must be one that the equation meets in {_MOST_EVALUATIONS} evaluations, "
                f"got {tolerance} (it stands at {(at - begin) / (end - begin):.0%} after {count})"
            )
        step = math.copysign(min(abs(step), abs(end - at)), end - begin)
        for weights, place in zip(_STAGES[1:], _PLACES[1:], strict=True):
            there = x + step * _sum(weights, [s for s, _ in slopes])
            slopes.append(slope(at + place * step, there))
        count += len(_STAGES) - 1
        error_x = (step * _sum(_ERROR, [s for s, _ in slopes])).double()
        error_n = step * _sum(_ERROR, [n for _, n in slopes]) / size
        scale = 1 + torch.maximum(x.abs(), there.abs()).double()
        worst = (error_x / scale).square().flatten(1).mean(1).sqrt().maximum(error_n.abs()).max()
        ratio = float(worst) / tolerance
        if ratio <= 1:
            number = number + step * _sum(_STAGES[-1], [n for _, n in slopes[:-1]])
            at, x, slopes = at + step, there, slopes[-1:]
        else:
            slopes = slopes[:1]
        # A NaN shortens the steps until the error above is raised.
        step *= min(5.0, max(0.2, 0.9 * ratio**-0.2)) if ratio > 0 else (5.0 if ratio == 0 else 0.2)
    return (x, number), count


def _sum(weights: tuple[float, ...], values: list[Tensor]) -> Tensor:
    parts = [w * value for w, value in zip(weights, values, strict=True)]
    return torch.stack(parts).sum(0)

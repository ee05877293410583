"""Multistep solvers of the probability flow ODE: DPM-Solver++ of second and third order, UniPC.

With lambda_t = log(sqrt(alpha_bar_t) / sqrt(1 - alpha_bar_t)) and h = lambda_{t-1} - lambda_t, the exact
jump is

    x_{t-1} = c2 x_t + sqrt(alpha_bar_{t-1}) int_0^1 h e^{-h (1 - u)} D(lambda_t + u h) du

where a solver replaces D by a polynomial through known predictions x_0(.). Through the last one alone this is
DDIM; through three it is of third order. A corrector repeats the jump with the prediction at its end, which
the next step evaluates anyway, so that it costs no evaluation (UniPC).

Source: Lu et al. 2022, "DPM-Solver++"; Zhao et al. 2023, "UniPC", algorithms 5 to 8 with B_2(h) = e^h - 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .multistep import multistep_update, multistep_weights
from .process import Diffusion

# Exact to rounding for h below 20. For longer steps the exponential leaves only the end of the interval.
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(40)


class Solver(NamedTuple):
    """order: the most predictions a jump uses. corrects: has a corrector. eta: 1 for noise, else 0."""

    order: int
    corrects: bool = False
    eta: float = 0.0


#: By the names of `sample`.
SOLVERS = {
    "dpm++": Solver(2),
    "dpm++3": Solver(3),
    "dpm++sde": Solver(2, eta=1.0),
    "unipc": Solver(2, corrects=True),
    "unipc3": Solver(3, corrects=True),
}


class SolverWalk:
    """One run of a chain by a solver, with the previous predictions.

    Args:
        chain: the respaced chain.
        solver: its parameters.
        limit: the largest h_t / (2 h_{t+1}), as in `Diffusion.multistep_weights`: previous steps count as at
            least 1 / (2 limit) times as long as the jump.
    """

    def __init__(self, chain: Diffusion, solver: Solver, limit: float = 0.5) -> None:
        self._solver, self._shortest = solver, 0.5 / limit
        numbers = chain._chain
        self._half_log_snr = (
            (numbers.log_alpha_bar - numbers.one_minus_alpha_bar.log()) / 2
        ).numpy()
        self._c1, self._c2 = (c.numpy() for c in numbers.mean_coefficients(solver.eta))
        self._second = multistep_weights(numbers, limit, solver.eta).numpy()
        self._known: list[Tensor] = []  # previous predictions, the latest first
        self._x: Tensor | None = None  # the corrected start of the last jump
        self._given: Tensor | None = None  # the end of the last jump, as it was returned
        self._next = -1

    def __call__(self, i: int, x_t: Tensor, x_prev: Tensor, x_0: Tensor) -> Tensor:
        """x_{t-1} of step i; forgets previous predictions if i does not follow the last step.

        x_t: [N, C, H, W]. x_prev: DDIM's x_{t-1}, including noise. x_0: the prediction.
        """
        if i != self._next:
            self._known = []
        if self._known and self._solver.corrects:
            assert self._given is not None
            moved = self._corrected(i + 1, x_0) - self._given
            x_prev = x_prev + float(self._c2[i]) * moved
            x_t = x_t + moved
        if i > 0:
            x_prev = self._higher_order(i, x_prev, x_0)
        self._known = [x_0, *self._known][: self._solver.order]
        self._x, self._next = x_t, i - 1
        if self._solver.corrects:  # a copy, as the caller may write into what it gets
            self._given = x_prev.clone()
        return x_prev

    def _higher_order(self, i: int, x_prev: Tensor, x_0: Tensor) -> Tensor:
        before = self._known[: self._solver.order - 1]
        if len(before) < 2:
            return multistep_update(
                x_prev, x_0, before[0] if before else None, float(self._second[i])
            )
        places = [0.0, *self._places(i, len(before))]
        _, *weights = self._weights(i, places)
        for weight, known in zip(weights, before, strict=True):
            x_prev = x_prev + weight * (known - x_0)
        return x_prev

    def _corrected(self, i: int, x_0: Tensor) -> Tensor:
        """The corrected end of the jump of step i, by the prediction x_0 at that end."""
        last, *before = self._known
        before = before[: self._solver.order - 1]
        assert self._x is not None
        corrected = float(self._c2[i]) * self._x + float(self._c1[i]) * last
        if not before:
            return corrected + 0.5 * float(self._c1[i]) * (x_0 - last)
        places = [0.0, 1.0, *self._places(i, len(before))]
        _, *weights = self._weights(i, places)
        for weight, known in zip(weights, [x_0, *before], strict=True):
            corrected = corrected + weight * (known - last)
        return corrected

    def _places(self, i: int, count: int) -> list[float]:
        """The places of the previous predictions, in units of the jump of step i."""
        lambdas = self._half_log_snr[i - 1 : i + 1 + count]
        jump, *before = -np.diff(lambdas)
        lengths = np.maximum(np.asarray(before) / jump, self._shortest)
        return (-lengths.cumsum()).tolist()

    def _weights(self, i: int, places: Sequence[float]) -> list[float]:
        """The weights of the predictions at `places` in the jump of step i."""
        h = float(self._half_log_snr[i - 1] - self._half_log_snr[i])
        u = (_POINTS + 1) / 2
        measure = _WEIGHTS / 2 * h * np.exp(-h * (1 - u))
        scale = float(self._c1[i]) / -math.expm1(-h)
        weights = []
        for place in places:
            others = [other for other in places if other != place]
            basis = np.prod([(u - other) / (place - other) for other in others], axis=0)
            weights.append(scale * float((measure * basis).sum()))
        return weights

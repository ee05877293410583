"""Multistep solvers of the chain's differential equation: DPM-Solver++ of two and three steps, UniPC.

With lambda_t = log(sqrt(alpha_bar_t) / sqrt(1 - alpha_bar_t)) and h = lambda_{t-1} - lambda_t, the exact
jump is

    x_{t-1} = c2 x_t + sqrt(alpha_bar_{t-1}) int_0^1 h e^{-h (1 - u)} D(lambda_t + u h) du

and a solver puts a polynomial through known predictions D = x_0(.) for D. Through the last one alone it is
DDIM; through three it is of third order. A corrector takes the jump again when the prediction at its end is
known, which the next step evaluates anyway, and so costs no evaluation (UniPC).

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

# Exact to rounding for every h below 20; longer steps end where D alone counts.
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(40)


class Solver(NamedTuple):
    """order: most predictions a jump uses. corrects: takes jumps again. eta: 1 for noise."""

    order: int
    corrects: bool = False
    eta: float = 0.0


#: What `sample` calls them.
SOLVERS = {
    "dpm++": Solver(2),
    "dpm++3": Solver(3),
    "dpm++sde": Solver(2, eta=1.0),
    "unipc": Solver(2, corrects=True),
    "unipc3": Solver(3, corrects=True),
}


class SolverWalk:
    """One walk down a chain by a solver, which remembers what it saw.

    Args:
        chain: whose steps are taken.
        solver: which one.
        limit: most h_t / (2 h_{t+1}), as of `Diffusion.multistep_weights`: where the steps before were
            shorter, polynomials are laid as if they had 1 / (2 limit) times the jump's length at least.
    """

    def __init__(self, chain: Diffusion, solver: Solver, limit: float = 0.5) -> None:
        self._solver, self._shortest = solver, 0.5 / limit
        numbers = chain._chain
        self._half_log_snr = (
            (numbers.log_alpha_bar - numbers.one_minus_alpha_bar.log()) / 2
        ).numpy()
        self._c1, self._c2 = (c.numpy() for c in numbers.mean_coefficients(solver.eta))
        self._second = multistep_weights(numbers, limit, solver.eta).numpy()
        self._known: list[Tensor] = []  # predictions, the last step's first
        self._x: Tensor | None = None  # where the last jump began, corrected
        self._given: Tensor | None = None  # where it ended, before anyone changed it
        self._next = -1

    def __call__(self, i: int, x_t: Tensor, x_prev: Tensor, x_0: Tensor) -> Tensor:
        """x_{t-1} of step i; a step that does not follow the last one starts anew.

        x_t: [N, C, H, W]. x_prev: DDIM's x_{t-1} of it, with the noise if there is any. x_0: the prediction.
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
        """The end of the jump of step i, now that the prediction x_0 there is known."""
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
        """Where the predictions of the steps before are, in units of the jump of step i."""
        lambdas = self._half_log_snr[i - 1 : i + 1 + count]
        jump, *before = -np.diff(lambdas)
        lengths = np.maximum(np.asarray(before) / jump, self._shortest)
        return (-lengths.cumsum()).tolist()

    def _weights(self, i: int, places: Sequence[float]) -> list[float]:
        """Of the predictions at `places`, for the jump of step i."""
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

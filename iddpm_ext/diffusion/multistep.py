"""DPM-Solver++(2M): a second-order deterministic sampler, as DDIM plus one term.

With lambda_t = log(sqrt(alpha_bar_t) / sqrt(1 - alpha_bar_t)), h_t = lambda_{t-1} - lambda_t and the
data predictions x_0(t), the solver extrapolates D = x_0(t) + h_t / (2 h_{t+1}) (x_0(t) - x_0(t+1))
and takes the first-order step with D in the place of x_0(t). That first-order step is DDIM's with
eta = 0, which is affine in x_0, so

    x_{t-1} = DDIM(x_t, x_0(t)) + weight_t (x_0(t) - x_0(t+1)),   weight_t = c1_t h_t / (2 h_{t+1}).

Source: Lu et al. 2022, "DPM-Solver++", algorithm 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .table import Chain


def multistep_weights(chain: Chain, limit: float = math.inf, eta: float = 0.0) -> Tensor:
    """weight_t of every step of a chain, float64 [T].

    limit: the largest h_t / (2 h_{t+1}). Steps that are evenly spaced in t are not so in lambda: the
    penultimate one is several times longer than its predecessor, and the error of extrapolating that far
    exceeds the gain of second order. 1/2 extrapolates as if the previous step had been at least as long; it
    changes nothing for steps that are evenly spaced in lambda.

    eta: 1 for the stochastic equation, SDE-DPM-Solver++(2M): the same term with the ancestral c1.

    The weight is 0 at the first step, t = T - 1, which has no previous prediction, and at the last one,
    t = 0, which ends at lambda = infinity, where only first order is defined.
    """
    log_snr = (chain.log_alpha_bar - chain.one_minus_alpha_bar.log()) / 2
    step = log_snr[:-1] - log_snr[1:]  # of t = 1 .. T-1
    data_coefficient, _ = chain.mean_coefficients(eta)
    weights = torch.zeros_like(log_snr)
    ratio = (step[:-1] / (2 * step[1:])).clamp(max=limit)
    weights[1:-1] = data_coefficient[1:-1] * ratio
    return weights


def multistep_update(
    x_prev: Tensor, x_0: Tensor, x_0_before: Tensor | None, weight: float
) -> Tensor:
    """x_{t-1} of the second-order solver from that of DDIM with eta = 0.

    Args:
        x_prev: DDIM's x_{t-1} [N, C, H, W], as `Diffusion.reverse_step(..., sampler="ddim")` gives it.
        x_0: the prediction at this step, clipped if the sampler clips, like x_prev.
        x_0_before: the prediction at the previous step (t + 1), like x_0; None at the first step.
        weight: that of this step, from `Diffusion.multistep_weights()`.

    Returns:
        like x_prev; x_prev itself if the step is of first order.
    """
    if x_0_before is None or weight == 0:
        return x_prev
    return torch.add(x_prev, x_0 - x_0_before, alpha=weight)

"""DPM-Solver++(2M) against the real diffusers, and the order that it claims."""

from __future__ import annotations

import pytest
import torch
from normal_data import exact_eps, uniform_in_log_snr

from iddpm_ext import Diffusion
from iddpm_ext.diffusion import multistep_update


def solve(chain: Diffusion, x: torch.Tensor, std: float, *, second_order: bool) -> torch.Tensor:
    weights, before = chain.multistep_weights(), None
    for i in reversed(range(chain.num_timesteps)):
        t = torch.full((len(x),), i)
        step = chain.reverse_step(
            exact_eps(chain, x, i, std), x, t, sampler="ddim", clip=False, backend="reference"
        )
        weight = float(weights[i]) if second_order else 0.0
        x = multistep_update(step.x_prev, step.x_0, before, weight)
        before = step.x_0
    return x


@pytest.mark.parametrize("steps", [10, 50])
def test_the_solver_is_that_of_diffusers(steps):
    import diffusers

    chain = Diffusion(variance="fixed_small").respace(steps)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=4000, trained_betas=Diffusion().betas.numpy(),
        final_sigmas_type="zero", lower_order_final=False,
    )  # fmt: skip
    # Its tables are float32 and made of the betas: with ours in float64 the two are comparable.
    scheduler.set_timesteps(timesteps=chain.timesteps.flip(0).tolist())
    alpha_bar = chain.alphas_cumprod.flip(0)
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    scheduler.sigmas = torch.cat([sigma, torch.zeros(1, dtype=torch.float64)])
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    theirs = x
    for i, t in enumerate(scheduler.timesteps):
        eps = exact_eps(chain, theirs, steps - 1 - i, 0.5)
        # Their step returns the model's dtype and computes in float32 at least.
        theirs = scheduler.step(eps, t, theirs).prev_sample.double()
    ours = solve(chain, x, 0.5, second_order=True)
    assert (ours - theirs).abs().max() < 1e-5


def test_halving_the_step_divides_the_error_by_four():
    chain, std = Diffusion(variance="fixed_small"), 0.5
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    # The probability flow of a normal distribution only rescales: x_0 = x_T std / std_T. The chains
    # end at alpha_bar_0, from which the last step goes to x_0's expectation.
    alpha_bar = chain.alphas_cumprod
    spread = (alpha_bar * std**2 + 1 - alpha_bar).sqrt()
    at_first = x * spread[0] / spread[-1]
    exact = alpha_bar[0].sqrt() * std**2 / spread[0] ** 2 * at_first

    def error(steps: int, second_order: bool) -> float:
        shorter = uniform_in_log_snr(chain, steps)
        return float((solve(shorter, x, std, second_order=second_order) - exact).abs().max())

    first = error(40, False) / error(80, False)
    second = error(40, True) / error(80, True)
    assert 1.7 < first < 2.3
    assert 3.4 < second < 5


def test_the_first_and_the_last_step_are_of_first_order():
    weights = Diffusion().respace(50).multistep_weights()
    assert weights[0] == weights[-1] == 0
    assert bool((weights[1:-1] > 0).all())

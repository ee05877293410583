"""Solvers of higher order against diffusers', the published formulas, and the order that they claim."""

from __future__ import annotations

import math

import pytest
import torch
from normal_data import exact_eps, uniform_in_log_snr

import iddpm_ext
from iddpm_ext import Diffusion, sample
from iddpm_ext.diffusion.solvers import SOLVERS, SolverWalk
from iddpm_ext.random import STREAM_REVERSE, NoiseKey, normal

SHAPE = (2, 1, 4, 4)


def start() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).double()


def walk(chain: Diffusion, sampler: str, std: float, limit: float = math.inf) -> list[torch.Tensor]:
    """x after every step, of data that are normal with deviation `std`."""
    solver, x, seen = SolverWalk(chain, SOLVERS[sampler], limit), start(), []
    for i in reversed(range(chain.num_timesteps)):
        step = chain.reverse_step(
            exact_eps(chain, x, i, std), x, torch.full((len(x),), i), sampler="ddim", clip=False,
            backend="reference",
        )  # fmt: skip
        x = solver(i, x, step.x_prev, step.x_0)
        seen.append(x)
    return seen


@pytest.mark.parametrize("sampler", ["dpm++", "dpm++3", "unipc", "unipc3"])
@pytest.mark.parametrize("steps", [7, 20])
def test_each_solver_walks_as_that_of_diffusers(sampler, steps):
    import diffusers

    chain, std = uniform_in_log_snr(Diffusion(variance="fixed_small"), steps), 0.5
    common = {"trained_betas": Diffusion().betas.numpy(), "lower_order_final": False}
    order, steps = SOLVERS[sampler].order, chain.num_timesteps
    if sampler == "dpm++":
        theirs = diffusers.DPMSolverMultistepScheduler(4000, solver_order=order, **common)
    else:
        # Of third order theirs replaces integrals by their first terms; UniPC's predictor does not.
        off = [] if SOLVERS[sampler].corrects else list(range(steps))
        theirs = diffusers.UniPCMultistepScheduler(
            4000, solver_order=order, solver_type="bh2", disable_corrector=off, **common
        )
    theirs.set_timesteps(steps)
    theirs.timesteps = chain.timesteps.flip(0)
    alpha_bar = chain.alphas_cumprod.flip(0)
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    theirs.sigmas = torch.cat([sigma, torch.zeros(1, dtype=torch.float64)])
    x = start()
    for i, expected in enumerate(walk(chain, sampler, std)[:-1]):
        eps = exact_eps(chain, x, steps - 1 - i, std)
        x = theirs.step(eps, theirs.timesteps[i], x).prev_sample.double()
        # Theirs computes in float32.
        assert (x - expected).abs().max() < 1e-5, i


def test_the_weights_integrate_the_polynomial_through_the_predictions():
    chain = Diffusion(variance="fixed_small").respace(12)
    walking, i, places = SolverWalk(chain, SOLVERS["unipc3"]), 6, [0.0, 1.0, -1.3, -2.9]
    weights = walking._weights(i, places)
    half = (chain.alphas_cumprod.log() - (1 - chain.alphas_cumprod).log()) / 2
    h = float(half[i - 1] - half[i])
    # By the closed forms of int_0^1 h e^{-h (1 - u)} u^m du, and on a fine grid.
    integrals = [-math.expm1(-h)]
    for m in range(1, 4):
        integrals.append(1 - m / h * integrals[-1])
    scale = math.sqrt(float(chain.alphas_cumprod[i - 1]))
    for m, integral in enumerate(integrals):
        of_power = sum(w * place**m for w, place in zip(weights, places, strict=True))
        assert of_power == pytest.approx(scale * integral, rel=1e-10)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert float((h * (-h * (1 - u)).exp() * u**3).mean()) == pytest.approx(integrals[3], rel=1e-8)


@pytest.mark.parametrize(
    ("sampler", "order"), [("dpm++", 2), ("dpm++3", 3), ("unipc", 3), ("unipc3", 3)]
)
def test_halving_the_step_divides_the_error_by_the_power_of_the_order(sampler, order):
    # Normal data only rescale along the flow: x_0's expectation at alpha_bar_0 is known.
    chain, std = Diffusion(variance="fixed_small"), 0.5
    alpha_bar = chain.alphas_cumprod

    def error(steps: int) -> float:
        shorter = uniform_in_log_snr(chain, steps)
        x = walk(shorter, sampler, std)[-2]
        spread = (alpha_bar * std**2 + 1 - alpha_bar).sqrt()
        return float((x - start() * spread[0] / spread[-1]).abs().max())

    assert error(80) / error(160) > 2 ** (order - 0.1)


def test_the_stochastic_solver_is_the_published_formula():
    chain, std, seed = Diffusion(variance="fixed_small").respace(9), 0.5, 3
    x = start()

    def model(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        i = int((chain.timesteps == round(float(timesteps[0]) * 4)).nonzero())
        return exact_eps(chain, x, i, std)

    got = sample(
        model, list(chain.timesteps), x_T=x, sampler="dpm++sde", clip=False, seed=seed,
        diffusion=Diffusion(variance="fixed_small"), progress=False,
    )  # fmt: skip
    ab = torch.cat([torch.ones(1, dtype=torch.float64), chain.alphas_cumprod])
    alpha, sigma = ab.sqrt(), (1 - ab).sqrt()
    lambdas = (alpha / sigma).log()
    before, images = None, torch.arange(len(x))
    for i in reversed(range(9)):
        eps = exact_eps(chain, x, i, std)
        x_0 = (x - sigma[i + 1] * eps) / alpha[i + 1]
        if i == 0:
            x = x_0
            break
        h = lambdas[i] - lambdas[i + 1]
        predicted = x_0
        if before is not None:
            ratio = min(float(h / (2 * (lambdas[i + 1] - lambdas[i + 2]))), 0.5)
            predicted = x_0 + ratio * (x_0 - before)
        z = normal(
            NoiseKey(seed, STREAM_REVERSE, images, int(chain.timesteps[i])), x.shape, x.device
        )
        mean = sigma[i] / sigma[i + 1] * (-h).exp() * x - alpha[i] * torch.expm1(-2 * h) * predicted
        x = mean + sigma[i] * (-torch.expm1(-2 * h)).sqrt() * z.double()
        before = x_0
    assert (got.double() - x).abs().max() < 1e-6


class Mixture:
    """Images near one of six: the exact eps is known, and so is the way to them."""

    def __init__(self, std: float):
        self.diffusion, self.std = Diffusion(variance="fixed_small"), std
        generator = torch.Generator().manual_seed(0)
        self.means = torch.randn(6, 1, 4, 4, generator=generator).double() / 2

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        ab = self.diffusion.alphas_cumprod[(timesteps.double() * 4).round().long()]
        ab = ab.view(-1, 1, 1, 1, 1)
        variance = ab * self.std**2 + 1 - ab
        away = x[:, None] - ab.sqrt() * self.means
        share = (-(away.square() / variance).flatten(2).sum(2) / 2).softmax(1)
        toward = (share[:, :, None, None, None] * away).sum(1)
        return (1 - ab[:, 0]).sqrt() * toward / variance[:, 0]


def trajectory_errors(runs: list[tuple[str, int]]) -> list[float]:
    """Of the images of a sampler and its steps, against 1,000 steps."""
    model = Mixture(0.3)
    x = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double()

    def run(sampler: str, count: int) -> torch.Tensor:
        return sample(
            model, count, x_T=x, sampler=sampler, clip=False, diffusion=model.diffusion,
            progress=False,
        )  # fmt: skip

    exact = run("dpm++", 1000)
    return [float((run(*which) - exact).flatten(1).norm(dim=1).mean()) for which in runs]


def test_the_corrector_brings_the_walk_nearer_to_the_exact_one():
    ddim, dpm, unipc, dpm_10, unipc_10 = trajectory_errors(
        [("ddim", 15), ("dpm++", 15), ("unipc", 15), ("dpm++", 10), ("unipc", 10)]
    )
    assert unipc < 0.6 * dpm < 0.6 * ddim
    assert unipc_10 < 0.9 * dpm_10


@pytest.mark.parametrize("sampler", SOLVERS)
def test_the_scheduler_takes_the_steps_of_sample(sampler):
    chain, x = Diffusion(), start().float()

    def model(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        eps = 0.9 * x + 0.1 * (timesteps / 200).sin().view(-1, 1, 1, 1)
        return torch.cat([eps, torch.cos(3 * x)], 1)

    noises = {}

    def remember(step: iddpm_ext.sampling.SampleStep) -> None:
        key = NoiseKey(5, STREAM_REVERSE, torch.arange(len(x)), step.timestep)
        noises[step.t] = normal(key, x.shape, x.device)

    want = sample(
        model, 8, x_T=x, sampler=sampler, seed=5, diffusion=chain, progress=False, callback=remember
    )
    scheduler = iddpm_ext.IDDPMScheduler.from_diffusion(chain, sampler=sampler)
    scheduler.set_timesteps(8)
    for i, t in enumerate(scheduler.timesteps):
        out = model(x, t.expand(len(x)))
        x = scheduler.step(out, t, x, variance_noise=noises[7 - i]).prev_sample
    # Noise drawn inside the kernel is rounded otherwise.
    assert (x - want).abs().max() < 1e-5


def test_a_walk_that_jumps_starts_anew():
    chain = Diffusion(variance="fixed_small").respace(20)
    walking = SolverWalk(chain, SOLVERS["unipc3"])
    x = start()
    walking(19, x, x, x)
    assert torch.equal(walking(10, x, 2 * x, 3 * x), 2 * x)

"""Analytic variances: the published equation, the optimum of data whose moments are known, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from likelihood_model import STEPS, images, trained, untrained

import iddpm_ext
from iddpm_ext import Diffusion, nll, sample
from iddpm_ext.diffusion.analytic import AnalyticDiffusion
from iddpm_ext.diffusion.moments import Moments, training_log_snr
from iddpm_ext.engines.spec import weights_fingerprint
from iddpm_ext.likelihood import find_moments, find_schedules
from iddpm_ext.ops.columns import Column
from iddpm_ext.random import STREAM_FORWARD, NoiseKey, normal

CHAIN = Diffusion()
STD = 0.3


def exact_moments(chain: Diffusion) -> Moments:
    """The moments for normal data with deviation STD: eps_theta = sqrt(1 - ab) x_t / Var(x_t)."""
    ab = chain.alphas_cumprod
    return Moments(torch.arange(chain.num_timesteps), (1 - ab) / (ab * STD**2 + 1 - ab))


def model_of(extra: dict | None = None) -> iddpm_ext.UNet:
    model = untrained()
    model.load_state_dict(trained().state_dict())
    model.extra = dict(extra or {})
    return model


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps", [10, 300])
def test_the_variances_are_those_of_the_published_equation(eta, steps):
    gamma = exact_moments(CHAIN)
    chain = AnalyticDiffusion(CHAIN, gamma.x_0_variance(CHAIN)).respace(steps)
    table = chain.table(sampler="ddim", eta=eta, dtype=torch.float64)
    got = table[1:, Column.LOG_VARIANCE_BIAS].exp()
    # Equation 9 of Bao et al. 2022, line by line.
    ab, before = chain.alphas_cumprod[1:], chain.alphas_cumprod[:-1]
    alpha, beta_bar, beta_bar_before = ab / before, 1 - ab, 1 - before
    lambda_2 = eta**2 * beta_bar_before / beta_bar * (1 - alpha)
    factor = (beta_bar / alpha).sqrt() - (beta_bar_before - lambda_2).sqrt()
    score_square = gamma.eps_square[chain.timesteps[1:]] / beta_bar
    expected = lambda_2 + factor**2 * (1 - beta_bar * score_square)
    # Near pure noise 1 - E|eps|^2 cancels, and the published formula even more.
    assert ((got - expected).abs() / expected).max() < 2e-5
    assert bool((table[1:, Column.NOISE_SCALE] == 1).all()) and not table[0, Column.NOISE_SCALE]
    assert not table[:, Column.LOG_VARIANCE_SCALE].any()
    assert torch.equal(
        chain.table().double()[:, :4], Diffusion().respace(steps).table().double()[:, :4]
    )


def test_of_normal_data_the_analytic_chain_is_exact():
    # q(x_{t-1} | x_t) is normal, with the mean of the exact eps. So the bound of every step is attained, and
    # images have the deviation of the data for any number of steps.
    chain = AnalyticDiffusion(CHAIN, exact_moments(CHAIN).x_0_variance(CHAIN)).respace(6)
    x = torch.randn(40_000, 1, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    for sampler in ("ddpm", "ddim"):
        y = x
        for i in reversed(range(6)):
            ab = chain.alphas_cumprod[i]
            eps = (1 - ab).sqrt() * y / (ab * STD**2 + 1 - ab)
            noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(i + 1)).double()
            t = torch.full((len(y),), i)
            y = chain.reverse_step(eps, y, t, noise, sampler=sampler, clip=False).x_prev
        assert float(y.std()) == pytest.approx(STD, rel=0.02)


def test_the_noise_that_no_step_sees_is_limited_to_a_level():
    variance = exact_moments(CHAIN).x_0_variance(CHAIN)
    free = AnalyticDiffusion(CHAIN, variance).respace(5).table(dtype=torch.float64)
    limited = AnalyticDiffusion(CHAIN, variance, 1.0).respace(5).table(dtype=torch.float64)
    deviation = (limited[1, Column.LOG_VARIANCE_BIAS] / 2).exp()
    assert float(deviation) * math.sqrt(2 / math.pi) == pytest.approx(2 / 255)
    assert free[1, Column.LOG_VARIANCE_BIAS] > limited[1, Column.LOG_VARIANCE_BIAS]
    rest = [0, 2, 3, 4]
    assert torch.equal(free[rest], limited[rest])


def test_moments_of_a_few_images_are_those_of_the_network_itself():
    model, x_0 = trained(), images(24, 3)
    found = find_moments(model, x_0, limit=None, progress=False)
    assert found.timesteps[0] == 0 and found.timesteps[-1] == STEPS - 1
    chain = model.diffusion
    for place in (5, 40, -20):
        step = int(found.timesteps[place])
        t = torch.full((len(x_0),), step)
        key = NoiseKey(0, STREAM_FORWARD, torch.arange(len(x_0)), step)
        noise = normal(key, x_0.shape, x_0.device)
        out = model(chain.q_sample(x_0, t, noise), chain.model_timesteps(t))[:, :1]
        mean = 1 + float((out.square() - noise.square()).mean())
        assert float(found.eps_square[place]) == pytest.approx(mean, abs=1e-4)
    searched = find_schedules(model, x_0, limit=None, most=5, progress=False).moments
    same = searched.eps_square[found.timesteps]
    assert torch.allclose(same, found.eps_square, atol=1e-5)


def test_variance_between_known_steps_is_interpolated_over_log_snr():
    known = exact_moments(CHAIN)
    some = torch.arange(0, 4000, 50)
    got = Moments(some, known.eps_square[some]).x_0_variance(CHAIN)
    expected = known.x_0_variance(CHAIN)
    assert ((got - expected).abs() / expected)[:3950].max() < 0.05
    assert training_log_snr(CHAIN.respace(10)).shape == (4000,)


def test_the_best_steps_have_the_least_closed_form_bound():
    import itertools

    some = torch.tensor([0, 3, 20, 200, 1000, 2500, 3999])
    moments = Moments(some, exact_moments(CHAIN).eps_square[some])
    variance = exact_moments(CHAIN).x_0_variance(CHAIN)

    def bound(steps: list[int]) -> float:
        chain = AnalyticDiffusion(CHAIN, variance).respace(steps)
        sigma = chain.table(dtype=torch.float64)[:, Column.LOG_VARIANCE_BIAS]
        fixed = chain.table(dtype=torch.float64)[:, Column.POSTERIOR_LOG_VARIANCE]
        decoder = max(0.0, float(sigma[0] + math.log(2 * math.pi * math.e)) / 2 + math.log(127.5))
        return float((sigma - fixed)[1:].sum()) / 2 + decoder

    for count in (2, 3, 4):
        chains = [[*c, 3999] for c in itertools.combinations(some.tolist()[:-1], count - 1)]
        assert bound(moments.best_steps(CHAIN, count)) == pytest.approx(min(map(bound, chains)))


def test_sample_and_nll_take_the_checkpoints_moments(tmp_path):
    model = model_of()
    found = find_moments(model, images(10, 4), limit=None, progress=False)
    model.extra["moments"] = found.to_extra(weights_fingerprint(model))
    iddpm_ext.save(model, tmp_path / "m.safetensors")
    loaded = iddpm_ext.load(tmp_path / "m.safetensors")
    for sampler in ("ddpm", "ddim"):
        settings = {"sampler": sampler, "variance": "analytic", "n": 3, "progress": False}
        x = sample(loaded, 6, **settings)
        # The prepared chains of the engine, and the reference step by step.
        plain = sample(loaded, 6, engine=False, backend="reference", **settings)
        assert (x - plain).abs().max() < 2e-4
        assert not torch.equal(x, sample(loaded, 6, n=3, sampler=sampler, progress=False))
    x_0 = images(16, 5)
    settings = {"variance": "analytic", "progress": False}
    few = nll(loaded, x_0, steps=5, **settings).bpd
    assert few < nll(loaded, x_0, steps=5, variance="fixed_small", progress=False).bpd
    assert nll(loaded, x_0, steps="analytic-5", **settings).bpd < few


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_fixed_variances_are_those_of_a_chain_that_never_learned(variance):
    model = model_of()
    chain = Diffusion("cosine", STEPS, variance=variance)
    got = sample(model, 5, n=2, variance=variance, progress=False)
    module = sample(
        lambda x, t: model(x, t)[:, :1],
        5,
        n=2,
        diffusion=chain,
        image_shape=(1, 8, 8),
        progress=False,
    )
    assert (got - module).abs().max() < 2e-4


def moments_extra(model: iddpm_ext.UNet, **changes: object) -> dict:
    found = {"timesteps": [0, 199], "eps_square": [0.5, 0.9], "weights": weights_fingerprint(model)}
    return {"moments": {**found, **changes}}


@pytest.mark.parametrize(
    ("extra", "arguments", "message"),
    [
        (lambda m: {}, {"variance": "analytic"}, "moments where it has none"),
        (lambda m: moments_extra(m, weights="0" * 16), {"variance": "analytic"}, "of these weights"),
        (lambda m: moments_extra(m, timesteps=[0, 200]), {"variance": "analytic"}, "chain of 200"),
        (lambda m: moments_extra(m, timesteps=[5, 5]), {"variance": "analytic"}, "ascending"),
        (lambda m: {}, {"steps": "analytic-5"}, "moments where it has none"),
        (moments_extra, {"steps": "analytic-x"}, "analytic-K"),
        (moments_extra, {"steps": "analytic-3"}, "at most the 2 moments"),
        (moments_extra, {"variance": "best"}, "must be None or one of"),
        (moments_extra, {"variance": "analytic", "sampler": "unipc"}, "solves an equation"),
        (moments_extra, {"variance": "fixed_small", "sampler": "ddim"}, "None, 'analytic' or 'optimal'"),
        (moments_extra, {"steps": "pictures-4"}, "the checkpoint has none"),
    ],
)  # fmt: skip
def test_moments_schedules_and_variances_that_do_not_go_together_are_refused(
    extra, arguments, message
):
    model = model_of()
    model.extra = extra(model)
    with pytest.raises(ValueError, match=message):
        sample(model, n=2, progress=False, **arguments)

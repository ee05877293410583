"""Optimal variances: the equation, data whose covariance is known, the head and what it refuses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from likelihood_model import images, trained, untrained

import iddpm_ext
from iddpm_ext import Diffusion, nll, sample
from iddpm_ext.cli import main
from iddpm_ext.diffusion.covariance import Covariance, CovarianceDiffusion, mixed, shares_of
from iddpm_ext.engines.spec import weights_fingerprint
from iddpm_ext.likelihood import find_covariance, find_moments
from iddpm_ext.networks.head import with_last_convolution

CHAIN = Diffusion()
# Of the pixels of normal data.
STD = torch.tensor([0.05, 0.3, 0.8], dtype=torch.float64)


def exact_variance(chain: Diffusion) -> torch.Tensor:
    """Var(x_0 | x_t) of every training step and pixel of such data, float64 [T, 3]."""
    ab = Diffusion().alphas_cumprod[:, None]
    return STD**2 * (1 - ab) / (ab * STD**2 + 1 - ab)


def chain_of(heads: int, noise_levels: float | None = None) -> CovarianceDiffusion:
    """Of such data, with heads at evenly spaced steps."""
    knots = torch.linspace(0, 3999, heads).long() if heads > 1 else torch.tensor([2000])
    mean = exact_variance(CHAIN).mean(1)
    return CovarianceDiffusion(CHAIN, mean, shares_of(CHAIN, knots), noise_levels)


def model_of(**extra: object) -> iddpm_ext.UNet:
    model = untrained()
    model.load_state_dict(trained().state_dict())
    model.extra = dict(extra)
    return model


@pytest.fixture(scope="module")
def found() -> Covariance:
    return find_covariance(trained(), images(200, 3), limit=None, updates=150, progress=False)


@pytest.fixture
def model(found) -> iddpm_ext.UNet:
    return model_of(covariance=found.to_extra(weights_fingerprint(trained())))


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.6)])
def test_the_variances_are_those_of_the_published_equation(sampler, eta):
    known = exact_variance(CHAIN)
    chain = chain_of(1).respace(12)
    t = torch.arange(1, 12)
    variance = known[chain.timesteps[t]]
    h = (variance / variance.mean(1, keepdim=True)).log()
    out = torch.cat([torch.zeros(11, 1, 1, 3).double(), h[:, None, None, :]], dim=1)
    got = chain.with_log_variance(out, t, sampler, eta)[:, 1, 0].exp()
    ab, before = chain.alphas_cumprod[1:, None], chain.alphas_cumprod[:-1, None]
    alpha, rest, rest_before = ab / before, 1 - ab, 1 - before
    lambda_2 = (1.0 if sampler == "ddpm" else eta**2) * rest_before / rest * (1 - alpha)
    factor = before.sqrt() - ((rest_before - lambda_2) * ab / rest).sqrt()
    expected = lambda_2 + factor**2 * variance
    assert ((got - expected).abs() / expected).max() < 1e-9


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_of_normal_data_the_chain_is_exact_in_every_pixel(sampler):
    known = exact_variance(CHAIN)
    chain = chain_of(2).respace(6)
    x = torch.randn(30_000, 1, 1, 3, generator=torch.Generator().manual_seed(0)).double()
    for i in reversed(range(6)):
        ab, variance = chain.alphas_cumprod[i], known[chain.timesteps[i]]
        eps = (1 - ab).sqrt() * x / (ab * STD**2 + 1 - ab)
        h = (variance / variance.mean()).log().expand_as(x)
        t = torch.full((len(x),), i)
        out = chain.with_log_variance(torch.cat([eps, h, h], dim=1), t, sampler)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i + 1)).double()
        x = chain.reverse_step(out, x, t, noise, sampler=sampler, clip=False).x_prev
    assert (x.std(0)[0, 0] / STD - 1).abs().max() < 0.02


def test_the_noise_that_no_step_sees_is_limited_to_a_level_in_every_pixel():
    chain = chain_of(1, 1.0).respace(5)
    out, t = torch.zeros(5, 2, 1, 1), torch.arange(5)
    out[1, 1] = 3.0
    log_variance = chain.with_log_variance(out, t)[:, 1, 0, 0]
    assert float((log_variance[1] / 2).exp()) * math.sqrt(2 / math.pi) == pytest.approx(2 / 255)
    assert float(log_variance[2]) > float(log_variance[1])


def test_heads_are_interpolated_between_their_steps_over_log_snr():
    knots = torch.tensor([10, 500, 3000])
    shares = shares_of(CHAIN, knots)
    assert torch.equal(shares[knots], torch.eye(3).double())
    assert torch.equal(shares[0], shares[10]) and torch.equal(shares[-1], shares[3000])
    assert torch.allclose(shares.sum(1), torch.ones(4000).double())
    log_snr = (CHAIN.alphas_cumprod / (1 - CHAIN.alphas_cumprod)).log()
    part = (log_snr[100] - log_snr[10]) / (log_snr[500] - log_snr[10])
    assert float(shares[100, 1]) == pytest.approx(float(part)) and shares[100, 2] == 0
    outputs = torch.arange(6.0).reshape(1, 6, 1, 1)  # of two channels
    assert mixed(outputs, torch.tensor([[0.0, 0.25, 0.75]]))[0, :, 0, 0].tolist() == [3.5, 4.5]


def test_a_network_with_another_last_convolution_shares_the_others():
    model = model_of()
    weight, bias = torch.randn(5, 32, 3, 3), torch.randn(5)
    other = with_last_convolution(model, weight, bias)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 900.0])

    def expected() -> torch.Tensor:
        seen = []
        hook = model.out[1].register_forward_hook(lambda module, args, out: seen.append(out))
        model(x, t)
        hook.remove()
        return F.conv2d(seen[0], weight, bias, padding=1)

    assert torch.allclose(other(x, t), expected(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.middle_block[0].in_layers[2].weight.mul_(2)
        model.time_embed = torch.nn.Sequential(*(layer for layer in untrained(7).time_embed))
    weight = weight + 1
    again = with_last_convolution(model, weight, bias)
    assert again is other and torch.allclose(other(x, t), expected(), rtol=1e-4, atol=1e-4)
    assert with_last_convolution(model, weight[:3], bias[:3]) is not other


def test_the_head_is_better_than_the_mean_and_than_what_was_learned(model, tmp_path):
    model.extra["moments"] = find_moments(
        model, images(32, 4), limit=None, progress=False
    ).to_extra(weights_fingerprint(model))
    iddpm_ext.save(model, tmp_path / "m.safetensors")
    loaded = iddpm_ext.load(tmp_path / "m.safetensors")
    for steps in (5, 20):
        learned, analytic, optimal = (
            nll(loaded, images(32, 5), steps=steps, variance=name, progress=False).bpd
            for name in (None, "analytic", "optimal")
        )
        assert optimal < analytic < learned


def test_the_means_and_ratios_are_of_the_squared_error(found):
    # Of fresh noise, the mean squared error at a step is V_t, and exp(h) times it fits better.
    model, x_0 = model_of(), images(200, 3)
    chain = model.diffusion
    features = []
    hook = model.out[1].register_forward_hook(lambda module, args, out: features.append(out))
    for place in (20, 50, 80):
        step, mean = int(found.timesteps[place]), float(found.x_0_variance[place])
        t = torch.full((len(x_0),), step)
        x_t = chain.q_sample(
            x_0, t, torch.randn(x_0.shape, generator=torch.Generator().manual_seed(9))
        )
        out = model(x_t, chain.model_timesteps(t))
        square = (chain.p_mean_variance(out, x_t, t).x_0 - x_0).square() / mean
        shares = shares_of(chain, found.knots)[step].expand(len(x_0), -1).float()
        h = mixed(F.conv2d(features[-1], found.weight, found.bias, padding=1), shares)
        assert float(square.mean()) == pytest.approx(1, abs=0.35)
        assert float((square * torch.exp(-h) + h).mean()) < float(square.mean())
    hook.remove()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_engine_samples_what_the_module_does(model, sampler):
    settings = {"sampler": sampler, "variance": "optimal", "n": 3, "progress": False}
    x = sample(model, 6, **settings)
    plain = sample(model, 6, engine=False, backend="reference", **settings)
    assert (x - plain).abs().max() < 2e-4
    assert not torch.equal(x, sample(model, 6, n=3, sampler=sampler, progress=False))
    with torch.no_grad():
        model.out[2].bias[0] += 0.1
    model.extra["covariance"]["weights"] = weights_fingerprint(model)
    assert (sample(model, 6, **settings) - x).abs().max() > 1e-3


def changed(**values: object):
    def change(extra: dict) -> dict:
        return {"covariance": {**extra["covariance"], **values}}

    return change


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda extra: {}, {}, "iddpm covariance trains one"),
        (changed(weights="0" * 16), {}, "of these weights"),
        (changed(bias=[0.0, 0.0]), {}, "8 heads of 1 channels from 32"),
        (changed(knots=[9] * 8), {}, "chain of 200"),
        (changed(timesteps=[5, 5], x_0_variance=[1.0, 1.0]), {}, "chain of 200"),
        (changed(timesteps=[5, 9], x_0_variance=[1.0, 0.0]), {}, "2 means"),
        (lambda extra: extra, {"sampler": "unipc"}, "solves an equation"),
    ],
)  # fmt: skip
def test_heads_that_do_not_fit_are_refused(model, change, arguments, message):
    model.extra = change(model.extra)
    with pytest.raises(ValueError, match=message):
        sample(model, 4, n=1, variance="optimal", progress=False, **arguments)


def test_a_network_that_is_more_than_its_configuration_is_refused(model):
    handle = model.middle_block[0].register_forward_hook(lambda module, args, out: out)
    with pytest.raises(
        ValueError, match=r"sample: model must be .* middle_block.0 has forward hooks"
    ):
        sample(model, 4, n=1, variance="optimal", progress=False)
    with pytest.raises(ValueError, match="find_covariance: model must be"):
        find_covariance(model, images(4, 0), progress=False)
    handle.remove()
    with pytest.raises(ValueError, match="UNet of this package"):
        sample(lambda x, t: x, 4, n=1, variance="optimal", diffusion=CHAIN, image_shape=(1, 8, 8),
               progress=False)  # fmt: skip
    with pytest.raises(ValueError, match="updates must be an int above 0, got 0"):
        find_covariance(model, images(4, 0), updates=0)


def test_the_command_stores_a_head_that_sample_and_nll_take(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    iddpm_ext.save(model_of(), "m.safetensors")
    levels = ((images(40, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.savez("x.npz", arr_0=levels)
    command = [
        "covariance",
        "m.safetensors",
        "--data",
        "x.npz",
        "-n",
        "40",
        "--updates",
        "3",
        "--json",
    ]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == 8 * (32 * 9 + 1)
    assert (
        main(
            [
                "nll",
                "m.safetensors",
                "--data",
                "x.npz",
                "-n",
                "4",
                "--steps",
                "5",
                "--variance",
                "optimal",
            ]
        )
        == 0
    )
    assert (
        main(
            [
                "sample",
                "m.safetensors",
                "-n",
                "2",
                "--steps",
                "4",
                "--variance",
                "optimal",
                "--out",
                "o.npz",
            ]
        )
        == 0
    )
    assert main(["covariance", "fashion-mnist", "--data", "x.npz"]) == 1
    assert "out must be given" in capsys.readouterr().err

"""Velocity, sigmoid schedule, zero terminal SNR, min-SNR weights: against other formulas and diffusers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr as theirs_rescaled
from diffusers.training_utils import compute_snr

import iddpm_ext
from iddpm_ext import Diffusion, UNet, UNetConfig, ops
from iddpm_ext.checkpoint.runs import read_tensors
from iddpm_ext.diffusion import (
    VARIANCES,
    linear_beta_schedule,
    rescale_zero_terminal_snr,
    sigmoid_beta_schedule,
)
from iddpm_ext.interop.process import config_of, diffusion_of
from iddpm_ext.random import NoiseKey
from iddpm_ext.training import TrainConfig, train

T = 60
PROCESSES = {
    "cosine": {"schedule": "cosine"},
    "sigmoid": {"schedule": "sigmoid"},
    "linear, pure noise": {"schedule": "linear", "zero_terminal_snr": True},
    "cosine, pure noise": {"schedule": "cosine", "zero_terminal_snr": True},
}


def process_of(name: str, **changes) -> Diffusion:
    return Diffusion(**{"num_timesteps": T, "prediction": "velocity", **PROCESSES[name], **changes})


def drawn(learned: bool, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    """x_0, noise, the network's output and t of four images."""
    g = torch.Generator().manual_seed(0)
    x_0 = (torch.rand(4, 3, 5, 4, generator=g, dtype=torch.float64) * 255).round() / 127.5 - 1
    noise = torch.randn(4, 3, 5, 4, generator=g, dtype=torch.float64)
    out = torch.randn(4, 6 if learned else 3, 5, 4, generator=g, dtype=torch.float64)
    return x_0.to(dtype), noise.to(dtype), out.to(dtype), torch.tensor([0, 1, T // 2, T - 1])


def angle(diffusion: Diffusion, t: torch.Tensor) -> torch.Tensor:
    """phi with x_t = cos(phi) x_0 + sin(phi) noise, from the betas alone, float64 [N, 1, 1, 1]."""
    signal = (1 - diffusion.betas).cumprod(0).sqrt()[t]
    return torch.atan2((1 - signal.square()).sqrt(), signal).view(-1, 1, 1, 1)


def gaussians(diffusion: Diffusion, x_0, x_t, t):
    """Mean of q(x_{t-1} | x_t, x_0), its clipped log-variance, and log beta_t, by Bayes' rule."""
    betas = diffusion.betas
    bars = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    beta, before = betas[t].view(-1, 1, 1, 1), bars[t].view(-1, 1, 1, 1)
    # The product of N(sqrt(ab') x_0, 1 - ab') and of x_t = sqrt(1 - beta) x + sqrt(beta) noise.
    spread = (1 - before).clamp(min=1e-300)
    precision = 1 / spread + (1 - beta) / beta
    mean = (before.sqrt() * x_0 / spread + (1 - beta).sqrt() * x_t / beta) / precision
    second = 1 / (1 / (1 - bars[1]) + (1 - betas[1]) / betas[1])
    log_variance = torch.where(t.view(-1, 1, 1, 1) == 0, second.log(), -precision.log())
    return mean, log_variance, beta.log()


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", PROCESSES)
def test_velocity_has_the_numbers_of_its_definition_in_float64(name, variance):
    diffusion = process_of(name, variance=variance)
    x_0, noise, out, t = drawn(diffusion.learns_variance)
    phi = angle(diffusion, t)
    x_t = diffusion.q_sample(x_0, t, noise)
    torch.testing.assert_close(x_t, phi.cos() * x_0 + phi.sin() * noise, rtol=1e-9, atol=1e-9)

    found = diffusion.p_mean_variance(out, x_t, t, clip=False)
    predicted = phi.cos() * x_t - phi.sin() * out[:, :3]
    torch.testing.assert_close(found.x_0, predicted, rtol=1e-8, atol=1e-8)
    mean, _, _ = gaussians(diffusion, predicted, x_t, t)
    true_mean, small, large = gaussians(diffusion, x_0, x_t, t)
    torch.testing.assert_close(found.mean, mean, rtol=1e-7, atol=1e-7)
    log_variance = {
        "learned_range": lambda: (out[:, 3:] + 1) / 2 * large + (1 - out[:, 3:]) / 2 * small,
        "learned": lambda: out[:, 3:],
        "fixed_small": lambda: small.expand_as(mean),
        "fixed_large": lambda: torch.where(
            t.view(-1, 1, 1, 1) == 0, small, large).expand_as(mean),
    }[variance]()  # fmt: skip
    torch.testing.assert_close(found.log_variance, log_variance, rtol=1e-7, atol=1e-7)

    ratio = (small - log_variance).exp() + (true_mean - mean).square() / log_variance.exp()
    kl = 0.5 * (log_variance - small + ratio - 1)
    bits = kl.flatten(1).mean(1) / math.log(2)
    term = diffusion.vlb_terms_bpd(out, x_0, x_t, t, clip=False)
    torch.testing.assert_close(term[1:], bits[1:], rtol=1e-6, atol=1e-7)

    objective = "hybrid" if diffusion.learns_variance else "simple"
    losses = diffusion.training_losses(lambda x, t: out, x_0, t, noise, objective)
    mse = (phi.cos() * noise - phi.sin() * x_0 - out[:, :3]).square().flatten(1).mean(1)
    torch.testing.assert_close(losses["mse"], mse, rtol=1e-8, atol=1e-9)
    if objective == "hybrid":
        torch.testing.assert_close(
            losses["loss"][1:], (mse + 1e-3 * T * bits)[1:], rtol=1e-6, atol=0
        )
        assert losses["loss"].isfinite().all()


@pytest.mark.parametrize("name", ["sigmoid", "cosine, pure noise"])
def test_kernels_compute_what_the_reference_does_in_float64(name):
    diffusion = process_of(name)
    x_0, noise, out, t = drawn(True, torch.float32)
    table, exact = diffusion.table(), diffusion.table(dtype=torch.float64)
    x_t = ops.q_sample(x_0, t, table, noise, backend="cpu")
    z = NoiseKey(0, 1, torch.arange(4), 0)
    targets = torch.tensor([-1, 0, 20])
    x_0_d, x_t_d, out_d, noise_d = x_0.double(), x_t.double(), out.double(), noise.double()
    for got, wanted in (
        (
            ops.reverse_step(x_t, out, t, table, z, backend="cpu")[0],
            ops.reverse_step(x_t_d, out_d, t, exact, z, backend="reference")[0],
        ),
        (
            ops.vlb_terms(out, x_0, x_t, t, table, backend="cpu"),
            ops.vlb_terms(out_d, x_0_d, x_t_d, t, exact, backend="reference"),
        ),
        (
            ops.hybrid_loss(out, x_0, x_t, noise, t, table, backend="cpu").loss,
            ops.hybrid_loss(out_d, x_0_d, x_t_d, noise_d, t, exact, backend="reference").loss,
        ),
        (
            ops.vlb_to_all(out, x_0, x_t, t, table, targets, backend="cpu"),
            ops.vlb_to_all(out_d, x_0_d, x_t_d, t, exact, targets, backend="reference"),
        ),
    ):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_every_jump_from_pure_noise_has_the_term_of_its_chain():
    diffusion = process_of("linear, pure noise")
    x_0, noise, out, _ = drawn(True)
    t = torch.full((4,), T - 1)
    x_t = diffusion.q_sample(x_0, t, noise)
    assert torch.equal(x_t, noise)
    table = diffusion.table(dtype=torch.float64)
    jumps = ops.vlb_to_all(out, x_0, x_t, t, table, torch.tensor([10, 40]), backend="reference")
    for column, target in enumerate((10, 40)):
        chain = diffusion.respace([3, target, T - 1])
        last = torch.full((4,), 2)
        wanted = chain.vlb_terms_bpd(out, x_0, x_t, last)
        torch.testing.assert_close(jumps[:, column], wanted, rtol=1e-9, atol=1e-9)
    assert torch.equal(diffusion.prior_bpd(x_0), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_a_velocity_network_draws_what_the_same_epsilon_network_draws(sampler):
    as_v, as_eps = process_of("sigmoid"), process_of("sigmoid", prediction="epsilon")
    weight = torch.linspace(-0.4, 0.6, 9, dtype=torch.float64).view(1, 1, 3, 3)

    def epsilon(x, timesteps):
        h = torch.nn.functional.conv2d(x.flatten(0, 1)[:, None], weight, padding=1).view_as(x)
        return torch.cat([x + 0.1 * h, h.tanh()], dim=1)

    def velocity(x, timesteps):
        t = (timesteps.double() * T / 1000).round().long()
        out, phi = epsilon(x, timesteps), angle(as_v, t)
        # x_0 from eps, then v from both.
        x_0 = (x - phi.sin() * out[:, :3]) / phi.cos()
        return torch.cat([phi.cos() * out[:, :3] - phi.sin() * x_0, out[:, 3:]], dim=1)

    x_T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    images = [
        iddpm_ext.sample(model, 12, sampler=sampler, x_T=x_T, diffusion=process, progress=False)
        for model, process in ((velocity, as_v), (epsilon, as_eps))
    ]
    torch.testing.assert_close(images[0], images[1], rtol=1e-6, atol=1e-6)


def test_sigmoid_schedule_is_that_of_its_formula():
    steps = np.linspace(0, 1, T + 1)
    bars = 1 / (1 + np.exp(-3)) - 1 / (1 + np.exp(-(6 * steps - 3)))
    bars /= 1 / (1 + np.exp(-3)) - 1 / (1 + np.exp(3))
    wanted = [min(1 - b / a, 0.999) for a, b in pairwise(bars)]
    assert sigmoid_beta_schedule(T).tolist() == pytest.approx(wanted, rel=1e-9)
    with pytest.raises(
        ValueError, match="sigmoid_beta_schedule: start must be below end -1, got 0"
    ):
        sigmoid_beta_schedule(T, 0, -1)


def test_rescaled_schedule_is_that_of_diffusers():
    betas = linear_beta_schedule(1000)
    ours, theirs = rescale_zero_terminal_snr(betas), theirs_rescaled(betas.clone())
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    process = Diffusion("linear", 1000, prediction="velocity", zero_terminal_snr=True)
    assert process.alphas_cumprod[-1] == 0 and process.alphas_cumprod[0] == 1 - betas[0]
    assert process.respace(50).alphas_cumprod[-1] == 0
    with pytest.raises(ValueError, match="prediction must be x_0, x_prev or velocity for a chain"):
        Diffusion("linear", 1000, zero_terminal_snr=True)
    with pytest.raises(ValueError, match="every beta must be above 0 and below 1"):
        Diffusion(betas=[0.1, 1.0, 0.5], prediction="x_0")


@pytest.mark.parametrize("prediction", ["epsilon", "x_0", "velocity", "x_prev"])
def test_min_snr_weights_are_those_of_the_error_in_x_0(prediction):
    gamma = 5.0
    diffusion = Diffusion("cosine", T, prediction=prediction)
    x_0, noise, out, t = drawn(True)
    for objective in ("simple", "hybrid"):
        plain, weighted = (
            diffusion.training_losses(lambda x, t: out, x_0, t, noise, objective, min_snr=given)
            for given in (None, gamma)
        )
        x_t = diffusion.q_sample(x_0, t, noise)
        predicted = diffusion.p_mean_variance(out, x_t, t, clip=False).x_0
        bars = diffusion.alphas_cumprod[t]
        snr = bars / (1 - bars)
        error = (predicted - x_0).square().flatten(1).mean(1)
        rest = plain["loss"] - plain["mse"]
        wanted = snr.clamp(max=gamma) * error + rest
        torch.testing.assert_close(weighted["loss"], wanted, rtol=1e-6, atol=1e-9)
        assert torch.equal(weighted["mse"], plain["mse"])
    with pytest.raises(ValueError, match="min_snr must be above 0, and None for objective vlb"):
        diffusion.training_losses(lambda x, t: out, x_0, t, noise, "vlb", min_snr=gamma)


@pytest.mark.parametrize("theirs", ["epsilon", "sample", "v_prediction"])
def test_losses_and_weights_are_those_of_diffusers(theirs):
    scheduler = diffusers.DDPMScheduler(T, prediction_type=theirs, variance_type="fixed_large")
    diffusion = diffusion_of(scheduler.config)
    x_0, noise, out, t = drawn(False, torch.float32)
    x_t = scheduler.add_noise(x_0, noise, t)
    snr = compute_snr(scheduler, t)
    weight = snr.clamp(max=5.0)
    if theirs == "epsilon":
        target, weight = noise, weight / snr
    elif theirs == "sample":
        target = x_0
    else:
        target, weight = scheduler.get_velocity(x_0, noise, t), weight / (snr + 1)
    losses = diffusion.training_losses(lambda x, t: out, x_0, t, noise, "simple", min_snr=5.0)
    mse = (target - out).square().flatten(1).mean(1)
    torch.testing.assert_close(losses["mse"], mse, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["loss"], weight * mse, rtol=2e-3, atol=1e-5)
    for i in range(4):
        step = scheduler.step(out[i : i + 1], int(t[i]), x_t[i : i + 1])
        ours = diffusion.p_mean_variance(out[i : i + 1], x_t[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(ours.x_0, step.pred_original_sample, rtol=1e-3, atol=1e-3)


def test_processes_survive_diffusers_and_json():
    for process in (
        *(process_of(name) for name in PROCESSES),
        process_of("cosine, pure noise", prediction="x_0", variance="fixed_small"),
        Diffusion("karras", T),
    ):
        there = diffusion_of(config_of(process))
        torch.testing.assert_close(there.alphas_cumprod, process.alphas_cumprod, rtol=1e-12, atol=0)
        assert (there.prediction, there.variance) == (process.prediction, process.variance)
        assert Diffusion.from_dict(json.loads(json.dumps(process.to_dict()))) == process
    sigmoid = diffusers.DDPMScheduler(T, beta_schedule="sigmoid")
    torch.testing.assert_close(
        diffusion_of(sigmoid.config).betas.float(), sigmoid.betas, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_a_chain_from_pure_noise_is_walked_by_every_sampler(sampler):
    process = process_of("linear, pure noise")
    target = torch.linspace(-0.9, 0.9, 3 * 16, dtype=torch.float64).view(1, 3, 4, 4)

    def knowing(x, timesteps):
        t = (timesteps.double() * T / 1000).round().long()
        phi = angle(process, t)
        noise = (x - phi.cos() * target) / phi.sin()
        v = phi.cos() * noise - phi.sin() * target
        return torch.cat([v, torch.zeros_like(v)], dim=1)

    x_T = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    drawn = iddpm_ext.sample(
        knowing, 10, sampler=sampler, x_T=x_T, diffusion=process, progress=False
    )
    torch.testing.assert_close(drawn, target.float().expand_as(drawn), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="cond_fn must be None with ddim and the solvers"):
        iddpm_ext.sample(
            knowing, 10, sampler="ddim", x_T=x_T, diffusion=process, progress=False,
            cond_fn=lambda x, t: x,
        )  # fmt: skip


def test_a_run_with_all_of_them_resumes_bit_for_bit_and_its_network_has_a_bound(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images)
    config = TrainConfig(
        data=str(tmp_path / "d.npz"), out=str(tmp_path / "a"), steps=4, batch_size=4, ema=(0.9,),
        model_channels=32, num_res_blocks=1, channel_mult=(1,), attention_resolutions=(),
        diffusion_steps=40, schedule="sigmoid", prediction="velocity", zero_terminal_snr=True,
        min_snr=5.0, sample_every=4, sample_steps=4, sample_count=2, progress=False, device="cpu",
    )  # fmt: skip
    whole = train(config)
    again = replace(config, out=str(tmp_path / "b"))
    train(replace(again, steps=2))
    resumed = train(again)
    for file in ("model.safetensors", "ema_0.9.safetensors", "optim.safetensors"):
        ours, theirs = read_tensors(whole, file), read_tensors(resumed, file)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    model = iddpm_ext.load(tmp_path / "b")
    assert model.diffusion == Diffusion(
        "sigmoid", 40, prediction="velocity", zero_terminal_snr=True
    )
    x = torch.from_numpy(images[:2]).float()[:, None] / 127.5 - 1
    assert 0 < float(iddpm_ext.nll(model, x, budget=10, progress=False).bpd) < 50
    for changes, says in (
        (
            {"prediction": "epsilon"},
            "prediction must be x_0, x_prev or velocity with zero_terminal",
        ),
        ({"min_snr": 0.0}, "min_snr must be above 0"),
        ({"objective": "vlb"}, "min_snr must be .* left out for objective vlb"),
    ):
        with pytest.raises(ValueError, match=says):
            replace(config, **changes)


def test_a_network_keeps_its_parametrisation_in_its_file(tmp_path):
    model = UNet(UNetConfig(image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1,),
                            attention_resolutions=()))  # fmt: skip
    model.diffusion = process_of("cosine, pure noise")
    iddpm_ext.save(model, tmp_path / "v.safetensors")
    assert iddpm_ext.load(tmp_path / "v.safetensors").diffusion == model.diffusion

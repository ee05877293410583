"""EDM's preconditioning, noise levels and objective: against its own equations and diffusers."""

from __future__ import annotations

import math
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

import iddpm_ext
from iddpm_ext import Diffusion, EDMDenoiser, UNet, UNetConfig
from iddpm_ext.checkpoint.runs import read_tensors
from iddpm_ext.diffusion import LogNormalTimestepSampler, karras_beta_schedule
from iddpm_ext.interop.process import config_of, diffusion_of
from iddpm_ext.sampling.classifier_guidance import require_same_noise
from iddpm_ext.training import TrainConfig, train

T = 40


def process_of(steps: int = T, **changes) -> Diffusion:
    given = {"prediction": "edm", "variance": "fixed_small", "sigma_data": 0.7, **changes}
    return Diffusion("karras", steps, **given)


def levels(steps: int = T) -> torch.Tensor:
    """sigma_t by equation 5 of the paper, smallest first, float64."""
    i = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    return (80 ** (1 / 7) + (1 - i) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7


def coefficients(sigma: torch.Tensor, sd: float) -> tuple[torch.Tensor, ...]:
    """c_skip, c_out, c_in, c_noise of table 1."""
    total = sigma**2 + sd**2
    return sd**2 / total, sigma * sd / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


def network(x: torch.Tensor, c_noise: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
    """Some F, smooth in both arguments."""
    return torch.sin(1.3 * x + c_noise.to(x.dtype).view(-1, 1, 1, 1)) - 0.2 * x.roll(1, -1)


def denoised(x: torch.Tensor, sigma: torch.Tensor, sd: float = 0.7) -> torch.Tensor:
    """D(x; sigma) of equation 7."""
    skip, out, c_in, noise = (c.view(-1, 1, 1, 1) for c in coefficients(sigma, sd))
    return skip * x + out * network(c_in * x, noise.flatten())


def drawn(n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x_0 = torch.rand(n, 3, 5, 4, generator=g, dtype=torch.float64) * 2 - 1
    return x_0, torch.randn(n, 3, 5, 4, generator=g, dtype=torch.float64)


def test_the_chain_has_the_noise_levels_of_edm_and_respacing_keeps_some():
    diffusion = process_of()
    bar = (1 - karras_beta_schedule(T)).cumprod(0)
    torch.testing.assert_close(((1 - bar) / bar).sqrt(), levels(), rtol=1e-9, atol=0)
    theirs = diffusers.EDMEulerScheduler(sigma_max=80.0)
    theirs.set_timesteps(T)
    told = diffusion.model_timesteps(torch.arange(T))
    torch.testing.assert_close(told, theirs.timesteps.flip(0), rtol=1e-6, atol=1e-6)
    shorter = diffusion.respace([0, 13, 26, 39])
    assert torch.equal(shorter.model_timesteps(torch.arange(4)), told[::13])


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
def test_output_and_loss_are_those_of_the_equations_in_float64(sigma_data):
    diffusion = process_of(sigma_data=sigma_data)
    x_0, noise = drawn()
    t = torch.tensor([0, 7, 20, T - 1])
    sigma = levels()[t]
    skip, out, c_in, c_noise = (c.view(-1, 1, 1, 1) for c in coefficients(sigma, sigma_data))
    x = x_0 + sigma.view(-1, 1, 1, 1) * noise
    x_t = diffusion.q_sample(x_0, t, noise)
    torch.testing.assert_close(x_t * (1 + sigma**2).sqrt().view(-1, 1, 1, 1), x, rtol=1e-9, atol=0)
    given = diffusion.model_input(x_t, t)
    torch.testing.assert_close(given, c_in * x, rtol=1e-9, atol=1e-12)
    f = network(c_in * x, c_noise.flatten())
    expected = skip * x + out * f
    found = diffusion.p_mean_variance(f, x_t, t, clip=False).x_0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    # Equation 2 weighed by lambda(sigma) of table 1, which makes it the error of F.
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    loss = weight * (expected - x_0).square().flatten(1).mean(1)
    got = diffusion.training_losses(network, x_0, t, noise, "simple")["loss"]
    torch.testing.assert_close(got, loss, rtol=1e-6, atol=1e-8)  # c_noise is float32


def test_with_unit_data_it_is_the_velocity_with_the_sign_turned():
    x_0, noise = drawn()
    t = torch.tensor([0, 7, 20, T - 1])
    edm, velocity = process_of(sigma_data=1.0), process_of(prediction="velocity")
    x_t = edm.q_sample(x_0, t, noise)
    assert torch.allclose(edm.model_input(x_t, t), x_t, rtol=1e-14, atol=0)
    a, b = (p.p_mean_variance(f, x_t, t).x_0 for p, f in ((edm, noise), (velocity, -noise)))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_ddim_is_eulers_method_of_the_paper():
    # DDIM's steps are Euler's of dx/dsigma = (x - D) / sigma exactly, whatever their length.
    diffusion = process_of()
    _, x_T = drawn()
    got = iddpm_ext.sample(network, None, sampler="ddim", x_T=x_T, diffusion=diffusion, clip=False,
                           backend="reference", progress=False)  # fmt: skip
    sigma = levels()
    x = x_T * (1 + sigma[-1] ** 2).sqrt()
    for i in reversed(range(T)):
        below = sigma[i - 1] if i else torch.zeros((), dtype=torch.float64)
        x = x + (below - sigma[i]) * (x - denoised(x, sigma[i].expand(4))) / sigma[i]
    torch.testing.assert_close(got.double(), x, rtol=2e-6, atol=2e-6)  # c_noise is float32


@pytest.mark.parametrize(
    ("sampler", "scheduler", "options"),
    [
        ("ddim", "EDMEulerScheduler", {}),
        ("dpm++", "EDMDPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}),
    ],
)
def test_samplers_walk_as_those_of_diffusers(sampler, scheduler, options):
    theirs = getattr(diffusers, scheduler)(sigma_data=0.7, sigma_max=80.0, **options)
    theirs.set_timesteps(T)
    _, x_T = drawn()
    # Diffusers begins with the noise alone; the paper's chain is its multiple.
    x = x_T * (1 + 80.0**2) ** 0.5
    for t in theirs.timesteps:
        f = network(theirs.scale_model_input(x, t), t.expand(4))
        x = theirs.step(f, t, x).prev_sample
    got = iddpm_ext.sample(network, None, sampler=sampler, x_T=x_T, diffusion=process_of(),
                           clip=False, backend="reference", progress=False)  # fmt: skip
    # Their sigmas are float32; their solver extrapolates at any step and ours at most evenly.
    tolerance = 1e-4 if sampler == "ddim" else 2e-2
    torch.testing.assert_close(got.double(), x.double(), rtol=tolerance, atol=tolerance)


def test_a_preconditioned_denoiser_samples_as_its_network():
    options = {"diffusion": process_of(), "image_shape": (3, 5, 4), "n": 2, "progress": False}
    own = iddpm_ext.sample(network, 10, **options)
    wrapped = EDMDenoiser(lambda x, sigma: denoised(x, sigma.to(x.dtype)), sigma_data=0.7)
    torch.testing.assert_close(iddpm_ext.sample(wrapped, 10, **options), own, rtol=0, atol=2e-4)
    # sigma_data of the wrapper need not be the denoiser's.
    wrapped = EDMDenoiser(wrapped.denoiser, sigma_data=0.5)
    options["diffusion"] = process_of(sigma_data=0.5)
    torch.testing.assert_close(iddpm_ext.sample(wrapped, 10, **options), own, rtol=0, atol=2e-4)
    with pytest.raises(ValueError, match="sigma_data must be above 0"):
        EDMDenoiser(network, 0.0)


def test_noise_levels_of_training_are_log_normal():
    diffusion = process_of(1000)
    sampler = LogNormalTimestepSampler(diffusion.alphas_cumprod)
    log_sigma = levels(1000).log()
    p = sampler.probabilities()
    assert abs(float(p.sum()) - 1) < 1e-12
    mean = float((p * log_sigma).sum())
    assert abs(mean + 1.2) < 1e-3
    assert abs(float((p * (log_sigma - mean) ** 2).sum().sqrt()) - 1.2) < 2e-3
    t, weights = sampler.sample(torch.arange(20_000))
    assert bool((weights == 1).all())
    assert abs(float(log_sigma[t].mean()) + 1.2) < 0.04
    pure = Diffusion("cosine", 20, prediction="x_0", zero_terminal_snr=True).alphas_cumprod
    with pytest.raises(ValueError, match="alphas_cumprod must be above 0"):
        LogNormalTimestepSampler(pure)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run in one go and the same one stopped half way."""
    folder = tmp_path_factory.mktemp("runs")
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8)
    np.savez(folder / "d.npz", images)
    config = TrainConfig(
        data=str(folder / "d.npz"), out=str(folder / "a"), steps=4, batch_size=4, ema=(0.9,),
        model_channels=32, num_res_blocks=1, channel_mult=(1,), attention_resolutions=(), lr=1e-2,
        diffusion_steps=T, schedule="karras", prediction="edm", timestep_sampler="log-normal",
        sample_every=4, sample_steps=4, sample_count=2, progress=False, device="cpu",
    )  # fmt: skip
    whole = train(config)
    again = replace(config, out=str(folder / "b"))
    train(replace(again, steps=2))
    return config, whole, train(again)


def test_training_resumes_bit_for_bit(runs):
    config, whole, resumed = runs
    for file in ("model.safetensors", "ema_0.9.safetensors", "optim.safetensors"):
        ours, theirs = read_tensors(whole, file), read_tensors(resumed, file)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ValueError, match=r"sigma_data=1.0 \(was 0.5\)"):
        train(replace(config, sigma_data=1.0))
    for changes, says in (
        ({"zero_terminal_snr": True}, "prediction must be .* with zero_terminal_snr, got 'edm'"),
        ({"sigma_data": 0.0}, "sigma_data must be above 0"),
        ({"zero_terminal_snr": True, "prediction": "x_0"}, "timestep_sampler must be uniform or"),
    ):
        with pytest.raises(ValueError, match=says):
            replace(config, **changes)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "unipc"])
def test_engine_and_plain_formulation_draw_the_same_from_a_trained_network(runs, sampler):
    model = iddpm_ext.load(runs[1])
    assert model.diffusion == Diffusion("karras", T, prediction="edm")
    options = {"n": 2, "sampler": sampler, "progress": False}
    plain = iddpm_ext.sample(model, 10, engine=False, backend="reference", **options)
    torch.testing.assert_close(iddpm_ext.sample(model, 10, **options), plain, rtol=0, atol=2e-4)


def test_bound_is_that_of_the_same_network_told_as_an_x_0_network(runs):
    model = iddpm_ext.load(runs[1])
    x = torch.arange(64.0, 192.0).view(2, 1, 8, 8) / 127.5 - 1
    found = iddpm_ext.nll(model, x, progress=False)
    chain = model.diffusion

    def of_x_0(x_t, step, **_):
        t = step.long()
        out = model(chain.model_input(x_t, t), chain.model_timesteps(t))
        x_0 = chain.p_mean_variance(out, x_t, t, clip=False).x_0
        return torch.cat([x_0, out[:, 1:]], 1)

    other = Diffusion("karras", T, prediction="x_0", rescale_timesteps=False)
    plain = iddpm_ext.nll(of_x_0, x, diffusion=other, progress=False)
    torch.testing.assert_close(found.per_image_bpd, plain.per_image_bpd, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"method must be 'bound' or 'full' .* edm"):
        iddpm_ext.nll(model, x, method="ode", progress=False)


def test_a_trained_network_walks_any_noise_levels(runs):
    model = iddpm_ext.load(runs[1])
    eighteen = Diffusion("karras", 18, prediction="edm")
    options = {"n": 2, "sampler": "ddim", "seed": 4, "progress": False}
    ours = iddpm_ext.sample(model, None, diffusion=eighteen, **options)
    both = Diffusion("karras", 18, prediction="edm", variance="fixed_small")
    free = iddpm_ext.sample(lambda x, t: model(x, t)[:, :1], None, diffusion=both,
                            image_shape=(1, 8, 8), **options)  # fmt: skip
    torch.testing.assert_close(ours, free, rtol=0, atol=1e-4)
    for other in (process_of(18, variance="learned_range"), Diffusion("karras", 18)):
        with pytest.raises(ValueError, match="diffusion must be the model's own"):
            iddpm_ext.sample(model, None, diffusion=other, **options)
    model.extra = {**(model.extra or {}), "step_schedules": {"4": [0, 10, 20, 39]}}
    iddpm_ext.sample(model, "optimal-4", **options)
    with pytest.raises(ValueError, match=r"diffusion must be .* for steps 'optimal-4'"):
        iddpm_ext.sample(model, "optimal-4", diffusion=eighteen, **options)


def test_schedulers_of_diffusers_are_read_and_none_is_written():
    config = diffusers.EDMEulerScheduler(sigma_data=0.6, num_train_timesteps=50).config
    found = diffusion_of(config)
    assert (found.prediction, found.sigma_data, found.num_timesteps) == ("edm", 0.6, 50)
    told = found.model_timesteps(torch.arange(50)).double()
    torch.testing.assert_close(told[[0, -1]].mul(4).exp(), torch.tensor([0.002, 80.0]).double(),
                               rtol=1e-6, atol=0)  # fmt: skip
    with pytest.raises(ValueError, match="prediction_type must be epsilon"):
        diffusion_of({**config, "prediction_type": "v_prediction"})
    with pytest.raises(ValueError, match="sigma_schedule must be karras"):
        diffusion_of({**config, "sigma_schedule": "exponential"})
    with pytest.raises(ValueError, match="prediction must be one of a network that is given x_t"):
        config_of(process_of())


def test_a_guiding_classifier_must_be_told_the_same():
    config = UNetConfig(image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1,),
                        attention_resolutions=(), out_channels=3)  # fmt: skip
    model, classifier = UNet(config), UNet(config)
    model.diffusion, classifier.diffusion = process_of(), process_of(prediction="epsilon")
    with pytest.raises(ValueError, match="classifier must be one for the network's noise"):
        require_same_noise(classifier, model)
    classifier.diffusion = process_of()
    require_same_noise(classifier, model)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: karras_beta_schedule(1), "num_timesteps must be at least 2, got 1"),
        (lambda: karras_beta_schedule(5, sigma_min=0.0), "sigma_min must be above 0"),
        (lambda: karras_beta_schedule(5, sigma_max=math.inf), "below sigma_max"),
        (lambda: karras_beta_schedule(5, rho=0), "rho must be above 0"),
        (lambda: process_of(sigma_data=-1.0), "sigma_data must be above 0, got -1.0"),
        (lambda: process_of(zero_terminal_snr=True), "pure noise, got 'edm'"),
    ],
)
def test_errors_name_what_was_wrong(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_the_process_is_stored_and_read():
    diffusion = process_of()
    assert Diffusion.from_dict(diffusion.to_dict()) == diffusion
    assert Diffusion.from_dict(diffusion.to_dict()) != process_of(sigma_data=0.5)
    assert "sigma_data" not in Diffusion().to_dict()

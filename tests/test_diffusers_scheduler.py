"""IDDPMScheduler in the real pipelines of diffusers, against our own sampler."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.ddpm import pipeline_ddpm
from diffusers_networks import SMALL, InjectedNoise, noise_of, small_network
from normal_data import exact_eps

import iddpm_ext
from iddpm_ext import Diffusion, IDDPMPipeline, IDDPMScheduler, to_diffusers
from iddpm_ext.interop import pipeline as our_pipeline
from iddpm_ext.interop import scheduler as our_scheduler

diffusers.utils.logging.set_verbosity_error()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def inject(monkeypatch):
    def install(seed, chain, shape):
        noise = InjectedNoise(noise_of(seed, chain.timesteps, shape))
        for module in (our_scheduler, our_pipeline, pipeline_ddpm):
            monkeypatch.setattr(module, "randn_tensor", noise)
        return noise

    return install


@pytest.mark.parametrize(
    ("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.3), ("dpm++", 0.0)]
)
def test_the_chain_of_ddpm_pipeline_is_that_of_sample(inject, sampler, eta):
    model, diffusion = small_network(), Diffusion()
    pipe = quiet(
        diffusers.DDPMPipeline(
            to_diffusers(model), IDDPMScheduler.from_diffusion(diffusion, sampler=sampler, eta=eta)
        )
    )
    inject(7, diffusion.respace(50), (3, 3, 16, 16))
    theirs = pipe(batch_size=3, num_inference_steps=50, output_type="pt").images
    model.diffusion = diffusion
    ours = iddpm_ext.sample(
        model, 50, n=3, sampler=sampler, eta=eta, seed=7, engine=False, progress=False
    )
    assert (theirs - (ours / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5


def test_the_bundled_model_draws_the_same_garments_in_our_pipeline(inject):
    model = iddpm_ext.load("fashion-mnist")
    unet = to_diffusers(model)
    pipe = quiet(IDDPMPipeline(unet, IDDPMScheduler.from_diffusion(model.diffusion)))
    labels = [0, 7, 9]
    inject(3, model.diffusion.respace(10), (3, 1, 28, 28))
    theirs = pipe(
        class_labels=labels, num_inference_steps=10, guidance_scale=1.5, output_type="pt"
    ).images
    ours = iddpm_ext.sample(
        model, 10, labels=labels, guidance_scale=1.5, seed=3, engine=False, progress=False
    )
    assert (theirs - (ours / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5


def test_dpm_solver_is_that_of_diffusers_on_our_steps():
    diffusion = Diffusion(rescale_timesteps=False)
    chain = diffusion.respace(25)
    stock = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=4000, trained_betas=diffusion.betas.numpy(),
        variance_type="learned_range", final_sigmas_type="zero", lower_order_final=False,
    )  # fmt: skip
    stock.set_timesteps(timesteps=chain.timesteps.flip(0).tolist())
    # Its own are float32, from float32 products; here only the solver is compared.
    alpha_bar = chain.alphas_cumprod.flip(0)
    stock.sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), torch.zeros(1).double()])
    ours = IDDPMScheduler.from_diffusion(
        diffusion, sampler="dpm++", clip_sample=False, extrapolation_limit=None
    )
    ours.set_timesteps(25)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    a = b = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    for i, t in zip(reversed(range(25)), ours.timesteps, strict=True):
        # eps of images that are normal with deviation 0.5, and a variance head that must not count.
        outputs = [torch.cat([exact_eps(chain, x, i, 0.5), x], dim=1) for x in (a, b)]
        a = ours.step(outputs[0], t, a).prev_sample
        b = stock.step(outputs[1], t, b).prev_sample.double()
    assert (a - b).abs().max() < 1e-5


def test_the_solver_starts_anew_after_a_jump():
    x, out = torch.randn(2, 3, 4, 4), torch.randn(2, 6, 4, 4)
    first, second = IDDPMScheduler(sampler="dpm++"), IDDPMScheduler(sampler="dpm++")
    for scheduler in (first, second):
        scheduler.set_timesteps(10)
    first.step(out, first.timesteps[2], x)
    t = second.timesteps[5]
    assert torch.equal(first.step(out, t, x).prev_sample, second.step(out, t, x).prev_sample)


def test_saved_pipelines_are_read_back_in_a_process_of_their_own(tmp_path):
    """By diffusers alone with the folder's pipeline.py, and by name after `import iddpm_ext`."""
    pipe = diffusers.DDPMPipeline(
        to_diffusers(small_network()), IDDPMScheduler(sampler="ddim", eta=0.5)
    )
    pipe.save_pretrained(tmp_path / "stock")
    config = small_network().config
    conditional = small_network(type(config)(**{**config.to_dict(), "num_classes": 4}))
    IDDPMPipeline(to_diffusers(conditional), IDDPMScheduler()).save_pretrained(tmp_path / "ours")
    code = (
        "import diffusers, sys\n"
        f"c = diffusers.DiffusionPipeline.from_pretrained({str(tmp_path / 'ours')!r}, "
        "custom_pipeline='pipeline', trust_remote_code=True)\n"
        "print(type(c).__name__, type(c.unet).__name__)\n"
        "import iddpm_ext\n"
        f"a = diffusers.DDPMPipeline.from_pretrained({str(tmp_path / 'stock')!r})\n"
        "print(type(a.scheduler).__name__, a.scheduler.config.sampler, a.scheduler.config.eta)\n"
        f"b = iddpm_ext.IDDPMPipeline.from_pretrained({str(tmp_path / 'ours')!r})\n"
        "print(type(b.unet).__name__, b.scheduler.diffusion, b.unet.config.num_class_embeds)\n"
        "print(sum(float(p.double().sum()) for p in b.unet.parameters()))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert lines[:3] == [
        "IDDPMPipeline IDDPMUNet2DModel",
        "IDDPMScheduler ddim 0.5",
        "IDDPMUNet2DModel Diffusion(cosine, 4000 steps, learned_range, epsilon) 4",
    ], result.stderr[-2000:]
    total = sum(float(p.double().sum()) for p in conditional.parameters())
    assert float(lines[3]) == pytest.approx(total, rel=1e-9)


def test_the_default_is_the_papers_process_and_steps():
    scheduler = IDDPMScheduler()
    process = Diffusion("cosine", 4000, "learned_range", rescale_timesteps=False)
    assert scheduler.diffusion == process
    scheduler.set_timesteps(50)
    assert torch.equal(scheduler.timesteps, process.respace(50).timesteps.flip(0))
    rescaled = IDDPMScheduler.from_diffusion(Diffusion())
    rescaled.set_timesteps(50)
    assert rescaled.timesteps[0] == 999.75 and rescaled.timesteps[-1] == 0
    told = Diffusion().respace(50).model_timesteps(torch.arange(50))
    assert torch.equal(rescaled.timesteps, told.flip(0))
    assert len(scheduler) == 4000 and scheduler.init_noise_sigma == 1.0 and scheduler.order == 1


def test_the_last_step_is_x_0_without_noise():
    scheduler = IDDPMScheduler()
    scheduler.set_timesteps(timesteps=[3999, 1000, 40])
    x = torch.randn(2, 3, 4, 4)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    step = scheduler.step(torch.randn(2, 6, 4, 4), 40, x, generator=generator)
    assert torch.equal(step.prev_sample, step.pred_original_sample)
    assert torch.equal(generator.get_state(), before)


def test_generators_reproduce_a_step_and_lists_give_one_to_each_image():
    scheduler = IDDPMScheduler()
    scheduler.set_timesteps(10)
    x, out = torch.randn(2, 3, 4, 4), torch.randn(2, 6, 4, 4)
    t = scheduler.timesteps[2]
    seeded = [torch.Generator().manual_seed(s) for s in (1, 2)]
    both = scheduler.step(out, t, x, generator=seeded).prev_sample
    again = scheduler.step(
        out[1:], t, x[1:], generator=[torch.Generator().manual_seed(2)]
    ).prev_sample
    assert torch.equal(both[1:], again)
    assert not torch.equal(both, scheduler.step(out, t, x).prev_sample)


def test_half_precision_images_are_computed_in_float32():
    scheduler = IDDPMScheduler(sampler="ddim")
    scheduler.set_timesteps(10)
    x, out = torch.randn(2, 3, 4, 4).half(), torch.randn(2, 6, 4, 4).half()
    t = scheduler.timesteps[3]
    half = scheduler.step(out, t, x).prev_sample
    assert half.dtype == torch.float16
    assert torch.equal(half, scheduler.step(out, t, x.float()).prev_sample.half())


@pytest.mark.parametrize(
    "stock",
    [
        diffusers.DDPMScheduler(),
        diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range"),
        diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.001, beta_end=0.01),
        diffusers.DDPMScheduler(200, variance_type="fixed_large", prediction_type="sample"),
        diffusers.DDPMScheduler(50, trained_betas=torch.linspace(0.001, 0.1, 50).tolist()),
    ],
)
def test_a_stock_schedulers_configuration_gives_its_process(stock):
    ours = IDDPMScheduler.from_config(stock.config)
    ours.set_timesteps(len(stock))
    expected = stock.alphas_cumprod.double()
    assert torch.allclose(ours.diffusion.alphas_cumprod, expected, rtol=2e-3, atol=1e-7)
    assert ours.timesteps.tolist() == list(range(len(stock)))[::-1]
    assert ours.diffusion.variance == stock.config.variance_type
    back = diffusers.DDPMScheduler.from_config(ours.config)
    assert torch.allclose(back.alphas_cumprod, stock.alphas_cumprod, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_process_survives_the_scheduler(schedule, tmp_path):
    for diffusion in (
        Diffusion(schedule, 1000, "fixed_small", rescale_timesteps=False),
        Diffusion(betas=[0.1, 0.2, 0.4], variance="learned", prediction="x_0"),
    ):
        IDDPMScheduler.from_diffusion(diffusion).save_pretrained(tmp_path)
        assert IDDPMScheduler.from_pretrained(tmp_path).diffusion == diffusion


def test_add_noise_takes_indices_and_told_timesteps_and_keeps_its_digits_in_bfloat16():
    scheduler = IDDPMScheduler.from_diffusion(Diffusion())
    x, noise = torch.randn(4, 3, 4, 4), torch.randn(4, 3, 4, 4)
    t = torch.tensor([0, 19, 2000, 3999])
    exact = Diffusion().q_sample(x, t, noise)
    assert torch.equal(scheduler.add_noise(x, noise, t), exact)
    assert torch.equal(scheduler.add_noise(x, noise, scheduler.model_timesteps(t)), exact)
    half = scheduler.add_noise(torch.zeros_like(x).bfloat16(), noise.bfloat16(), t)
    # The stock scheduler rounds alpha_bar first, and adds exactly nothing at t = 0.
    stock = diffusers.DDPMScheduler(4000, beta_schedule="squaredcos_cap_v2")
    assert stock.add_noise(torch.zeros_like(x).bfloat16(), noise.bfloat16(), t)[0].abs().max() == 0
    wanted = noise[0] * float((1 - Diffusion().alphas_cumprod[0]).sqrt())
    assert torch.allclose(half[0].float(), wanted, rtol=1e-2)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: IDDPMScheduler(sampler="heun"), "sampler must be one of"),
        (lambda: IDDPMScheduler(eta=0.5), "eta must be from 0 to 1"),
        (lambda: IDDPMScheduler(sampler="ddim", eta=1.5), "eta must be from 0 to 1"),
        (lambda: IDDPMScheduler(beta_schedule="exponential"), "beta_schedule must be one of"),
        (lambda: IDDPMScheduler(variance_type="fixed_large_log"), "variance_type must be one of"),
        (lambda: IDDPMScheduler(prediction_type="flow"), "prediction_type must be one of"),
        (lambda: IDDPMScheduler().set_timesteps(), "exactly one of num_inference_steps"),
        (lambda: IDDPMScheduler().set_timesteps(5000), "section 1 of 1 has 4000 steps"),
        (lambda: IDDPMScheduler().set_timesteps(timesteps=[1, 2]), "must be descending"),
        (lambda: IDDPMScheduler.from_diffusion(Diffusion().respace(50)), "whole training process"),
        (
            lambda: IDDPMScheduler.from_config(
                diffusers.DDPMScheduler(variance_type="learned").config
            ),
            "variance_type must not be 'learned'",
        ),
        (
            lambda: IDDPMScheduler().step(torch.zeros(1, 6, 4, 4), -7, torch.zeros(1, 3, 4, 4)),
            "timestep must be one of",
        ),
    ],
)
def test_bad_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_training_code_and_the_pipeline_tell_a_network_the_same_timesteps():
    """At any T: a loop of diffusers gives the index both to `add_noise` and to the network."""
    told: list[int] = []

    class Network(torch.nn.Module):
        def forward(self, sample, timestep):
            told.append(timestep.item())
            return sample.repeat(1, 2, 1, 1)

    scheduler = IDDPMScheduler()
    scheduler.set_timesteps(10)
    x = torch.randn(2, 3, 4, 4)
    for t in scheduler.timesteps:
        x = scheduler.step(Network()(x, t), t, x).prev_sample
    assert told[0] == 3999 and all(isinstance(t, int) for t in told)
    noise = torch.randn_like(x)
    t = torch.tensor([told[3], told[7]])
    assert torch.equal(scheduler.add_noise(x, noise, t), scheduler.diffusion.q_sample(x, t, noise))


def test_training_code_reads_the_tables():
    from diffusers.training_utils import compute_snr

    for diffusion in (Diffusion(), Diffusion("linear", 1000), Diffusion(betas=[0.1, 0.2, 0.4])):
        scheduler, stock = IDDPMScheduler.from_diffusion(diffusion), diffusion.alphas_cumprod
        assert scheduler.betas.dtype == scheduler.alphas_cumprod.dtype == torch.float32
        assert torch.allclose(scheduler.betas.double(), diffusion.betas, rtol=1e-7, atol=0)
        assert torch.allclose(scheduler.alphas.double(), 1 - diffusion.betas, rtol=1e-7, atol=0)
        t = torch.tensor([0, 1, 2])
        # Two roundings of float32 near 1, divided by what is left of it.
        error = 2.0**-23 / (1 - stock[t])
        snr = (stock / (1 - stock))[t]
        assert (
            (compute_snr(scheduler, t).double() - snr).abs() <= 2 * error * snr + 1e-6 * snr
        ).all()


@pytest.mark.parametrize("rescale", [False, True])
def test_the_previous_timestep_is_the_next_of_the_chain_and_minus_one_at_its_end(rescale):
    scheduler = IDDPMScheduler(rescale_timesteps=rescale)
    for call in ({"timesteps": [100, 87, 50, 1, 0]}, {"num_inference_steps": 7}):
        scheduler.set_timesteps(**call)
        found = [scheduler.previous_timestep(t).item() for t in scheduler.timesteps]
        assert found == [*scheduler.timesteps[1:].tolist(), -1]
    with pytest.raises(ValueError, match="timestep must be one of"):
        scheduler.previous_timestep(86)


def test_timesteps_beyond_the_process_or_given_twice_are_refused():
    scheduler = IDDPMScheduler(1000)
    for call in (
        {"timesteps": [1000]},
        {"timesteps": [5, 6, 0]},
        {"timesteps": [5], "num_inference_steps": 1},
    ):
        with pytest.raises(ValueError):
            scheduler.set_timesteps(**call)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_train_timesteps": 100},
        {"num_train_timesteps": 100, "beta_schedule": "linear", "variance_type": "fixed_small"},
        {"num_train_timesteps": 1000, "rescale_timesteps": True},
    ],
)
def test_compatibles_walk_the_chain_of_our_configuration(config):
    scheduler = IDDPMScheduler(**config)
    names = {cls.__name__ for cls in scheduler.compatibles}
    assert "DDPMScheduler" in names and len(names) == 3
    out = 2 if scheduler.config.variance_type == "learned_range" else 1
    for cls in scheduler.compatibles:
        other = cls.from_config(scheduler.config)
        other.set_timesteps(10)
        x = torch.randn(1, 3, 4, 4)
        stepped = other.step(x.repeat(1, out, 1, 1), other.timesteps[0], x).prev_sample
        assert stepped.shape == x.shape and bool(stepped.isfinite().all())
        assert torch.allclose(other.alphas_cumprod, scheduler.alphas_cumprod, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [{"rescale_timesteps": True}, {"variance_type": "learned"}, {"prediction_type": "x_prev"}],
)
def test_nothing_is_compatible_that_would_misread_the_configuration(config):
    assert IDDPMScheduler(**config).compatibles == []


def test_betas_of_ones_own_survive_the_folder(tmp_path):
    scheduler = IDDPMScheduler(trained_betas=np.array([0.1, 0.3]), num_train_timesteps=2)
    scheduler.save_pretrained(tmp_path)
    again = IDDPMScheduler.from_pretrained(tmp_path)
    assert again.betas.tolist() == scheduler.betas.tolist() == pytest.approx([0.1, 0.3])


def test_diffusers_opens_a_conditional_pipeline_by_itself(tmp_path):
    """As its stock pipeline, and with the file in the folder as ours, which takes labels."""
    unet = to_diffusers(small_network(replace(SMALL, num_classes=3)))
    IDDPMPipeline(unet, IDDPMScheduler()).save_pretrained(tmp_path)
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is diffusers.DDPMPipeline
    assert type(stock.unet).__name__ == "IDDPMUNet2DModel"
    custom = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline="pipeline", trust_remote_code=True
    )
    assert type(custom) is type(IDDPMPipeline.from_pretrained(tmp_path)) is IDDPMPipeline
    images = quiet(custom)(class_labels=[0, 2], num_inference_steps=2, output_type="np").images
    assert len(images) == 2

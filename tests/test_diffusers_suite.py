"""What diffusers asks of each of its schedulers, asked of `IDDPMScheduler`, by the stock ones as the measure.

The claims are those of its own suites for DDPM and DDIM (SchedulerCommonTest and the two beside it). What is
refused here on purpose, or is another function's, is in `test_what_is_refused_on_purpose`, by name.
"""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from iddpm_ext import IDDPMScheduler

DDPM = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
        "variance_type": "fixed_small", "clip_sample": True}  # fmt: skip
DDIM = {**DDPM, "sampler": "ddim"}
BOTH = pytest.mark.parametrize("config", [DDPM, DDIM], ids=["ddpm", "ddim"])
SHAPE = (4, 3, 8, 8)


def make(config: dict[str, Any], **more: Any) -> IDDPMScheduler:
    return IDDPMScheduler(**{**config, **more})


def stock(config: dict[str, Any], **more: Any) -> Any:
    kind = diffusers.DDIMScheduler if "sampler" in config else diffusers.DDPMScheduler
    own = {**config, **more}
    for ours in ("sampler", *(["variance_type"] if kind is diffusers.DDIMScheduler else [])):
        own.pop(ours, None)
    return kind(**own)


def image(seed: int) -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))


def ramp() -> Tensor:
    return torch.linspace(0, 1, 768).reshape(SHAPE)


def network(x: Tensor, t: Tensor | int) -> Tensor:
    value = float(t)
    return x * value / (value + 1)


def one_step(scheduler: Any, t: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    # Where x_0 was clipped, DDIM's direction follows from what is left, as in the paper's code.
    clipped = (
        {"use_clipped_model_output": True} if type(scheduler) is diffusers.DDIMScheduler else {}
    )
    return scheduler.step(0.1 * image(1), t, image(2), generator=generator, **clipped).prev_sample


def chain(scheduler: Any, timesteps: Any, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    for t in timesteps:
        x = scheduler.step(network(x, t), t, x, generator=generator).prev_sample
    return x


@BOTH
@pytest.mark.parametrize(
    "change",
    [
        {}, {"num_train_timesteps": 5}, {"num_train_timesteps": 100}, {"beta_start": 0.001, "beta_end": 0.02},
        {"beta_start": 0.01, "beta_end": 0.2}, {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear"}, {"variance_type": "fixed_large"}, {"clip_sample": False},
        {"prediction_type": "sample"}, {"prediction_type": "v_prediction"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
    ids=str,
)  # fmt: skip
def test_a_scheduler_that_is_read_back_steps_as_the_one_that_was_saved(config, change, tmp_path):
    scheduler = make(config, **change)
    scheduler.save_pretrained(tmp_path)
    again = IDDPMScheduler.from_pretrained(tmp_path)
    for t in (0, len(scheduler) // 2, len(scheduler) - 1):
        assert torch.equal(one_step(scheduler, t), one_step(again, t))
    # What is marked as a default is of the one in memory alone.
    kept = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
    assert kept == dict(again.config)


@BOTH
@pytest.mark.parametrize(
    "change", [{}, {"variance_type": "fixed_large"}, {"clip_sample": False},
               {"prediction_type": "sample"}, {"prediction_type": "v_prediction"},
               {"beta_schedule": "scaled_linear"}],
    ids=str,
)  # fmt: skip
def test_a_step_is_the_stock_schedulers(config, change):
    """To the rounding of its float32 tables, which are products of a thousand factors."""
    ours, theirs = make(config, **change), stock(config, **change)
    ours.set_timesteps(timesteps=list(range(999, -1, -1)))
    theirs.set_timesteps(1000)
    for t in (0, 1, 500, 998):
        # At the last step of all the stock DDPM's beta_t, 1 - a quotient of products, has lost digits.
        torch.testing.assert_close(one_step(ours, t), one_step(theirs, t), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_whole_ddpm_chain_is_the_stock_one(prediction):
    """The same noise of one generator in the same order, 1000 steps."""
    ours = make(DDPM, prediction_type=prediction)
    theirs = stock(DDPM, prediction_type=prediction)
    x = chain(ours, range(999, -1, -1), ramp())
    reference = chain(theirs, range(999, -1, -1), ramp())
    assert (x - reference).abs().mean() < 1e-3 * reference.abs().mean()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_ddim_chain_on_the_stock_steps_is_the_stock_one(prediction):
    ours = make(DDIM, prediction_type=prediction)
    theirs = stock(DDIM, prediction_type=prediction)
    theirs.set_timesteps(10)
    ours.set_timesteps(timesteps=theirs.timesteps.tolist())
    x, reference = (chain(s, theirs.timesteps, ramp()) for s in (ours, theirs))
    assert (x - reference).abs().mean() < 1e-3 * reference.abs().mean()


@BOTH
def test_a_chain_that_begins_at_a_noised_image_is_the_stock_one(config):
    ours, theirs = make(config), stock(config)
    theirs.set_timesteps(10)
    ours.set_timesteps(timesteps=theirs.timesteps.tolist())
    last = theirs.timesteps[8:]
    noise = ramp().flip(-1)
    x, reference = (chain(s, last, s.add_noise(ramp(), noise, last[:1])) for s in (ours, theirs))
    assert (x - reference).abs().mean() < 1e-3 * reference.abs().mean()


@BOTH
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_eta_is_an_argument_of_a_step(config, eta):
    scheduler = make(config)
    scheduler.set_timesteps(50)
    if "sampler" not in config and eta:
        with pytest.raises(ValueError, match="eta must be"):
            scheduler.step(image(1), scheduler.timesteps[3], image(2), eta=eta)
        return
    given = scheduler.step(
        image(1), scheduler.timesteps[3], image(2), eta=eta,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert given.prev_sample.shape == SHAPE


@BOTH
def test_steps_keep_the_shape_and_tuples_are_what_the_output_has(config):
    scheduler = make(config)
    scheduler.set_timesteps(50)
    for t in scheduler.timesteps[:2]:
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        whole = scheduler.step(0.1 * image(1), t, image(2), generator=generators[0])
        pair = scheduler.step(
            0.1 * image(1), t, image(2), generator=generators[1], return_dict=False
        )
        assert whole.prev_sample.shape == SHAPE
        assert all(torch.equal(a, b) for a, b in zip(pair, whole.values(), strict=True))


@BOTH
def test_the_interface_is_that_of_every_scheduler(config):
    scheduler = make(config)
    assert scheduler.init_noise_sigma == 1 and scheduler.order == 1
    assert torch.equal(scheduler.scale_model_input(image(1), 0.0), image(1))
    scheduler.set_timesteps(50)
    noised = scheduler.add_noise(image(1), torch.randn(SHAPE), scheduler.timesteps[5][None])
    assert noised.shape == SHAPE and noised.device == image(1).device
    accepts = inspect.signature(IDDPMScheduler.__init__).parameters
    assert "kwargs" not in accepts and not IDDPMScheduler._deprecated_kwargs


@BOTH
def test_trained_betas_go_before_the_schedule_and_survive_the_folder(config, tmp_path):
    scheduler = make(config, trained_betas=np.array([0.1, 0.3]))
    scheduler.save_pretrained(tmp_path)
    again = IDDPMScheduler.from_pretrained(tmp_path)
    assert scheduler.betas.tolist() == again.betas.tolist() == pytest.approx([0.1, 0.3])


@BOTH
def test_a_compatible_schedulers_configuration_leads_back(config):
    scheduler = make(config)
    assert scheduler.compatibles
    for kind in scheduler.compatibles:
        back = IDDPMScheduler.from_config(kind.from_config(scheduler.config).config)
        assert {k: v for k, v in back.config.items() if k in scheduler.config} == dict(
            scheduler.config
        )


@BOTH
def test_attributes_are_found_and_those_of_the_configuration_warn(config):
    scheduler = make(config)
    scheduler.of_mine = 5
    scheduler.register_to_config(of_the_configuration=5)
    assert scheduler.of_mine == 5
    with pytest.warns(FutureWarning):
        assert scheduler.of_the_configuration == 5
    with pytest.raises(AttributeError, match="'IDDPMScheduler' object has no attribute 'nothing'"):
        scheduler.nothing  # noqa: B018


def test_the_velocity_to_learn_is_the_stock_schedulers():
    config = {**DDPM, "prediction_type": "v_prediction"}
    t = torch.tensor([0, 10, 500, 999])
    ours, theirs = (s.get_velocity(image(1), image(2), t) for s in (make(config), stock(config)))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_timesteps_of_ones_own_are_followed_to_the_end():
    scheduler = make(DDPM)
    chosen = [100, 87, 50, 1, 0]
    scheduler.set_timesteps(timesteps=chosen)
    led = [int(scheduler.previous_timestep(t)) for t in scheduler.timesteps]
    assert scheduler.timesteps.tolist() == chosen and led == [*chosen[1:], -1]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        # Steps: an order that is none, too many words, one beyond the chain.
        (lambda: make(DDPM).set_timesteps(timesteps=[100, 87, 50, 51, 0]), "descending"),
        (lambda: make(DDPM).set_timesteps(5, timesteps=[4, 3, 2, 1, 0]), "exactly one of"),
        (lambda: make(DDPM).set_timesteps(timesteps=[1000]), "1000"),
        # DDIM's suite steps from timesteps that are not of the chain: what comes before them is not known.
        (lambda: _at_a_step_outside(), "one of `timesteps`"),
        # test_timesteps, T = 1: no chain.
        (lambda: make(DDPM, num_train_timesteps=1), "at least 2"),
        # test_betas, up to 2: a variance above 1 is none.
        (lambda: make(DDPM, beta_start=0.1, beta_end=2.0), "below 1"),
        # test_variance_type, "other": stock DDPM takes any word and does something.
        (lambda: make(DDPM, variance_type="other"), "variance_type must be one of"),
        # test_rescale_betas_zero_snr: epsilon says nothing of x_0 where alpha_bar is 0.
        (lambda: make(DDPM, rescale_betas_zero_snr=True), "pure noise"),
        # test_thresholding: x_0 is clipped to [-1, 1] or not at all.
        (lambda: make(DDPM, thresholding=True), "thresholding"),
        (lambda: IDDPMScheduler.from_config(stock(DDPM, thresholding=True).config), "thresholding"),
        (lambda: IDDPMScheduler.from_config(stock(DDPM, clip_sample_range=2.0).config), "range must"),
        # test_steps_offset, test_timestep_spacing, test_full_loop_with_(no_)set_alpha_to_one: the paper's
        # steps, or timesteps=[...]; the last step leads to x_0.
        (lambda: make(DDIM, steps_offset=1), "steps_offset"),
        (lambda: make(DDIM, timestep_spacing="trailing"), "timestep_spacing"),
        (lambda: make(DDIM, set_alpha_to_one=False), "set_alpha_to_one"),
    ],
)  # fmt: skip
def test_what_is_refused_on_purpose(call, reason):
    with pytest.raises((ValueError, TypeError), match=reason):
        call()


def _at_a_step_outside() -> None:
    scheduler = make(DDIM)
    scheduler.set_timesteps(50)
    scheduler.step(image(1), 1, image(2))


def test_the_private_variance_of_the_suites_is_the_posteriors():
    """`_get_variance`, which is diffusers' own, in our words."""
    process, theirs = make(DDPM).diffusion, stock(DDPM)
    x = image(1)[:1]
    for t in (487, 999):
        at_t = process.p_mean_variance(torch.zeros_like(x), x, torch.tensor([t]))
        variance = float(at_t.log_variance.exp().mean())
        assert variance == pytest.approx(float(theirs._get_variance(t)), rel=2e-3)

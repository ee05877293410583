"""Networks of diffusers given to `sample` and to `training_losses` as they are."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers_networks import SMALL, filled, small_network

import iddpm_ext
from iddpm_ext import Diffusion, IDDPMPipeline, IDDPMScheduler, UNetConfig, to_diffusers
from iddpm_ext.random import STREAM_FORWARD, NoiseKey

QUICK = {"n": 3, "seed": 5, "progress": False}


def test_a_unet2d_model_samples_like_the_network_it_came_from():
    model, diffusion = small_network(), Diffusion()
    model.diffusion = diffusion
    ours = iddpm_ext.sample(model, 10, engine=False, **QUICK)
    unet = to_diffusers(model).train()
    theirs = iddpm_ext.sample(unet, 10, diffusion=diffusion, engine=False, **QUICK)
    assert (ours - theirs).abs().max() < 1e-5
    assert unet.training, "a network in training mode comes back in it"


def test_labels_and_guidance_reach_a_unet2d_model():
    model = small_network(UNetConfig.from_dict({**SMALL.to_dict(), "num_classes": 4}))
    model.diffusion = Diffusion()
    wanted = {"labels": [0, 3, 1], "guidance_scale": 2.0, "engine": False, **QUICK}
    ours = iddpm_ext.sample(model, 10, **wanted)
    theirs = iddpm_ext.sample(to_diffusers(model), 10, diffusion=Diffusion(), **wanted)
    assert (ours - theirs).abs().max() < 2e-5


def test_a_pipeline_brings_its_process_and_another_process_goes_before_it():
    model = small_network()
    linear = Diffusion("linear", 1000, rescale_timesteps=False)
    pipe = diffusers.DDPMPipeline(to_diffusers(model), IDDPMScheduler.from_diffusion(linear))
    own = iddpm_ext.sample(pipe, 10, **QUICK)
    assert torch.equal(own, iddpm_ext.sample(pipe.unet, 10, diffusion=linear, **QUICK))
    other = iddpm_ext.sample(pipe, 10, diffusion=Diffusion(), **QUICK)
    assert not torch.equal(own, other)


def test_a_stock_pipeline_of_fixed_variance_samples_by_its_own_schedule():
    unet = filled(
        to_diffusers(small_network(UNetConfig.from_dict({**SMALL.to_dict(), "out_channels": 3})))
    )
    scheduler = diffusers.DDPMScheduler(1000, variance_type="fixed_large")
    pipe = diffusers.DDPMPipeline(unet, scheduler)
    x = iddpm_ext.sample(pipe, 10, **QUICK)
    assert x.shape == (3, 3, 16, 16) and x.abs().max() <= 1
    process = Diffusion("linear", 1000, "fixed_large", rescale_timesteps=False)
    assert torch.equal(x, iddpm_ext.sample(unet, 10, diffusion=process, **QUICK))


def test_learned_variance_of_a_unet2d_model_trains_in_one_line():
    model, diffusion = small_network(), Diffusion()
    unet = to_diffusers(model)
    x_0 = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    t = torch.tensor([0, 40, 2000, 3999])
    noise = NoiseKey(0, STREAM_FORWARD, torch.arange(4), 0)
    for network in (model, unet):
        diffusion.training_losses(network, x_0, t, noise)["loss"].mean().backward()
    for ours, theirs in (
        (model.input_blocks[0][0].weight, unet.conv_in.weight),
        (model.out[2].weight, unet.conv_out.weight),
        (model.middle_block[0].out_layers[0].weight, unet.mid_block.resnets[0].norm2.weight),
    ):
        scale = ours.grad.abs().max()
        assert scale > 0
        assert (ours.grad - theirs.grad).abs().max() < 1e-5 * scale
    # The half of the last layer that only the bound trains.
    assert unet.conv_out.weight.grad[3:].abs().max() > 0


def test_labels_go_to_training_by_the_networks_own_name():
    model = small_network(UNetConfig.from_dict({**SMALL.to_dict(), "num_classes": 4}))
    unet, diffusion = to_diffusers(model), Diffusion()
    x_0, t, y = torch.zeros(2, 3, 16, 16), torch.tensor([5, 3000]), torch.tensor([2, -1])
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ours = diffusion.training_losses(model, x_0, t, noise, model_kwargs={"y": y})
    theirs = diffusion.training_losses(unet, x_0, t, noise, model_kwargs={"class_labels": y})
    assert torch.allclose(ours["loss"], theirs["loss"], rtol=1e-5)


def test_what_is_missing_is_named():
    unet = to_diffusers(small_network())
    with pytest.raises(ValueError, match="diffusion must be given"):
        iddpm_ext.sample(unet, 10)
    with pytest.raises(TypeError, match=r"return a tensor or an output with \.sample, got dict"):
        Diffusion().training_losses(
            lambda x, t: {}, torch.zeros(1, 3, 4, 4), torch.tensor([1]), torch.zeros(1, 3, 4, 4)
        )


def test_a_super_resolution_pipeline_takes_the_small_images():
    model = small_network(UNetConfig.from_dict({**SMALL.to_dict(), "super_resolution": True}))
    pipe = IDDPMPipeline(to_diffusers(model), IDDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    low_res = torch.rand(2, 3, 4, 4) * 2 - 1
    images = pipe(low_res=low_res, num_inference_steps=4, output_type="pt").images
    assert images.shape == (2, 3, 16, 16)
    x = iddpm_ext.sample(pipe, 4, low_res=low_res, progress=False)
    assert x.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("through", ["parameters", "data"])
def test_the_engine_runs_a_unet2d_model_and_sees_that_its_weights_changed(through):
    unet = to_diffusers(small_network())
    wanted = {"diffusion": Diffusion(), "sampler": "ddim", **QUICK}
    for _ in range(2):
        plain = iddpm_ext.sample(unet, 5, engine=False, **wanted)
        fast = iddpm_ext.sample(unet, 5, **wanted)
        assert not torch.equal(plain, fast), "the engine rounds differently"
        assert (plain - fast).abs().max() < 1e-3
        for layer, factor in ((unet.mid_block.attentions[0].to_q, -1), (unet.conv_out, 1.5)):
            weight = layer.weight.data if through == "data" else layer.weight
            with torch.no_grad():
                weight.mul_(factor)


def test_a_network_that_someone_changed_is_run_as_it_is():
    unet = to_diffusers(small_network())
    wanted = {"diffusion": Diffusion(), **QUICK}
    seen = []
    handle = unet.mid_block.register_forward_hook(lambda *_: seen.append(1))
    iddpm_ext.sample(unet, 3, **wanted)
    assert len(seen) == 3
    handle.remove()
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    iddpm_ext.sample(unet, 3, **wanted)
    everywhere.remove()
    assert len(seen) > 6
    seen[3:] = []
    with iddpm_ext.accelerate(unet):
        iddpm_ext.sample(unet, 3, **wanted)
    assert set(unet.state_dict()) == set(to_diffusers(small_network()).state_dict())
    assert len(seen) == 3

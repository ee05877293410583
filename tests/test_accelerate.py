"""`accelerate`: the same function to rounding, in inference and training, and back again."""

from __future__ import annotations

import copy
import pickle

import diffusers
import pytest
import torch
from diffusers_networks import SMALL, filled, small_network
from torch import nn

import iddpm_ext
from iddpm_ext import UNetConfig, to_diffusers

diffusers.utils.logging.set_verbosity_error()


def variant(**changes) -> UNetConfig:
    return UNetConfig.from_dict({**SMALL.to_dict(), **changes})


CONFIGS = {
    "scale-shift": SMALL,
    "added embedding": variant(use_scale_shift_norm=False),
    "residual resampling": variant(resblock_updown=True),
    "labels and two widths": variant(num_classes=3, channel_mult=(1, 2, 3), image_size=16),
}


def network(name: str) -> nn.Module:
    return to_diffusers(small_network(CONFIGS[name]))


def inputs(unet) -> tuple:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 3, 16, 16, generator=generator)
    labels = None if unet.config.num_class_embeds is None else torch.tensor([0, 2, -1])
    return x, torch.tensor([0.0, 31.5, 999.75]), labels


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * a.abs().max())


def gradients(unet) -> list[torch.Tensor]:
    output = unet(*inputs(unet)).sample
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return list(torch.autograd.grad((output * weights).sum(), list(unet.parameters())))


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_equal_to_rounding_and_undo_gives_the_same_bits(name):
    unet = network(name)
    with torch.no_grad():
        before = unet(*inputs(unet)).sample
        done = iddpm_ext.accelerate(unet)
        during = unet(*inputs(unet)).sample
        done.undo()
        after = unet(*inputs(unet)).sample
    assert close(before, during) and not torch.equal(before, during)
    assert torch.equal(before, after)
    assert {type(m).__module__.partition(".")[0] for m in unet.modules()} <= {
        "diffusers", "torch", "iddpm_ext"
    }  # fmt: skip
    ours = [m for m in unet.modules() if "interop.acceleration" in type(m).__module__]
    assert ours == []


@pytest.mark.parametrize("name", CONFIGS)
def test_every_gradient_is_equal_to_rounding(name):
    unet = network(name)
    before = gradients(unet)
    with iddpm_ext.accelerate(unet):
        during = gradients(unet)
    # Some are zero but for rounding (the bias of k): all are measured by the largest of them.
    scale = max(float(g.abs().max()) for g in before)
    for p, q in zip(before, during, strict=True):
        assert (p - q).abs().max() <= max(2e-5 * p.abs().max(), 1e-6 * scale)


def test_training_goes_the_same_way():
    losses = []
    for accelerated in (False, True):
        unet = network("scale-shift").train()
        if accelerated:
            iddpm_ext.accelerate(unet)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
        x, t, _ = inputs(unet)
        for _ in range(3):
            optimizer.zero_grad()
            loss = unet(x, t).sample.square().mean()
            loss.backward()
            optimizer.step()
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_it_says_what_it_replaced_and_what_not():
    unet = network("scale-shift")
    unet.up_blocks[1].resnets[0].norm2.register_forward_hook(lambda *_: None)
    done = iddpm_ext.accelerate(unet, attention=False)
    count = {what: len([n for n, w in done.replaced if w == what]) for _, what in done.replaced}
    assert count == {
        "ResnetBlock2D: GroupNorm, scale-shift and SiLU": 7,
        "GroupNorm and SiLU": 1,
        "3x3 convolution in channels_last": 19,
    }
    assert ("up_blocks.1.resnets.0", "a module with hooks") in done.left
    assert ("mid_block.attentions.0", "Attention (attention=False)") in done.left
    text = str(done)
    assert "27 replaced" in text and "1 x a module with hooks (up_blocks.1.resnets.0)" in text
    assert str(iddpm_ext.accelerate(nn.Linear(2, 2))) == "accelerate: found nothing to replace"


def test_state_copies_and_pickles_are_those_of_the_network():
    unet = network("scale-shift")
    keys = list(unet.state_dict())
    done = iddpm_ext.accelerate(unet)
    assert list(unet.state_dict()) == keys
    clone = copy.deepcopy(unet)
    with torch.no_grad():
        clone.conv_norm_out.weight.zero_()
        clone.conv_norm_out.bias.zero_()
        assert clone(*inputs(clone)).sample.std() < unet(*inputs(unet)).sample.std()
        again = pickle.loads(pickle.dumps(unet))
        assert torch.equal(again(*inputs(unet)).sample, unet(*inputs(unet)).sample)
    done.undo()


class Foreign(nn.Module):
    """A network of no library, with what may be fused and what may not."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.SiLU()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(3, 12, eps=0.1), nn.SiLU(),
            nn.Conv2d(12, 12, 3, padding=1, groups=2), nn.GroupNorm(4, 12), shared,
            nn.Conv2d(12, 12, 3, stride=2, padding=1), nn.GroupNorm(4, 12, affine=False), nn.SiLU(),
            nn.GroupNorm(2, 12), nn.ReLU(), shared,
        )  # fmt: skip
        self.line = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())

    def forward(self, x):
        return self.body(x), self.line(x[:, :1, :4, :].flatten(2).view(len(x), 4, -1))


def test_only_what_is_surely_a_pair_is_fused_in_a_foreign_network():
    model = filled(Foreign())
    x = torch.randn(2, 3, 9, 7)
    expected = model(x)
    done = iddpm_ext.accelerate(model)
    for a, b in zip(expected, model(x), strict=True):
        assert torch.allclose(a, b, atol=2e-6)
    assert sorted(name for name, what in done.replaced if "GroupNorm" in what) == [
        "body.1",
        "line.0",
    ]
    assert [name for name, what in done.replaced if "3x3" in what] == ["body.0"]
    assert dict(done.left) == {
        "body.4": "GroupNorm and SiLU, one of which is used elsewhere too",
        "body.7": "GroupNorm without weights",
        "body.9": "GroupNorm whose user is not known",
    }


def test_autocast_and_bfloat16_networks_run():
    unet = network("scale-shift")
    x, t, _ = inputs(unet)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = unet(x, t).sample.float()
        with iddpm_ext.accelerate(unet):
            during = unet(x, t).sample.float()
    assert (before - during).abs().max() < 0.05 * before.abs().max()
    unet = unet.bfloat16()
    with torch.no_grad(), iddpm_ext.accelerate(unet):
        half = unet(x.bfloat16(), t).sample
    assert half.dtype == torch.bfloat16
    assert (half.float() - before).abs().max() < 0.1 * before.abs().max()


def test_a_pipeline_runs_on_an_accelerated_network():
    pipe = diffusers.DDPMPipeline(network("scale-shift"), iddpm_ext.IDDPMScheduler(sampler="ddim"))
    pipe.set_progress_bar_config(disable=True)
    wanted = {"num_inference_steps": 4, "output_type": "pt"}
    before = pipe(generator=torch.Generator().manual_seed(0), **wanted).images
    with iddpm_ext.accelerate(pipe.unet):
        during = pipe(generator=torch.Generator().manual_seed(0), **wanted).images
    assert (before - during).abs().max() < 1e-5


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        iddpm_ext.accelerate(lambda x: x)

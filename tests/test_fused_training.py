"""The fused network for training on a GPU has the module's gradients; here on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from engine_networks import CONFIGS, MORE_CONFIGS, inputs, make
from golden.make_unet import fill_by_formula
from torch.utils._python_dispatch import TorchDispatchMode

from iddpm_ext import UNet, UNetConfig
from iddpm_ext.training.fused import FusedTraining

NAMES = ("bundled", "one head, shift only", "resampling blocks, new heads", "concatenated identity")
ALL = {name: (CONFIGS | MORE_CONFIGS)[name] for name in NAMES}


def gradients(model, call, x, t, y):
    """The output and every parameter's gradient, float64."""
    model.zero_grad(set_to_none=True)
    draw = torch.Generator().manual_seed(5)
    out = call(x, t, y)
    (out * torch.randn(out.shape, generator=draw).to(out.dtype)).sum().backward()
    if isinstance(call, FusedTraining):
        call.collect()
    return out.detach().double(), {n: p.grad.double() for n, p in model.named_parameters()}


def distance(found, exact):
    """The distance of all gradients together, relative to their norm."""
    gap = sum(float((found[name] - exact[name]).square().sum()) for name in exact)
    return (gap / sum(float(value.square().sum()) for value in exact.values())) ** 0.5


@pytest.fixture(params=ALL)
def network(request):
    model = make(**ALL[request.param]).train().requires_grad_()
    x, y = inputs(model, 3)
    t = torch.tensor([0.0, 500.0, 999.0])
    exact = copy.deepcopy(model).double()
    exact.backend = "plain"
    return model, (x, t, y), gradients(exact, exact, x.double(), t.double(), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_module(network, dtype):
    model, arguments, (out, exact) = network

    def module(x, t, y):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model(x, t, y)

    usual, yardstick = gradients(model, module, *arguments)
    found_out, found = gradients(model, FusedTraining(model, dtype), *arguments)
    assert distance({"": found_out}, {"": out}) < 2 * distance({"": usual}, {"": out})
    assert distance(found, exact) < 2 * distance(yardstick, exact)
    # Each of them, however small; some are zero up to rounding.
    whole = sum(float(value.square().sum()) for value in exact.values()) ** 0.5
    for name, value in exact.items():
        assert (found[name] - value).norm() < 0.2 * value.norm() + 1e-4 * whole, name


def test_gradients_of_two_parts_add_up(network):
    model, (x, t, y), _ = network
    fused = FusedTraining(model, torch.bfloat16)
    once = gradients(model, fused, x, t, y)[1]
    out = fused(x, t, y)
    draw = torch.Generator().manual_seed(5)
    (out * torch.randn(out.shape, generator=draw)).sum().backward()
    fused.collect()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), 2 * once[name])


def test_backward_pass_copies_no_feature_map():
    """Gradients are copied for another memory format, and for writing into a view."""
    model = (
        make(**{**CONFIGS["bundled"], "attention_resolutions": (8, 16)}).train().requires_grad_()
    )
    x, y = inputs(model, 2)
    out = FusedTraining(model, torch.float32)(x, torch.tensor([3.0, 500.0]), y)
    copied = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name
            if name in ("aten::clone", "aten::copy_", "aten::new_zeros") and args[0].dim() == 4:
                copied.extend([(name, args[0].shape)] if args[0].shape[2] > 3 else [])
            return func(*args, **(kwargs or {}))

    with Watch():
        out.sum().backward()
    assert copied == []


def test_dropout_draws_from_the_global_generator_in_training_alone():
    model = make(**CONFIGS["bundled"]).train()
    model.requires_grad_()
    for block in model.modules():
        if isinstance(block, torch.nn.Dropout):
            block.p = 0.5
    x, y = inputs(model, 3)
    t = torch.tensor([0.0, 500.0, 999.0])
    torch.manual_seed(3)
    dropped = FusedTraining(model, torch.float32)(x, t, y)
    torch.manual_seed(3)
    again = FusedTraining(model, torch.float32)(x, t, y)
    model.eval()
    assert torch.equal(dropped, again)
    assert (dropped - FusedTraining(model, torch.float32)(x, t, y)).abs().max() > 1e-3


def test_an_upsampler_has_the_modules_output_and_gradients():
    config = UNetConfig(
        image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1, 2),
        attention_resolutions=(4,), super_resolution=True,
    )  # fmt: skip
    model = UNet(config).train()
    fill_by_formula(model)
    x, low_res, t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4), torch.tensor([3.0, 700.0])

    def parts(call):
        out = call(x, t, low_res=low_res)
        return [out, *torch.autograd.grad(out.square().mean(), list(model.parameters()))]

    found, wanted = (
        torch.cat([part.detach().flatten() for part in parts(call)])
        for call in (FusedTraining(model, torch.float32), model)
    )
    assert (found - wanted).norm() < 1e-5 * wanted.norm()

"""Specific to `conv3x3`: its exact mode, its two tiles, instruction sets, batches and threads."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import rounding
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from iddpm_ext import Diffusion, UNet, UNetConfig, _native
from iddpm_ext.networks.blocks import Conv3x3
from iddpm_ext.ops import conv3x3, unavailable

pytestmark = pytest.mark.skipif(
    bool(unavailable("conv3x3", "cpu", "cpu", torch.float32)), reason="no C++ kernels here"
)
SHAPES = [(4, 64, 64, 28, 28), (2, 128, 32, 14, 7), (16, 32, 48, 8, 8), (8, 64, 64, 4, 4)]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(n: int, c: int, k: int, h: int, w: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, dy = torch.randn(n, c, h, w, generator=draw), torch.randn(n, k, h, w, generator=draw)
    weight = torch.randn(k, c, 3, 3, generator=draw) / (9 * c) ** 0.5
    last = torch.channels_last
    return (
        x.contiguous(memory_format=last),
        weight,
        torch.randn(k, generator=draw),
        dy.contiguous(memory_format=last),
    )


def results(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, **options) -> list[Tensor]:
    """y and the gradients of x, weight and bias."""
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
    y = conv3x3(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def terms(n: int, c: int, k: int, h: int, w: int) -> list[int]:
    """How many products each of `results` adds up."""
    return [9 * c + 1, 9 * k, n * h * w, n * h * w]


def errors(values: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((v - e).norm() / e.norm()) for v, e in zip(values, exact, strict=True)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_keeps_the_error_of_direct_convolution(shape):
    given = inputs(*shape)
    truth = results(*(value.double() for value in given))
    direct = errors(results(*given, backend="reference"), truth)
    found = errors(results(*given, exact=True, backend="cpu"), truth)
    bounds = [rounding.of_sums(count) for count in terms(*shape)]
    assert all(f <= max(2 * d, b) for f, d, b in zip(found, direct, bounds, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_default_stays_within_a_few_roundings(shape):
    given = inputs(*shape)
    truth = results(*(value.double() for value in given))
    found = results(*given, backend="cpu")
    for f, t, count in zip(found, truth, terms(*shape), strict=True):
        assert (f - t).abs().max() <= rounding.of_winograd(4, count) * t.abs().max()


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_other_instruction_sets_agree(isa):
    given = inputs(*SHAPES[1])
    expected = results(*given, backend="cpu")
    native = _native.native()
    if isa not in native.build_info()["isa_available"]:
        pytest.skip("not on this CPU")
    previous = native.set_isa(isa)
    try:
        found = results(*given, backend="cpu")
    finally:
        native.set_isa(previous)
    for distance, count in zip(errors(found, expected), terms(*SHAPES[1]), strict=True):
        assert distance < 2 * rounding.of_winograd(4, count)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_depends_on_neither_threads_nor_repetition(threads, exact, dtype):
    x, weight, bias, dy = inputs(5, 48, 80, 13, 9)
    found = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        found.append(results(x.to(dtype), weight, bias, dy, exact=exact, backend="cpu"))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("size", [(28, 28), (7, 7), (4, 4)])
def test_a_sample_gives_the_same_bits_alone_and_in_a_batch(size):
    x, weight, bias, dy = inputs(6, 32, 32, *size)
    y, dx, _, _ = results(x, weight, bias, dy, backend="cpu")
    for i in (0, 5):
        y_alone, dx_alone, _, _ = results(x[i : i + 1], weight, bias, dy[i : i + 1], backend="cpu")
        assert torch.equal(y_alone[0], y[i]) and torch.equal(dx_alone[0], dx[i])


@pytest.fixture
def without_amx() -> Iterator[None]:
    """A context without AMX, whose rounding of the weights is tested in tests/test_amx.py."""
    native = _native.native()
    before = native.build_info()["isa"]
    native.set_isa("avx512" if before == "amx" else before)
    yield
    native.set_isa(before)


@pytest.mark.parametrize("exact", [False, True])
def test_bfloat16_images_meet_weights_that_are_not_rounded(without_amx, exact):
    x, weight, bias, dy = inputs(4, 32, 32, 12, 12)
    x, dy = x.bfloat16(), dy.bfloat16()
    found = results(x, weight, bias, dy, exact=exact, backend="cpu")
    assert [f.dtype for f in found] == [torch.bfloat16] * 2 + [torch.float32] * 2
    truth = results(*(value.double() for value in (x, weight, bias, dy)))
    # A rounding of the result, half a bfloat16 eps at most, whose errors are evenly spread up to that.
    assert max(errors(found[:2], truth[:2])) < torch.finfo(torch.bfloat16).eps / 2 / 3**0.5
    assert max(errors(found[2:], truth[2:])) < rounding.of_winograd(4, 4 * 12 * 12)


def test_only_the_gradients_that_are_asked_for_are_computed():
    x, weight, bias, dy = inputs(2, 32, 32, 8, 8)
    calls: list[tuple[bool, ...]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.iddpm_ext.conv3x3_bwd.default:
                calls.append(tuple(args[5:8]))
            return func(*args, **(kwargs or {}))

    weight.requires_grad_()
    with Recorder():
        conv3x3(x, weight, bias, backend="cpu").backward(dy)
    assert calls == [(False, True, False)]
    truth = results(*(value.double() for value in (x, weight.detach(), bias, dy)))
    assert errors([weight.grad], truth[2:3])[0] < rounding.of_winograd(4, 2 * 8 * 8)


def test_training_in_float32_rounds_like_the_direct_sum():
    """Its gradients are as accurate as PyTorch's; F(4x4, 3x3) would have 1.5 times the error."""
    torch.manual_seed(0)
    layer = Conv3x3(64, 64)
    x = torch.randn(2, 64, 16, 16).contiguous(memory_format=torch.channels_last)
    weight, bias = layer.weight, layer.bias
    for dtype, exact in ((torch.float32, True), (torch.bfloat16, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = torch.autograd.grad(layer(x).float().square().sum(), [weight])[0]
        y = conv3x3(x.to(dtype), weight, bias, exact=exact)
        wanted = torch.autograd.grad(y.float().square().sum(), [weight])[0]
        assert torch.equal(found, wanted)
    model = UNet(UNetConfig(
        image_size=16, model_channels=64, num_res_blocks=1, channel_mult=(1,), attention_resolutions=(),
    ))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
    model.diffusion = Diffusion("cosine", 100)
    x_0, noise, t = torch.rand(2, 3, 16, 16), torch.randn(2, 3, 16, 16), torch.tensor([10, 80])

    def gradient(network: UNet, dtype: torch.dtype) -> torch.Tensor:
        losses = model.diffusion.training_losses(network, x_0.to(dtype), t, noise.to(dtype))
        parts = torch.autograd.grad(losses["loss"].sum(), list(network.parameters()))
        return torch.cat([part.flatten().double() for part in parts])

    double = copy.deepcopy(model).double()
    double.backend = "plain"
    truth = gradient(double, torch.float64)
    ours = gradient(model, torch.float32)
    model.backend = "plain"
    plain = gradient(model, torch.float32)
    assert (ours - truth).norm() <= 2 * (plain - truth).norm()

"""Sums over pixels and the settling of a feature map, by the emulated CUDA kernels and by PyTorch."""

from __future__ import annotations

import pytest
import torch
from cuda_emu import toolchain

from iddpm_ext import _native
from iddpm_ext.ops.pixel_rows import channel_sums, rows_of, settle

ON_GPU = torch.cuda.is_available() and _native.cuda_absence() is None
REASON = toolchain.absence() or _native.cpu_absence()
SHAPES = [
    (3, 40, 5, 7),
    (1, 3, 2, 2),
    (2, 520, 4, 4),
    (5, 8, 9, 3),
    (1, 16, 1, 1),
    (64, 32, 12, 12),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["reference", "cuda"])
def backend(request):
    if request.param == "reference":
        yield "reference"
        return
    if ON_GPU:
        with torch.device("cuda"):
            yield "cuda"
        return
    if REASON is not None:
        pytest.skip(f"no emulator: {REASON}")
    from cuda_emu import emulator

    with emulator.emulated_cuda(1):
        yield "cuda"


def images(shape, dtype, seed=0, pitch=0):
    """Channels_last, with `pitch` other channels between the pixels."""
    n, c, h, w = shape
    draw = torch.Generator(torch.get_default_device()).manual_seed(seed)
    wide = torch.randn(n, h, w, c + pitch, generator=draw).to(dtype) + 0.25
    return wide[..., :c].permute(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pitch", [0, 8, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_channel_sums_are_sums_over_all_pixels(backend, shape, dtype, pitch):
    x = images(shape, dtype, pitch=pitch)
    found, exact = channel_sums(rows_of(x), backend), x.double().sum(dim=(0, 2, 3))
    assert found.dtype == torch.float32
    # A rounding at each of at most so many additions in a row, of sums no larger than this.
    bound = 2**-24 * x.double().abs().sum(dim=(0, 2, 3)) * 64
    assert ((found - exact).abs() <= bound).all()


def test_channel_sums_of_nothing_are_zero(backend):
    assert torch.equal(channel_sums(torch.empty(0, 5), backend), torch.zeros(5))


def test_channel_sums_do_not_depend_on_what_lies_between_pixels(backend):
    dense, pitched = images((2, 24, 6, 5), torch.bfloat16), torch.full((2, 6, 5, 40), torch.nan)
    pitched[..., :24] = dense.permute(0, 2, 3, 1).float()
    view = pitched.to(torch.bfloat16)[..., :24].permute(0, 3, 1, 2)
    assert torch.equal(channel_sums(rows_of(view), backend), channel_sums(rows_of(dense), backend))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("parts", ["both", "residual", "bias"])
def test_settling_adds_in_place(backend, shape, dtype, parts):
    x, residual = images(shape, dtype), images(shape, dtype, seed=1, pitch=8)
    bias = torch.linspace(-1, 1, shape[1])
    exact = x.double()
    exact = exact if parts == "bias" else exact + residual.double()
    exact = exact if parts == "residual" else exact + bias.double()[:, None, None]
    found = settle(
        x, None if parts == "bias" else residual, None if parts == "residual" else bias, backend
    )
    assert found is x
    # PyTorch rounds each of its two sums, the kernel the last one.
    epsilon = torch.finfo(dtype).eps
    assert ((found.double() - exact).abs() <= 2 * epsilon * (1 + exact.abs())).all()


def test_the_gradient_of_settling_is_that_of_the_sum(backend):
    x, residual = (images((2, 8, 3, 5), torch.float32, seed).requires_grad_() for seed in (1, 2))
    bias = torch.randn(8, requires_grad=True)
    weight = images((2, 8, 3, 5), torch.float32, 3)
    (settle(x * 1.0, residual, bias, backend) * weight).sum().backward()
    for value, expected in ((x, weight), (residual, weight), (bias, weight.sum(dim=(0, 2, 3)))):
        torch.testing.assert_close(value.grad, expected)

"""The kernels of the CUDA engine that are no ops, on a GPU or emulated, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cuda_emu import toolchain

from iddpm_ext import _native
from iddpm_ext.engines.cuda import kernels

ON_GPU = torch.cuda.is_available() and _native.cuda_absence() is None
REASON = toolchain.absence() or _native.cpu_absence()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["reference", "cuda"])
def backend(request):
    if request.param == "reference":
        yield "reference"
    elif ON_GPU:
        with torch.device("cuda"), torch.backends.cudnn.flags(allow_tf32=False):
            yield "cuda"
    elif REASON is not None:
        pytest.skip(f"no emulator: {REASON}")
    else:
        from cuda_emu import emulator

        with emulator.emulated_cuda(1):
            yield "cuda"


def normal(*shape, seed=0):
    draw = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randn(shape, generator=draw)


def assert_rounded(found, exact, terms):
    """Within the rounding to the result's dtype and those of a float32 sum of so many terms."""
    bound = exact.abs() * torch.finfo(found.dtype).eps + terms * 2**-22
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "columns"),
    [
        ((2, 3, 9, 11), 32),
        ((1, 1, 4, 8), 64),
        ((2, 6, 5, 3), 132),
        ((1, 3, 1, 1), 4),
        ((1, 9, 4, 4), 8),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_first_convolution_is_the_convolution(backend, shape, columns, dtype, layout):
    x, weight = normal(*shape), normal(columns, shape[1], 3, 3, seed=1)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    found = kernels.first_convolution(x, kernels.columns_last(weight), dtype, backend)
    assert found.dtype == dtype and found.permute(0, 2, 3, 1).is_contiguous()
    assert_rounded(found, exact, 9 * shape[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "columns"),
    [
        ((2, 32, 9, 40), 6),
        ((1, 64, 4, 32), 2),
        ((2, 96, 5, 3), 3),
        ((1, 32, 1, 1), 1),
        ((70, 32, 3, 4), 6),  # more blocks than take a row each
        ((33, 64, 6, 33), 3),
        ((1, 40, 4, 4), 5),
    ],
)
def test_last_convolution_is_the_convolution(backend, shape, columns, dtype):
    x = normal(*shape).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = normal(columns, shape[1], 3, 3, seed=1), normal(columns, seed=2)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    found = kernels.last_convolution(x, kernels.columns_last(weight), bias, backend)
    assert found.dtype == torch.float32 and found.shape == exact.shape
    assert_rounded(found, exact, 9 * shape[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "columns"), [((2, 8, 4, 6), 16), ((1, 5, 3, 1), 3), ((1, 3, 1, 1), 8)]
)
def test_doubled_convolution_is_the_convolution_of_the_doubled_image(
    backend, shape, columns, dtype
):
    x = normal(*shape).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = normal(columns, shape[1], 3, 3, seed=1)
    four = kernels.doubling_weight(weight).to(dtype).contiguous(memory_format=torch.channels_last)
    found = kernels.doubled_convolution(x, four, backend)
    large = F.interpolate(x.double(), scale_factor=2, mode="nearest")
    exact = F.conv2d(large, weight.double(), padding=1)
    assert found.dtype == dtype and found.permute(0, 2, 3, 1).is_contiguous()
    # The rounding of the weights' sums, of which each result has four a channel.
    rounding = 4 * F.conv2d(large.abs(), weight.double().abs(), padding=1)
    assert ((found.double() - exact).abs() <= rounding * torch.finfo(dtype).eps).all()


def test_no_images_have_no_features(backend):
    weight = kernels.columns_last(normal(8, 3, 3, 3))
    assert kernels.first_convolution(torch.empty(0, 3, 4, 4), weight, torch.bfloat16, backend).shape == (
        0, 8, 4, 4,
    )  # fmt: skip

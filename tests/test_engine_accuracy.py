"""The CPU engine's images and errors, on the bundled weights and on networks of full size."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch

import iddpm_ext
from iddpm_ext import UNet, UNetConfig, _native
from iddpm_ext.engines.cpu.engine import CPUEngine

pytestmark = pytest.mark.skipif(
    _native.cpu_absence() is not None or _native.native().build_info()["isa"] == "base",
    reason="needs iddpm_ext._C and AVX2",
)
TIMES = (37.0, 500.0, 999.0)
IMAGES = {"steps": 50, "n": 5, "labels": [0, 2, 5, 7, 9], "progress": False}


@pytest.fixture(scope="module")
def model() -> UNet:
    return iddpm_ext.load("fashion-mnist").requires_grad_(False)


@pytest.fixture(scope="module")
def plain_images(model):
    return iddpm_ext.sample(model, engine=False, **IMAGES)


def worst_error(evaluate, model, n) -> float:
    """Max over max against float64 of a sample, the worst of those looked at: TIMES in turn."""
    c = model.config
    torch.manual_seed(n)
    x = torch.randn(n, c.in_channels, c.image_size, c.image_size)
    labels = None if c.num_classes is None else torch.arange(n) % c.num_classes
    seen = sorted({0, n // 3, n // 2, n - 2, n - 1} & set(range(n)))
    exact = copy.deepcopy(model).double()
    errors = []
    for shift in range(3 if n < 3 else 1):
        t = torch.tensor(TIMES)[(torch.arange(n) + shift) % 3]
        truth = exact(x[seen].double(), t[seen].double(), None if labels is None else labels[seen])
        gaps = (evaluate(x, t, labels)[seen] - truth).abs().amax(dim=(1, 2, 3))
        errors.append((gaps / truth.abs().amax(dim=(1, 2, 3))).max().item())
    return max(errors)


def share_within(x, y, levels) -> float:
    """Of pixels that differ by at most so many of 255 levels."""
    return ((x - y).abs() <= levels * 2 / 255).double().mean().item()


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_every_batch_size_is_within_1e_5(model, n):
    assert worst_error(CPUEngine(model, n).at, model, n) < 1e-5


def test_exact_rounds_like_direct_convolution(model):
    theirs = worst_error(model, model, 4)
    assert worst_error(CPUEngine(model, 4, exact=True).at, model, 4) < 2 * theirs


@pytest.mark.parametrize("exact", [False, True])
def test_a_chain_of_50_steps_draws_the_images_of_the_plain_module(model, plain_images, exact):
    images = iddpm_ext.sample(model, exact=exact, **IMAGES)
    assert not torch.equal(images, plain_images)
    assert share_within(images, plain_images, 2) >= 0.999


def test_avx2_chosen_by_the_environment_draws_the_same_images(tmp_path, plain_images):
    path = tmp_path / "images.pt"
    code = (
        "import torch, iddpm_ext, iddpm_ext._native\n"
        "model = iddpm_ext.load('fashion-mnist')\n"
        f"images = iddpm_ext.sample(model, **{IMAGES!r})\n"
        "isa = iddpm_ext._native.native().build_info()['isa']\n"
        "assert isa == 'avx2', isa\n"
        f"torch.save(images, {str(path)!r})\n"
    )
    environment = {**os.environ, "IDDPM_ISA": "avx2"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert share_within(torch.load(path), plain_images, 2) >= 0.999


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_imagenet_64_configuration_is_served(dtype):
    if dtype == torch.bfloat16 and not _native.native().build_info()["bf16"]:
        pytest.skip("this CPU has no avx512_bf16")
    config = UNetConfig(
        image_size=64, model_channels=128, num_res_blocks=3, channel_mult=(1, 2, 3, 4)
    )
    network = UNet(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(noise / p[0].numel() ** 0.5 if p.dim() > 1 else p + 0.1 * noise)
    limit = 1e-5 if dtype == torch.float32 else 1.2e-2
    assert worst_error(CPUEngine(network, 1, dtype=dtype).at, network, 1) < limit

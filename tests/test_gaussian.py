"""The Gaussian terms of the bound against torch's distributions and fifty-digit arithmetic."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from iddpm_ext import ops
from iddpm_ext.ops.gaussian import (
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    normal_kl,
)
from iddpm_ext.ops.spec import unavailable
from iddpm_ext.ops.synthetic import bound_call


def test_normal_kl_is_zero_for_equal_gaussians_and_matches_torch_otherwise():
    a, b, c, d = (torch.randn(7, dtype=torch.float64) for _ in range(4))
    assert not normal_kl(a, b, a, b).any()
    p, q = (torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in ((a, b), (c, d)))
    torch.testing.assert_close(normal_kl(a, b, c, d), torch.distributions.kl_divergence(p, q))


def test_tanh_cdf_is_within_3e_4_of_the_normal_distribution_function():
    x = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    assert (approx_standard_normal_cdf(x) - torch.special.ndtr(x)).abs().max() < 3e-4


@pytest.mark.parametrize("log_scale", [-4.0, -2.0, 0.5])
@pytest.mark.parametrize("exact", [False, True])
def test_probabilities_of_all_256_levels_sum_to_one(log_scale, exact):
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    scale = torch.full_like(x, log_scale)
    log_p = discretized_gaussian_log_likelihood(x, scale * 0 + 0.3, scale, exact=exact)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("log_scale", [-6.0, -5.0, -4.0, -3.0])
def test_tanh_likelihood_is_within_5e_4_nats_of_the_exact_one_near_the_mean(log_scale):
    x = torch.arange(1, 255, dtype=torch.float64) / 127.5 - 1
    scale = torch.full_like(x, log_scale)
    close, exact = (
        discretized_gaussian_log_likelihood(x, x + 0.003, scale, exact=e) for e in (False, True)
    )
    assert (close - exact).abs().max() < 5e-4


@pytest.mark.parametrize("level", [0, 1, 127, 254, 255])
@pytest.mark.parametrize("mean", [-1.3, 0.0, 0.9])
@pytest.mark.parametrize("log_scale", [-7.0, -3.0, 2.0])
def test_exact_likelihood_agrees_with_fifty_digits_far_into_the_tails(level, mean, log_scale):
    x = torch.tensor(level / 127.5 - 1, dtype=torch.float64)
    actual = discretized_gaussian_log_likelihood(
        x, torch.tensor(mean).double(), torch.tensor(log_scale).double(), exact=True
    )
    with mpmath.workdps(50):
        centred, scale = mpmath.mpf(x.item()) - float(torch.tensor(mean)), mpmath.exp(log_scale)
        lower = -mpmath.inf if level == 0 else (centred - 1 / mpmath.mpf(255)) / scale
        upper = mpmath.inf if level == 255 else (centred + 1 / mpmath.mpf(255)) / scale
        root = mpmath.sqrt(2)
        expected = mpmath.log((mpmath.erfc(lower / root) - mpmath.erfc(upper / root)) / 2)
        if not mpmath.isfinite(expected):
            expected = mpmath.log((mpmath.erfc(-upper / root) - mpmath.erfc(-lower / root)) / 2)
    assert actual.item() == pytest.approx(float(expected), rel=1e-10)


def test_tanh_likelihood_is_floored_at_1e_12_without_gradient():
    mean = torch.tensor([0.9], requires_grad=True)
    log_p = discretized_gaussian_log_likelihood(torch.tensor([-0.5]), mean, torch.full((1,), -6.0))
    assert log_p.item() == pytest.approx(math.log(1e-12), abs=1e-5)
    assert torch.autograd.grad(log_p, mean)[0] == 0


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("v", [30.0, 60.0, 80.0])
def test_kernels_keep_the_digits_of_a_bin_that_is_narrow_beside_the_scale(v, backend):
    if unavailable("vlb_terms", backend, "cpu", torch.float32):
        pytest.skip("no such kernel here")
    call = bound_call((64, 1, 1, 1), "cpu", torch.float32, last=True)
    call["model_output"][:, 1] += v
    out = call["model_output"].requires_grad_(True)
    double = {k: x.double() if x.is_floating_point() else x for k, x in call.items()}
    terms = ops.vlb_terms(**call, backend=backend)
    exact = ops.vlb_terms(**double, backend="reference")
    # PyTorch's difference of two values near 1/2 is hundreds of roundings away at the largest v.
    results = [terms, *torch.autograd.grad(terms.sum(), out)[0].unbind(1)]
    targets = [exact, *torch.autograd.grad(exact.sum(), out)[0].unbind(1)]
    for result, target in zip(results, targets, strict=True):
        distance = (result - target).square().mean().sqrt()
        assert distance <= 2 * torch.finfo(torch.float32).eps * target.abs().max()

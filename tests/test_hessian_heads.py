"""benchmarks.hessian_heads: its target, against the network's exact derivative, and its heads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from likelihood_model import images, trained

import iddpm_ext
from iddpm_ext.likelihood.covariance import heads_request, train_heads

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.hessian_heads import HessianDiagonal


@pytest.mark.parametrize("step", [3, 60, 150])
def test_the_target_is_what_the_networks_derivative_implies(step):
    model = trained()
    target = HessianDiagonal(heads_request(model, images(2, 5), limit=None, seed=3, progress=False))
    t, generator = torch.full((2,), step), torch.Generator().manual_seed(step)
    x_t = torch.randn(2, 1, 8, 8, generator=generator)
    v = torch.randint(0, 2, x_t.shape, generator=generator) * 2.0 - 1
    chain = model.diffusion
    ab = float(chain.alphas_cumprod[step])

    def x_0(x: torch.Tensor) -> torch.Tensor:
        eps = model(x, chain.model_timesteps(t))[:, :1]
        return (x - (1 - ab) ** 0.5 * eps) / ab**0.5

    exact = (1 - ab) / ab**0.5 * torch.autograd.functional.jvp(x_0, x_t, v)[1]
    got = target.along(x_t, t, torch.arange(2), v)
    assert (got - exact).abs().max() < 5e-3 * exact.abs().max()


def test_steps_whose_mean_is_no_variance_are_unknown():
    target = object.__new__(HessianDiagonal)
    mean, known = target.scale(torch.tensor([0.01, 0.2, 0.1, -0.3, 0.5, 7.0]).double())
    assert mean.tolist() == pytest.approx([0.01, 0.2, 0.2, 0.2, 0.5, 1.0])
    assert known.tolist() == [True, True, True, False, False, False]


def test_such_heads_serve_as_those_of_errors_do(tmp_path):
    request = heads_request(trained(), images(64, 3), limit=None, seed=0, progress=False)
    found = train_heads(HessianDiagonal(request), 60, False)
    model = iddpm_ext.UNet(trained().config).eval()
    model.load_state_dict(trained().state_dict())
    model.diffusion = trained().diffusion
    model.extra = {"covariance": found.to_extra(iddpm_ext.engines.spec.weights_fingerprint(model))}
    options = {"limit": None, "steps": 20, "progress": False}
    learned = iddpm_ext.nll(model, images(32, 5), **options).bpd
    assert iddpm_ext.nll(model, images(32, 5), variance="optimal", **options).bpd < learned

"""Splicing: one network at the ends of the chain, another in between, as one model."""

from __future__ import annotations

import pytest
import torch
from likelihood_model import images, trained, untrained

from iddpm_ext import Diffusion, Splice, nll, sample
from iddpm_ext.sampling.loop import network_of
from iddpm_ext.sampling.request import make_request


def spliced(low=20, high=30):
    return Splice(untrained(3), trained(), low, high)


def test_each_step_is_evaluated_by_its_network():
    model, chain = spliced(), trained().diffusion
    t = torch.arange(200)
    x = images(200, 0)
    at_ends = (t < 20) | (t >= 170)
    with torch.no_grad():
        timesteps = chain.model_timesteps(t)
        out = model(x, timesteps)
        assert torch.equal(model.at_ends(timesteps), at_ends)
        torch.testing.assert_close(out[at_ends], model.ends(x, timesteps)[at_ends])
        torch.testing.assert_close(out[~at_ends], model.between(x, timesteps)[~at_ends])
    assert not torch.allclose(out[at_ends], model.between(x, timesteps)[at_ends], atol=1e-2)


def test_a_respaced_chain_is_cut_at_the_same_training_steps():
    chain = trained().diffusion.respace(10)
    told = chain.model_timesteps(torch.arange(10))
    wanted = [int(t) < 20 or int(t) >= 170 for t in chain.timesteps]
    assert spliced().at_ends(told).tolist() == wanted and 0 < sum(wanted) < 10


def test_sampling_takes_it_like_a_network():
    model, steps = spliced(), 12
    by_engine = sample(model, steps, n=3, seed=1, progress=False)
    by_module = sample(model, steps, n=3, seed=1, progress=False, engine=False)
    by_hand = sample(
        lambda x, t: model(x, t), steps, n=3, seed=1, progress=False, diffusion=model.diffusion,
        image_shape=(1, 8, 8),
    )  # fmt: skip
    torch.testing.assert_close(by_engine, by_module, rtol=0, atol=2e-3)
    torch.testing.assert_close(by_module, by_hand, rtol=0, atol=1e-5)


def test_the_engine_runs_both_parts():
    request = make_request("sample", spliced(), 5, n=2)
    assert network_of(request).name == "spliced cpu engine"


def test_its_likelihood_has_the_terms_of_each_part():
    model, x_0 = spliced(), images(4, 1)
    whole, ends, between = (nll(part, x_0).per_step_bpd for part in (model, model.ends, trained()))
    t = torch.arange(200)
    at_ends = (t < 20) | (t >= 170)
    torch.testing.assert_close(whole[at_ends], ends[at_ends], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(whole[~at_ends], between[~at_ends], rtol=1e-4, atol=1e-7)
    assert nll(model, x_0, budget=16).facts["network"] == "spliced cpu engine"


def test_labels_reach_both_parts():
    model = Splice(untrained(0, num_classes=3), untrained(1, num_classes=3), 20, 20)
    x_0 = images(4, 2)
    by_engine = nll(model, x_0, labels=[0, 1, 2, -1], steps=20)
    by_module = nll(model, x_0, labels=[0, 1, 2, -1], steps=20, engine=False)
    other = nll(model, x_0, labels=[2, 2, 2, 2], steps=20)
    torch.testing.assert_close(
        by_engine.per_image_bpd, by_module.per_image_bpd, rtol=1e-3, atol=1e-3
    )
    assert not torch.allclose(by_engine.per_image_bpd, other.per_image_bpd, rtol=1e-3)
    with pytest.raises(ValueError, match="labels must be given"):
        nll(model, x_0)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"ends": torch.nn.Identity()}, "ends must be an iddpm_ext.UNet, got Identity"),
        ({"between": untrained(0, num_classes=3)}, "must have the same num_classes"),
        ({"low": -1}, "low must be an int from 0 to 200, got -1"),
        ({"high": 1.5}, "high must be an int from 0 to 200"),
        ({"low": 150}, "low . high must be at most 200, got 250"),
    ],
)
def test_networks_that_do_not_go_together_are_refused(change, match):
    arguments = {"ends": untrained(), "between": trained(), "low": 100, "high": 100, **change}
    with pytest.raises((TypeError, ValueError), match=match):
        Splice(**arguments)


def test_networks_of_two_processes_are_refused():
    other = untrained()
    other.diffusion = Diffusion("linear", 200)
    with pytest.raises(ValueError, match="the same diffusion"):
        Splice(other, trained())

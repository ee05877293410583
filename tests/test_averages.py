"""Power-function averages and the fit of any width: against their integrals, and sums over whole runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import iddpm_ext
from iddpm_ext import cli
from iddpm_ext.checkpoint.runs import read_tensors
from iddpm_ext.training import TrainConfig, reconstruct_average, train
from iddpm_ext.training.averages import exponent, fit, power_decay, stored

WIDTHS = (0.05, 0.1)


def profile(steps: int, sigma_rel: float) -> torch.Tensor:
    """Weight of each step's weights in the average at the last: integrals of (g + 1) tau^g / t^(g + 1)."""
    power = exponent(sigma_rel) + 1
    edges = torch.arange(steps + 1, dtype=torch.float64) / steps
    return edges.pow(power).diff()


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.28])
def test_exponent_has_the_relative_width_that_is_asked_for(sigma_rel):
    gamma = exponent(sigma_rel)
    # Mean and deviation of tau / t under (gamma + 1) u^gamma on [0, 1], by the trapezoidal rule.
    u = torch.linspace(0, 1, 2_000_001, dtype=torch.float64)
    p = (gamma + 1) * u**gamma
    mean = float(torch.trapezoid(p * u, u))
    assert math.sqrt(float(torch.trapezoid(p * (u - mean) ** 2, u))) == pytest.approx(sigma_rel)


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_recursion_gives_the_closed_form(sigma_rel):
    walk = torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    average = torch.tensor(17.0, dtype=torch.float64)  # what it began with has no weight
    for updates, value in enumerate(walk):
        decay = power_decay(updates, exponent(sigma_rel))
        average = decay * average + (1 - decay) * value
    expected = float(profile(300, sigma_rel) @ walk)
    assert float(average) == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_fit_is_the_least_squares_of_sampled_profiles():
    steps, widths = [40, 40, 80, 80, 120, 120], [*WIDTHS] * 3
    found = fit(steps, widths, 100, 0.08)
    tau = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000 * 120

    def sampled(t: float, width: float) -> torch.Tensor:
        gamma = exponent(width)
        return torch.where(tau <= t, (gamma + 1) * tau**gamma / t ** (gamma + 1), 0)

    columns = torch.stack(
        [sampled(t, w) for t, w in zip(steps, widths, strict=True) if t <= 100], 1
    )
    goal = sampled(100, 0.08)
    expected = torch.linalg.lstsq(columns, goal[:, None]).solution[:, 0]
    torch.testing.assert_close(found.weights[:4], expected, rtol=1e-3, atol=1e-3)
    assert found.weights[4:].tolist() == [0, 0]
    left = float((columns @ expected - goal).norm() / goal.norm())
    assert found.error == pytest.approx(left, rel=1e-3)


def test_a_stored_width_is_itself_and_others_are_near_their_closed_form():
    steps = [t for t in range(50, 1001, 50) for _ in WIDTHS]
    widths = [*WIDTHS] * 20
    own = fit(steps, widths, 600, 0.1)
    assert own.error < 1e-6
    place = steps.index(600) + 1
    assert float(own.weights[place]) == pytest.approx(1, abs=1e-5)
    walk = torch.randn(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    walk = walk.cumsum(0) / 30
    averages = torch.stack([profile(t, w) @ walk[:t] for t, w in zip(steps, widths, strict=True)])
    for sigma_rel, error in ((0.07, 0.02), (0.15, 0.02), (0.2, 0.04), (0.04, 0.06)):
        found = fit(steps, widths, 1000, sigma_rel)
        assert found.error < error
        exact = float(profile(1000, sigma_rel) @ walk)
        assert float(found.weights @ averages) == pytest.approx(exact, abs=2 * error)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[TrainConfig, Path, Path]:
    """A run in one go and the same one, killed after a checkpoint and stored averages beyond it."""
    folder = tmp_path_factory.mktemp("runs")
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8)
    np.savez(folder / "d.npz", images)
    config = TrainConfig(
        data=str(folder / "d.npz"), out=str(folder / "a"), steps=8, batch_size=2, ema=WIDTHS,
        ema_profile="power", ema_every=2, save_every=1, keep=100, model_channels=32,
        num_res_blocks=1, channel_mult=(1,), attention_resolutions=(), diffusion_steps=40,
        sample_every=0, progress=False, device="cpu", lr=1e-2,
    )  # fmt: skip
    train(config)
    again = replace(config, out=str(folder / "b"), save_every=3)
    train(replace(again, steps=4))
    stray = folder / "b" / "averages" / "step-60-sigma_rel-0.05.safetensors"
    stray.write_bytes(b"of another life of the run")
    train(again)
    assert not stray.exists()
    return config, folder / "a", folder / "b"


def test_averages_of_a_run_are_their_closed_form_of_its_weights(runs):
    _, run, _ = runs
    weights = [read_tensors(run / "ckpt" / f"step-{i}", "model.safetensors") for i in range(1, 9)]
    for width in WIDTHS:
        average = read_tensors(run / "ckpt" / "step-8", f"ema_{width}.safetensors")
        for name, value in average.items():
            history = torch.stack([w[name].double() for w in weights], -1)
            expected = history @ profile(8, width)
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_stored_averages_resume_bit_for_bit(runs):
    _, whole, resumed = runs
    assert [at for at, _, _ in stored(whole)] == [2, 2, 4, 4, 6, 6, 8, 8]
    for (_, _, a), (_, _, b) in zip(stored(whole), stored(resumed), strict=True):
        assert a.name == b.name
        ours, theirs = load_file(a), load_file(b)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    names = [f"ema_{width}.safetensors" for width in WIDTHS]
    for name in ("model.safetensors", "optim.safetensors", *names):
        ours, theirs = (read_tensors(run / "ckpt" / "step-8", name) for run in (whole, resumed))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_any_width_becomes_a_file_that_load_reads(runs, tmp_path, capsys):
    _, run, _ = runs
    out = tmp_path / "x.safetensors"
    assert cli.main(["average", str(run), "--sigma-rel", "0.08", "--out", str(out)]) == 0
    assert "8 stored averages" in capsys.readouterr().out
    error = reconstruct_average(run, out, 0.08).error
    gamma = exponent(0.08)
    norm = (gamma + 1) / math.sqrt((2 * gamma + 1) * 8)
    assert 0 < error < 0.1
    model = iddpm_ext.load(out)
    assert model.extra["step"] == 8 and model.extra["sigma_rel"] == 0.08
    weights = [read_tensors(run / "ckpt" / f"step-{i}", "model.safetensors") for i in range(1, 9)]
    for name, value in model.state_dict().items():
        history = torch.stack([w[name].double() for w in weights], -1)
        off = (value.double() - history @ profile(8, 0.08)).abs()
        # By Cauchy and Schwarz, of the profile's error and the weights as functions of tau.
        assert bool((off <= error * norm * history.norm(dim=-1) + 1e-6).all())
    same = reconstruct_average(run, out, 0.1, step=6)
    assert same.error < 1e-6
    own = read_tensors(run / "ckpt" / "step-6", "ema_0.1.safetensors")
    model = iddpm_ext.load(out)
    assert model.extra["step"] == 6 and model.extra["images"] == 12
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, own[name], rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="fit sigma_rel 0.005 at step 8 to .* only"):
        reconstruct_average(run, out, 0.005)


def test_errors_come_before_any_work(runs, tmp_path):
    config, run, _ = runs
    for changes, says in (
        ({"ema": (0.9999,)}, r"ema must be widths above 0 and below 0.289 .* got \(0.9999,\)"),
        ({"ema_profile": "exponential"}, "ema_every must be 0 without ema_profile power, got 2"),
        ({"init_ema": ("a", "b"), "init_from": "c"}, "init_ema must be left out with ema_profile"),
        ({"ema_profile": "linear"}, "ema_profile must be one of exponential, power"),
    ):
        with pytest.raises(ValueError, match=says):
            replace(config, **changes)
    for changes in ({"ema": (0.05, 0.2)}, {"ema_profile": "exponential", "ema_every": 0}):
        with pytest.raises(ValueError, match="settings must be those of"):
            train(replace(config, steps=9, **changes))
    out = tmp_path / "x.safetensors"
    for arguments, says in (
        ((run, out, 0.3), "sigma_rel must be above 0 and below 0.289, got 0.3"),
        ((run, out, 0.1, 1), "step must be within the averages stored .* from 2 to 8, got 1"),
        ((run, out, 0.1, 9), "from 2 to 8, got 9"),
        ((tmp_path, out, 0.1), "none .it needs --ema-profile power.*, got 0"),
    ):
        with pytest.raises(ValueError, match=says):
            reconstruct_average(*arguments)
    assert not out.exists()
    described = json.loads((run / "config.json").read_text())
    assert TrainConfig.from_dict(described) == config

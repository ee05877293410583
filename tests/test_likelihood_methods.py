"""Likelihoods by other estimators: closed forms of normal data, the bound's own limit, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from likelihood_model import images, trained

from iddpm_ext import Diffusion, nll
from iddpm_ext.cli import main
from iddpm_ext.diffusion.moments import training_log_snr
from iddpm_ext.likelihood.journal import Journal
from iddpm_ext.likelihood.ode import integrate

STD = 0.4
CHAIN = Diffusion("cosine", 1000, variance="fixed_small")
LOG_SNR = training_log_snr(CHAIN)


def normal_network(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """The best eps for normal data of deviation STD, at any t between the steps."""
    found = np.interp(timesteps.double().numpy(), np.arange(1000), LOG_SNR.numpy())
    log_snr = torch.from_numpy(found).view(-1, 1, 1, 1)
    ab, rest = log_snr.sigmoid(), (-log_snr).sigmoid()
    return (rest.sqrt() / (ab * STD**2 + rest)).to(x.dtype) * x


def data(count: int) -> torch.Tensor:
    x = STD * torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


SETTINGS = {"diffusion": CHAIN, "clip": False, "progress": False}


def test_the_information_of_a_network_is_the_integral_of_its_errors():
    x_0 = data(64)
    found = nll(normal_network, x_0, method="information", budget=400, **SETTINGS)
    # The expected error in closed form, integrated on a fine grid.
    log_snr = torch.linspace(float(LOG_SNR[-1]), float(LOG_SNR[0]), 200_001, dtype=torch.float64)
    ab, rest = log_snr.sigmoid(), (-log_snr).sigmoid()
    spread, square = ab * STD**2 + rest, float(x_0.double().square().mean())
    error = (1 - rest / spread).square() + rest * ab * square / spread.square()
    integral = float(torch.trapezoid(error, log_snr)) / (2 * math.log(2))
    generator = torch.Generator().manual_seed(1)
    wide = x_0.double().repeat(400, 1, 1, 1)
    t = torch.zeros(len(wide), dtype=torch.int64)
    x_t = CHAIN.q_sample(wide, t, torch.randn(wide.shape, generator=generator).double())
    out = normal_network(x_t, t.float())
    decoder = float(CHAIN.vlb_terms_bpd(out, wide, x_t, t, clip=False).mean())
    expected = integral + decoder + float(CHAIN.prior_bpd(x_0.double()).mean())
    half = (found.ci95[1] - found.ci95[0]) / 2
    assert half < 0.05
    assert abs(found.bpd - expected) < 2 * half
    # A bound of finitely many steps is above its limit.
    assert nll(normal_network, x_0, method="bound", budget=20, **SETTINGS).ci95[0] > expected
    assert found.evaluations == 64 * 404 + 8 * 64 and found.facts["method"] == "information"


def test_the_equations_density_is_that_of_the_normal_distribution():
    x_0 = data(6)
    found = nll(normal_network, x_0, method="ode", tolerance=1e-5, **SETTINGS)
    ab, rest = LOG_SNR[[0, -1]].sigmoid(), (-LOG_SNR[[0, -1]]).sigmoid()
    first, last = (ab * STD**2 + rest).tolist()
    root = math.sqrt(float(ab[0]))
    square = x_0.double().square().mean() + (1 / 255) ** 2 / 3
    nats = last / first * root**2 * square / 2 + math.log(2 * math.pi) / 2
    nats = nats - math.log(last / first) / 2 - math.log(root)
    expected = float(nats) / math.log(2) + math.log2(127.5)
    # A diagonal Jacobian has no variance by signs; the spread over the levels' width has a little.
    assert found.bpd == pytest.approx(expected, abs=2e-3)
    assert found.ci95[0] - 1e-3 < expected < found.ci95[1] + 1e-3
    assert math.isnan(found.prior_bpd) and "NaN" not in found.to_json()


def test_the_solver_is_of_fifth_order_and_says_when_it_cannot_go_on():
    def turning(t: float, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.flip(1) * torch.tensor([1.0, -1.0], dtype=torch.float64)[None, :, None, None], x[
            :, 0, 0, 0
        ]

    start = (
        torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 2, 1, 1),
        torch.zeros(1).double(),
    )
    (x, number), count = integrate(turning, start, 0.0, -2.0, 1e-9, "nll")
    # dx0 = x1, dx1 = -x0 from (1, 0): (cos, -sin), and the integral of cos.
    assert x.flatten().tolist() == pytest.approx([math.cos(2), math.sin(2)], abs=1e-8)
    assert float(number) == pytest.approx(-math.sin(2), abs=1e-8) and count < 400
    with pytest.raises(RuntimeError, match="tolerance must be one that the equation meets"):
        # x = 1 / (1 + t) on the way to its pole.
        integrate(lambda t, x: (-x * x, x[:, 0, 0, 0]), start, 0.0, -2.0, 1e-9, "nll")


@pytest.mark.parametrize("settings", [{"method": "information", "budget": 2}, {"method": "ode"}])
def test_no_autocast_region_enters_a_figure(settings):
    weight = torch.full((1, 1, 1, 1), 1.001, dtype=torch.float32)  # 1 in bfloat16

    def network(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(normal_network(x, timesteps), weight)

    options = {**SETTINGS, **settings, "tolerance": 0.01}
    plain = nll(network, data(2), **options)
    with torch.autocast("cpu", torch.bfloat16):
        inside = nll(network, data(2), **options)
    assert torch.equal(inside.per_image_bpd, plain.per_image_bpd)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (trained, {"method": "information", "budget": 4}),
        (lambda: normal_network, {"method": "ode", "tolerance": 0.01, "diffusion": CHAIN}),
    ],
)  # fmt: skip
def test_a_method_goes_on_after_an_interruption(model, settings, tmp_path, monkeypatch):
    settings = {**settings, "progress": False, "batch_size": 1}
    x_0 = images(3, 7)
    whole = nll(model(), x_0, **settings)
    assert whole.ci95[0] < whole.bpd < whole.ci95[1]
    append, calls = Journal.append, []

    def stop(self: Journal, ids: torch.Tensor, values: torch.Tensor) -> None:
        append(self, ids, values)
        calls.append(ids.tolist())
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        nll(model(), x_0, state=tmp_path, **settings)
    again = nll(model(), x_0, state=tmp_path, **settings)
    assert calls == [[0], [1], [2]]
    assert torch.equal(again.per_image_bpd, whole.per_image_bpd)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "exact"}, "method must be one of"),
        ({"method": "full", "budget": 5}, "budget must be None with method 'full'"),
        ({"method": "ode", "budget": 5}, "budget must be None with method 'ode'"),
        ({"method": "ode", "tolerance": 0}, "tolerance must be above 0"),
        ({"method": "information", "steps": 10}, "steps must be None"),
        ({"method": "ode", "steps": 10}, "steps must be None"),
        ({"method": "ode", "dtype": torch.bfloat16}, "dtype must be None with method 'ode'"),
    ],
)
def test_arguments_that_a_method_has_no_use_for_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        nll(trained(), images(4, 0), progress=False, **arguments)


def test_the_command_takes_a_method(tmp_path, capsys):
    import iddpm_ext

    iddpm_ext.save(trained(), tmp_path / "m.safetensors")
    levels = ((images(4, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "x.npz", arr_0=levels)
    options = ["--data", str(tmp_path / "x.npz"), "--split", "all", "--out", str(tmp_path / "out")]
    code = main(
        [
            "nll",
            str(tmp_path / "m.safetensors"),
            *options,
            "--method",
            "information",
            "--budget",
            "10",
        ]
    )
    assert code == 0 and "bits/dim" in capsys.readouterr().out

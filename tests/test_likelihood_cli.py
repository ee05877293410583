"""`iddpm nll`: its output and files, and equal results of one and two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from likelihood_model import images, trained
from ranks import finish, started

import iddpm_ext
from iddpm_ext import nll
from iddpm_ext.cli import main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint and seven images."""
    path, data = tmp_path / "model.safetensors", tmp_path / "x.npy"
    iddpm_ext.save(trained(), path)
    np.save(data, ((images(7, 0) + 1) * 127.5).round().byte()[:, 0].numpy())
    return path, data


def command(files: tuple[Path, Path], out: Path, *flags: str) -> list[str]:
    model, data = files
    return ["nll", str(model), "--data", str(data), "--out", str(out), "--budget", "20", *flags]


def test_the_figure_and_its_interval_are_printed_and_written(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(files, out, "--n", "5", "--seed", "3")) == 0
    wanted = nll(trained(), images(7, 0)[:5], budget=20, seed=3)
    low, high = wanted.ci95
    said = capsys.readouterr().out
    assert f"{wanted.bpd:.4f} bits/dim, 95 % {low:.4f} .. {high:.4f}" in said
    figures = json.loads((out / "nll.json").read_text())
    assert figures["bpd"] == pytest.approx(wanted.bpd, rel=1e-5)
    assert (out / "per_step.csv").read_text().count("\n") == 201
    assert (out / "per_image.csv").read_text().count("\n") == 6
    assert not (out / "state").exists()


def test_the_time_is_said_as_a_time(files, tmp_path, capsys, monkeypatch):
    clock = SimpleNamespace(perf_counter=iter([0.0, 3900.0]).__next__)
    monkeypatch.setattr("iddpm_ext.cli.nll.time", clock)
    assert main(command(files, tmp_path / "out", "--n", "1")) == 0
    assert "cpu, 1 h 05 min\n" in capsys.readouterr().out


def test_full_is_the_full_sum_of_the_chain_asked_for(files, tmp_path):
    out = tmp_path / "out"
    assert main(command(files, out, "--full", "--steps", "10", "--exact", "--no-clip")) == 0
    wanted = nll(trained(), images(7, 0), steps=10, exact=True, clip=False)
    figures = json.loads((out / "nll.json").read_text())
    assert figures["bpd"] == pytest.approx(wanted.bpd, rel=1e-5)
    assert figures["budget"] is None and figures["per_step"]["count"] == [14] * 10


def test_errors_are_one_line(files, tmp_path, capsys):
    assert main(command(files, tmp_path / "out", "--budget", "0.5")) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "budget must be at least 1" in said


def test_two_processes_find_what_one_finds(files, tmp_path):
    shared = tmp_path / "shared"
    with started(["-m", "iddpm_ext", *command(files, shared)], tmp_path) as ranks:
        said = finish(ranks)
    assert "bits/dim" in said[0] and said[1] == ""
    assert main(command(files, tmp_path / "alone")) == 0
    one, two = (
        json.loads((tmp_path / name / "nll.json").read_text()) for name in ("alone", "shared")
    )
    assert one["per_step"]["count"] == two["per_step"]["count"]
    torch.testing.assert_close(
        torch.tensor(one["per_image_bpd"]), torch.tensor(two["per_image_bpd"]), rtol=1e-4, atol=1e-5
    )
    assert not (shared / "state").exists()


def test_a_killed_run_goes_on_where_it_was(files, tmp_path, capsys):
    out = tmp_path / "out"
    flags = command(files, out, "--full", "--batch-size", "1")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "iddpm_ext", *flags], env=environment)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        found = list((out / "state").glob("*.rows")) if (out / "state").exists() else []
        if found and found[0].stat().st_size > 20 * 36:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (state,) = (out / "state").glob("*.rows")
    assert state.stat().st_size > 20 * 36, "it was killed at work, not after it"
    assert main(flags) == 0
    wanted = nll(trained(), images(7, 0), batch_size=1)
    assert f"{wanted.bpd:.4f} bits/dim" in capsys.readouterr().out

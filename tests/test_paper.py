"""The programs of the paper's figures: what they write, and that each of them runs."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "python" / "paper"


def run(program: str, *flags: str) -> None:
    result = subprocess.run(
        [sys.executable, PAPER / program, *flags], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]


def rows(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


def test_schedules_leave_the_shares_of_steps_without_signal_that_are_known(tmp_path):
    """Of 4000 steps 32.7 % of the linear chain and 6.5 % of the cosine one have alpha_bar < 0.01."""
    run("fig5_alpha_bar.py", "--out", str(tmp_path))
    column = "share_of_steps_below_0.01"
    found = {
        row["schedule"]: float(row[column])
        for row in rows(tmp_path / "fig5_alpha_bar.csv")
        if row[column]
    }
    assert found["linear"] == pytest.approx(0.326, abs=0.002)
    assert found["cosine"] == pytest.approx(0.065, abs=0.002)
    facts = json.loads((tmp_path / "fig5_alpha_bar.json").read_text())
    assert facts["command"].endswith(f"fig5_alpha_bar.py --out {tmp_path}") and not facts["toy"]
    assert (tmp_path / "fig5_alpha_bar.png").read_bytes().startswith(b"\x89PNG")


def test_the_two_variances_meet_sooner_in_longer_chains(tmp_path):
    run("fig1_variance_ratio.py", "--out", str(tmp_path))
    late = {}
    for row in rows(tmp_path / "fig1_variance_ratio.csv"):
        if 0.09 < float(row["t_over_T"]) <= 0.1001:
            late[int(row["T"])] = float(row["ratio"])
    assert late[100] < late[1000] < late[4000] and late[4000] > 0.99


def test_committed_results_name_their_commands():
    results = PAPER / "results"
    for table in results.glob("*.csv"):
        facts = json.loads(table.with_suffix(".json").read_text())
        assert table.stem in facts["command"] and not facts["toy"] and facts["seconds"] >= 0
        assert table.with_suffix(".png").stat().st_size < 150_000


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_program_runs_at_toy_size(tmp_path):
    rng = np.random.default_rng(0)
    data = tmp_path / "data.npz"
    levels = rng.integers(0, 256, (300, 28, 28, 1), dtype=np.uint8)
    np.savez(data, images=levels, labels=np.arange(300) % 10)
    run("all.py", "--toy", "--data", str(data), "--out", str(tmp_path / "out"))
    programs = [*PAPER.glob("fig*.py"), *PAPER.glob("table*.py")]
    assert len(programs) == 12
    for program in programs:
        assert rows(tmp_path / "out" / f"{program.stem}.csv"), program

"""The GPU check reports what failed and goes on, and refuses a machine without a GPU politely."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest
import torch

TOOLS = Path(gpu_check.__file__).parent


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / name), *arguments]
    environment = {"PYTHONPATH": str(TOOLS.parent), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def python_step(code: str, **options) -> gpu_check.Step:
    return gpu_check.Step("step", (sys.executable, "-c", code), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_check_says_so_and_fails(tmp_path):
    result = tool("gpu_check.py", "--out", str(tmp_path / "out"))
    assert result.returncode == gpu_check.NO_DEVICE
    assert "no CUDA device" in result.stdout
    assert not (tmp_path / "out").exists()


def test_an_unknown_step_is_refused():
    result = tool("gpu_check.py", "--only", "build,tset")
    assert result.returncode != 0
    assert "got ['tset']" in result.stderr


def test_a_step_that_passes_carries_its_result(tmp_path):
    file = tmp_path / "result.json"
    code = f"open({str(file)!r}, 'w').write('[1, 2]'); print('done')"
    outcome = gpu_check.run_step(python_step(code, result=file))
    assert (outcome.passed, outcome.result, outcome.tail) == (True, [1, 2], "done\n")


def test_a_step_that_fails_keeps_its_last_words():
    outcome = gpu_check.run_step(python_step("raise SystemExit('the reason')"))
    assert not outcome.passed
    assert "the reason" in outcome.tail


def test_a_step_that_outlasts_its_limit_has_failed():
    code = "print('begun', flush=True); import time; time.sleep(60)"
    outcome = gpu_check.run_step(python_step(code, limit_s=2))
    assert not outcome.passed
    assert "begun" in outcome.tail and "stopped after 2 s" in outcome.tail


def test_a_program_that_is_not_there_is_a_failed_step():
    outcome = gpu_check.run_step(gpu_check.Step("step", ("no-such-program",)))
    assert not outcome.passed
    assert "cannot run" in outcome.tail


def test_every_kernel_of_a_backend_is_touched():
    result = tool("touch_kernels.py", "--backend", "reference")
    assert result.returncode == 0, result.stderr
    calls = dict(line.split(": ") for line in result.stdout.splitlines())
    assert calls and all(int(count.split()[0]) > 0 for count in calls.values())

"""The GPU check reports failed steps and goes on, and exits with a message on a machine without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
import torch

TOOLS = Path(gpu_check.__file__).parent
sys.path.insert(0, str(TOOLS.parent))  # benchmarks are programs of the repository
sys.path.insert(0, str(TOOLS.parent / "python" / "recipes"))


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
    outcome = gpu_check.run_step(python_step(code, limit_s=5))
    assert not outcome.passed
    assert "begun" in outcome.tail and "stopped after 5 s" in outcome.tail


def test_a_program_that_is_not_there_is_a_failed_step():
    outcome = gpu_check.run_step(gpu_check.Step("step", ("no-such-program",)))
    assert not outcome.passed
    assert "cannot run" in outcome.tail


def test_every_kernel_of_a_backend_is_touched():
    result = tool("touch_kernels.py", "--backend", "reference")
    assert result.returncode == 0, result.stderr
    calls = dict(line.split(": ") for line in result.stdout.splitlines())
    assert calls and all(int(count.split()[0]) > 0 for count in calls.values())


def test_every_part_ends_within_ten_minutes(tmp_path):
    parts = gpu_check.plan(tmp_path)
    assert list(parts) == ["kernels", "cifar", "imagenet", "brief"]
    assert gpu_check.PART_SECONDS < 600
    for steps in parts.values():
        assert max(step.limit_s for step in steps) <= gpu_check.PART_SECONDS
    for steps in (parts["cifar"], parts["imagenet"]):
        assert sum(step.limit_s for step in steps) <= gpu_check.PART_SECONDS


def test_a_part_that_is_out_of_time_stops_its_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "PART_SECONDS", 3)
    slow = python_step("import time; time.sleep(60)", limit_s=600)
    assert not gpu_check.run_part("slow", [slow, slow], tmp_path)
    record = json.loads((tmp_path / "gpu-check-slow.json").read_text())
    first, second = record["steps"]
    assert "stopped after" in first["tail"] and second["tail"] == "no time left"
    assert {"gpus", "torch", "commit", "time"} <= set(record["environment"])
    assert capsys.readouterr().out.count("FAILED") == 4


def test_results_of_an_earlier_run_are_not_taken_for_this_ones(tmp_path):
    file = tmp_path / "result.json"
    file.write_text("[1]")
    assert gpu_check.run_step(python_step("pass", result=file)).result is None


def test_what_was_measured_is_printed_last(tmp_path, capsys):
    file = tmp_path / "rows.json"
    row = {"config": "cifar", "batch": 128, "what": "forward", "name": "compile"}
    row |= {"median_ms": 6.25, "ours_is_faster_by": 1.25}
    missing = {"config": "cifar", "batch": 1, "what": "forward", "name": "eager", "missing": "why"}
    code = f"import json; json.dump({{'rows': [{row!r}, {missing!r}]}}, open({str(file)!r}, 'w'))"
    assert gpu_check.run_part("table", [python_step(code, result=file)], tmp_path)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split() == ["cifar", "B128", "forward", "compile", "6.25", "ms", "1.25x"]


def test_the_commands_of_the_plan_are_understood(tmp_path):
    """By the programs' own parsers, up to the check for a device."""
    from benchmarks import gpu_end_to_end

    for steps in gpu_check.plan(tmp_path).values():
        for step in steps:
            if "benchmarks.end_to_end" in step.command:
                options = list(step.command[step.command.index("benchmarks.end_to_end") + 1 :])
                parsed = gpu_end_to_end.parser().parse_args(options)
                assert parsed.budget_s < step.limit_s and parsed.json == step.result


def test_a_model_is_trained_beside_what_is_not_timed(tmp_path):
    import cifar10

    steps = gpu_check.plan(tmp_path, tmp_path / "train", train_s=200)["brief"]
    together = next(group for group in gpu_check.groups(steps) if len(group) > 1)
    model = next(step for step in together if step.name == "model")
    parsed = cifar10.parser().parse_args(model.command[2:])
    assert (parsed.data, parsed.export) == (tmp_path / "train", tmp_path)
    assert 60 * parsed.minutes < 200 < model.limit_s
    assert {"tests", "memcheck", "compile-training"} <= {step.name for step in together}
    assert "model" not in [step.name for step in gpu_check.plan(tmp_path)["brief"]]


def test_steps_that_measure_nothing_run_side_by_side(tmp_path):
    """Each waits for the others, which it would in vain if they came after it."""
    code = (
        "import os, pathlib, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "(folder / f'{os.getpid()}.here').touch()\n"
        "while len(list(folder.glob('*.here'))) < 3: time.sleep(0.05)\n"
        "print('all here')"
    )
    together, alone = python_step(code, beside=True, limit_s=50), python_step("print('alone')")
    steps = [together, together, together, alone]
    assert [len(group) for group in gpu_check.groups([alone, *steps])] == [1, 3, 1]
    assert gpu_check.run_part("beside", steps, tmp_path, budget_s=60.0)
    record = json.loads((tmp_path / "gpu-check-beside.json").read_text())
    assert [step["tail"] for step in record["steps"]] == ["all here\n"] * 3 + ["alone\n"]


def test_the_children_of_a_step_that_is_stopped_end_with_it(tmp_path):
    file = tmp_path / "child"
    child = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert not gpu_check.run_step(python_step(code, limit_s=3)).passed
    end = time.monotonic() + 60  # a killed process may still be on its way out
    while (state := state_of(file.read_text())) not in (None, "Z"):
        assert time.monotonic() < end, state
        time.sleep(0.01)


def state_of(pid: str) -> str | None:
    """The letter of a process's state, or None if there is none."""
    try:
        return Path("/proc", pid, "stat").read_text().split()[2]
    except OSError:
        return None


def test_an_unknown_part_is_refused():
    result = tool("gpu_check.py", "imagnet")
    assert result.returncode != 0
    assert "got ['imagnet']" in result.stderr

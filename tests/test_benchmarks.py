"""The benchmarks' baselines compute the right results, and the programs run from command line to file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from likelihood_model import STEPS, images, trained
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks are programs of the repository, not of the wheel

from benchmarks import gpu_end_to_end, sequences, timing  # noqa: E402
from benchmarks import ops as ops_benchmark  # noqa: E402
from benchmarks.likelihood import uniform_evaluations  # noqa: E402
from iddpm_ext import nll  # noqa: E402
from iddpm_ext.ops.spec import REGISTRY  # noqa: E402


@pytest.mark.parametrize("name", sorted(sequences._SERVED))
def test_the_originals_formulation_gives_the_same_numbers(name: str):
    if name not in REGISTRY:
        pytest.skip("an op to come")
    spec, compared = REGISTRY[name], 0
    for case in spec.benchmark_inputs("cpu"):
        sequence = sequences.sequence(name, case.kwargs)
        size = sum(x.numel() for x in ops_benchmark.tensors(case.kwargs))
        if sequence is None or size > 1 << 20:
            continue
        what = "forward+gradient" if spec.differentiable else "forward"
        functions = {"eager": spec.public, "original": sequence}
        ours, theirs = (
            ops_benchmark.runner(spec, f, what)(ops_benchmark.prepared(spec, case, what))
            for f in functions.values()
        )
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
        compared += 1
    assert compared


class Devices(TorchDispatchMode):
    """The operations that move a tensor from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in ops_benchmark.tensors([*args, result])}
        if len(devices) > 1:
            self.moved.append(func.name())
        return result


@pytest.mark.parametrize("name", sorted(sequences._SERVED))
def test_the_originals_formulation_takes_nothing_from_the_host(name: str):
    """A CUDA graph cannot contain copies from the host; the meta device stands for the GPU here."""
    compared = 0
    for case in REGISTRY[name].benchmark_inputs("meta"):
        sequence = sequences.sequence(name, case.kwargs)
        if sequence is not None:
            with Devices() as seen:
                sequence(**case.kwargs)
            assert not seen.moved
            compared += 1
    assert compared


def test_the_op_benchmark_writes_its_rows(tmp_path):
    file = tmp_path / "ops.json"
    command = ["--quick", "--ops", "q_sample", "--no-compile", "--rounds", "1", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ops", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(file.read_text())
    assert {"command", "commit", "cpu", "versions", "multiply_add_flops"} <= set(record)
    variants = {row["variant"] for row in record["rows"]}
    assert {"eager", "original"} <= variants
    assert all(row["correct"] for row in record["rows"])


def test_the_benchmark_knows_what_uniform_steps_would_cost():
    result = nll(trained(), images(30, 7))
    steps = result.per_step
    # One uniform draw is T l_t: its variance within an image, from many of them.
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(STEPS, (400_000,), generator=generator)
    spread = steps.bpd_error[t] * steps.count[t].sqrt() * torch.randn(len(t), generator=generator)
    drawn = STEPS * (steps.bpd[t] + spread)
    between = float(result.per_image_bpd.var())
    variance = float(drawn.var()) - between
    wanted = variance * (1.96 / 0.01) ** 2 / 30
    assert uniform_evaluations(result, 0.01) == pytest.approx(wanted, rel=0.05)


def test_gpu_cells_come_most_telling_first():
    cells = gpu_end_to_end.plan(["cifar", "small"], [128, 1], ["forward", "training"], [128])
    assert [(c.config, c.batch, c.whats) for c in cells] == [
        ("cifar", 128, ("forward",)),
        ("cifar", 128, ("training",)),
        ("cifar", 1, ("forward",)),
        ("small", 128, ("forward",)),
        ("small", 128, ("training",)),
        ("small", 1, ("forward",)),
    ]


def gpu_rows(tmp_path: Path, *options: str) -> list[dict]:
    """Rows of the GPU benchmark on the CPU, where it runs without the CUDA engine."""
    file = tmp_path / "rows.json"
    fixed = ["--configs", "small", "--batches", "2", "--training-batches", "2", "--rounds", "2"]
    arguments = [*fixed, "--steps", "2", "--json", str(file), *options]
    rows = gpu_end_to_end.run(gpu_end_to_end.parser().parse_args(arguments), "cpu")
    record = json.loads(file.read_text())
    assert {"command", "commit", "gpu", "versions"} <= set(record) and record["rows"] == rows
    return rows


def test_the_gpu_benchmark_writes_a_row_for_every_variant(tmp_path):
    rows = gpu_rows(tmp_path, "--variants", "ours,eager,eager NHWC")
    by = {(row["what"], row["name"]): row for row in rows}
    assert set(by) == {
        (w, n) for w in gpu_end_to_end.WHATS for n in ("ours", "eager", "eager NHWC")
    }
    assert "needs weights on a CUDA device" in by["forward", "ours"]["missing"]
    assert by["training", "ours"]["ours_is_faster_by"] == 1
    for row in rows:
        if "missing" not in row:
            assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
            assert row["images_per_s"] == pytest.approx(2e3 / row["median_ms"])
    assert 0 < by["forward", "eager NHWC"]["error"] < 0.05


def test_the_gpu_benchmark_says_what_it_had_no_time_for(tmp_path):
    rows = gpu_rows(tmp_path, "--budget-s", "0", "--what", "forward", "--variants", "eager")
    assert [row["missing"] for row in rows] == ["not begun within 0 s"]


def test_the_gpu_benchmark_refuses_a_machine_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu_end_to_end.main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_percentiles_are_of_the_measured_times():
    assert timing.spread([float(i) for i in range(11)]) == {
        "median_ms": 5.0, "p10_ms": 1.0, "p90_ms": 9.0,
    }  # fmt: skip
    assert timing.spread([3.0]) == {"median_ms": 3.0, "p10_ms": 3.0, "p90_ms": 3.0}

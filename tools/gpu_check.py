"""Everything that only a GPU can show, in one command: `make gpu-check`.

Builds for this machine's GPU, runs the test suite on it, runs every kernel under compute-sanitizer,
times the ops and the sampler, and writes one JSON file with the environment. Needs no network. A step
that fails does not stop the next ones, but the exit status tells. Without a CUDA device it says so and
exits with status 2.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NO_DEVICE = 2


@dataclass(frozen=True)
class Step:
    """One program to run; ``result`` is a JSON file that it writes."""

    name: str
    command: tuple[str, ...]
    limit_s: int = 600
    environment: Mapping[str, str] = field(default_factory=dict)
    result: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a step; ``tail`` is the end of what it printed."""

    name: str
    passed: bool
    seconds: float
    command: str
    tail: str
    result: Any = None


def plan(out: Path) -> list[Step]:
    """The steps in order, their results under ``out``."""
    python = sys.executable
    build = {"IDDPM_CUDA": "1", "IDDPM_CUDA_ARCHS": "native"}
    ops, images = out / "ops.json", out / "samples.png"
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    touch = ("--error-exitcode", "1", python, "tools/touch_kernels.py", "--backend", "cuda")
    bench = (python, "-m", "benchmarks.ops", "--device", "cuda", "--json", str(ops))
    sample = ("sample", "fashion-mnist", "--n", "256", "--device", "cuda", "--out", str(images))
    return [
        Step("build", (python, "setup.py", "-q", "build_ext", "--inplace"), environment=build),
        Step("info", (python, "-m", "iddpm_ext", "info"), limit_s=60),
        Step("tests", (python, "-m", "pytest", "-q", "tests")),
        Step("memcheck", (sanitizer, "--tool", "memcheck", *touch)),
        Step("racecheck", (sanitizer, "--tool", "racecheck", *touch)),
        Step("synccheck", (sanitizer, "--tool", "synccheck", *touch)),
        Step("ops", bench, result=ops),
        Step("sample", (python, "-m", "iddpm_ext", *sample), limit_s=300),
    ]


def run_step(step: Step) -> Outcome:
    """Run a step, echoing its output; a step that outlasts its limit or cannot start has failed."""
    print(f"== {step.name}: {' '.join(step.command)}", flush=True)
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **step.environment}
    try:
        done = subprocess.run(
            step.command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=step.limit_s,
        )
        passed, output = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as error:
        partial = error.stdout or b""
        text = partial.decode(errors="replace") if isinstance(partial, bytes) else partial
        passed, output = False, f"{text}\nstopped after {step.limit_s} s"
    except OSError as error:
        passed, output = False, f"cannot run: {error}"
    seconds = time.perf_counter() - start
    print(f"{output.rstrip()}\n-- {step.name}: {'passed' if passed else 'FAILED'}, {seconds:.0f} s")
    found = step.result is not None and step.result.is_file()
    result = json.loads(step.result.read_text()) if step.result is not None and found else None
    return Outcome(step.name, passed, seconds, " ".join(step.command), output[-4000:], result)


def environment() -> dict[str, Any]:
    """What a number has to carry: hardware, versions, commit, time."""
    import torch

    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    smi = shutil.which("nvidia-smi")
    query = [smi or "", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    gpus = subprocess.run(query, capture_output=True, text=True).stdout if smi else ""
    return {
        "gpus": gpus.splitlines(),
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "commit": commit or "unknown",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def main() -> int:
    """Run the plan, or the steps that ``--only`` names; 0 if all passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names of steps, separated by commas")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check")
    arguments = parser.parse_args()
    steps = plan(arguments.out.resolve())
    chosen = [name for name in arguments.only.split(",") if name]
    if unknown := set(chosen) - {step.name for step in steps}:
        parser.error(f"--only must name steps of {[s.name for s in steps]}, got {sorted(unknown)}")
    import torch

    if not torch.cuda.is_available():
        print(f"gpu-check: no CUDA device (torch {torch.__version__}); nothing to check here")
        return NO_DEVICE
    arguments.out.mkdir(parents=True, exist_ok=True)
    outcomes = [run_step(step) for step in steps if not chosen or step.name in chosen]
    record = {"environment": environment(), "steps": [asdict(outcome) for outcome in outcomes]}
    target = arguments.out / "gpu-check.json"
    target.write_text(json.dumps(record, indent=1) + "\n")
    for outcome in outcomes:
        print(
            f"{outcome.name:<10} {'passed' if outcome.passed else 'FAILED'} {outcome.seconds:6.0f} s"
        )
    print(f"written: {target}")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

"""All checks that need a GPU: `make gpu-check`, or one of its parts at a time.

    python tools/gpu_check.py kernels    build, ceilings, tests, compute-sanitizer, the table of ops
    python tools/gpu_check.py cifar      the CIFAR-10 network against PyTorch eager and torch.compile
    python tools/gpu_check.py imagenet   the ImageNet-64 network, and torch.compile's max-autotune
    python tools/gpu_check.py brief      the most important ones, for a GPU that is available for minutes:
                                         --budget-s 480 --only build,tests,training; with --data it trains
                                         a CIFAR-10 network beside steps that are not timed

Each part ends within its budget, needs no network, and writes one JSON file with the environment, again after
every step. A step that fails or times out does not stop the next ones, but shows in the exit status.
Without a CUDA device it says so and exits with status 2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NO_DEVICE = 2
PART_SECONDS = 590


@dataclass(frozen=True)
class Step:
    """One program to run; ``result`` is a JSON file that it writes.

    beside: neighbouring steps of this kind run side by side, since none of them measures time.
    """

    name: str
    command: tuple[str, ...]
    limit_s: int = 600
    environment: Mapping[str, str] = field(default_factory=dict)
    result: Path | None = None
    beside: bool = False


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step; ``tail`` is the end of its output."""

    name: str
    passed: bool
    seconds: float
    command: str
    tail: str
    result: Any = None


def plan(out: Path, data: Path | None = None, train_s: int = 240) -> dict[str, list[Step]]:
    """The steps of every part in order, with results under ``out``; ``data``: as in `brief_steps`."""
    return {
        "kernels": kernel_steps(out),
        "cifar": [
            end_to_end(out, "cifar", 570),
        ],
        "imagenet": [
            end_to_end(out, "imagenet64", 290, "--batches", "128,1,64,16"),
            end_to_end(out, "cifar-max-autotune", 270, *MAX_AUTOTUNE),
        ],
        # Results of these steps are included in the part's own file.
        "brief": [
            *brief_steps(ROOT / "runs" / "gpu-check-steps", model_steps(out, data, train_s)),
        ],
    }


# A single batch: each of its searches takes minutes.
MAX_AUTOTUNE = (
    "--configs",
    "cifar",
    "--batches",
    "128",
    "--training-batches",
    "",
    "--variants",
    "ours,compile max-autotune",
)


GPU_TESTS = "cuda and not cpu"
TEST_FILES = tuple(
    f"tests/test_{name}.py" for name in ("cuda_engine", "training_graph", "ops", "pixel_rows")
)


def kernel_steps(out: Path) -> list[Step]:
    """Build, and what concerns single kernels."""
    python = sys.executable
    build = {"IDDPM_CUDA": "1", "IDDPM_CUDA_ARCHS": "native"}
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    touch = ("--error-exitcode", "1", python, "tools/touch_kernels.py", "--backend", "cuda")
    return [
        Step("build", (python, "setup.py", "-q", "build_ext", "--inplace"), 180, build),
        Step("info", (python, "-m", "iddpm_ext", "info"), 30),
        program("ceilings", out, "benchmarks.gpu_ceilings", 40),
        Step("tests", (python, "-m", "pytest", "-q", "-k", GPU_TESTS, *TEST_FILES), 150),
        program("ops", out, "benchmarks.ops", 300, "--device", "cuda", "--budget-s", "150"),
        Step("memcheck", (sanitizer, "--tool", "memcheck", *touch), 60),
        Step("racecheck", (sanitizer, "--tool", "racecheck", *touch), 60),
        Step("synccheck", (sanitizer, "--tool", "synccheck", *touch), 60),
    ]


GRAPHS, TUNED = "compile reduce-overhead", "ours tuned"


def model_steps(out: Path, data: Path | None, train_s: int) -> list[Step]:
    """The training of a network on ``data`` for ``train_s`` seconds; its weights come to ``out``."""
    if data is None:
        return []
    folder = ROOT / "runs" / "gpu-check-steps" / "cifar10"
    recipe = (sys.executable, "python/recipes/cifar10.py", "--data", str(data))
    # The last 20 seconds are for the work after the last step.
    files = ("--out", str(folder), "--export", str(out), "--minutes", f"{(train_s - 20) / 60:.2f}")
    return [Step("model", (*recipe, *files, "--workers", "6"), train_s + 30, beside=True)]


def brief_steps(out: Path, model: list[Step]) -> list[Step]:
    """Build; then tests, beside the training of a model; then timed steps, each alone.

    Results of compilers are cached on disk, so that the baselines are built beside the tests.
    """
    python = sys.executable
    build, *_ = kernel_steps(out)
    one = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    touch = ("--error-exitcode", "1", python, "tools/touch_kernels.py", "--backend", "cuda")
    tests = (python, "-m", "pytest", "-q", "-n", "8", "-p", "no:cacheprovider", "--timeout", "120")

    def compiled(name: str, batch: str, trained: str) -> Step:
        options = ("--batches", batch, "--training-batches", trained, "--variants", GRAPHS)
        command = (python, "-m", "benchmarks.end_to_end", "--device", "cuda", "--configs", "cifar")
        what = ("--what", "training" if trained else "forward", "--budget-s", "140")
        return Step(
            name, (*command, *options, *what, "--rounds", "1", "--steps", "1"), 150, beside=True
        )

    def timed(name: str, seconds: int, *options: str) -> Step:
        return end_to_end(out, name, seconds, "--configs", "cifar", "--rounds", "9", *options)

    against = ("--variants", f"ours,{GRAPHS},eager NHWC,{TUNED}")
    forward = ("--what", "forward", "--training-batches", "", *against)
    return [
        Step(build.name, build.command, 120, environment=build.environment),
        Step("tests", (*tests, "-k", GPU_TESTS, *TEST_FILES), 150, one, beside=True),
        *(
            Step(tool, (sanitizer, "--tool", tool, *touch), 150, one, beside=True)
            for tool in ("memcheck", "racecheck", "synccheck")
        ),
        compiled("compile-128", "128", ""),
        compiled("compile-1", "1", ""),
        compiled("compile-training", "128", "128"),
        *model,
        program("kernels", out, "benchmarks.kernel_times", 40, "--rows", "60"),
        timed("forward", 60, *forward, "--batches", "128,1"),
        timed("training", 60, "--what", "training", "--batches", "128", *against),
        program(
            "group-norm",
            out,
            "benchmarks.group_norm_gpu",
            45,
            "--parts",
            "forward,backward",
            *GROUP_NORM,
        ),
        timed("forward-float32", 40, *forward[:4], *PLAIN, "--dtype", "float32"),
        timed("sampling", 40, "--what", "sampling", "--batches", "128,1", *SAMPLED),
        timed("forward-16", 30, *forward[:4], "--variants", "ours", "--batches", "16,64,256"),
        program("ceilings", out, "benchmarks.gpu_ceilings", 30),
    ]


GROUP_NORM = ("--budget-s", "38")
SAMPLED = ("--training-batches", "", "--variants", "ours,eager NHWC", "--steps", "50")
PLAIN = ("--batches", "128", "--variants", "ours,eager NHWC,eager")


def program(name: str, out: Path, module: str, limit_s: int, *options: str) -> Step:
    """A benchmark that writes its rows as JSON."""
    result = out / f"{name}.json"
    command = (sys.executable, "-m", module, *options, "--json", str(result))
    return Step(name, command, limit_s, result=result)


def end_to_end(out: Path, name: str, seconds: int, *options: str) -> Step:
    """The end-to-end benchmark, which begins nothing new in the last tenth of its time."""
    config = () if "--configs" in options else ("--configs", name)
    budget = ("--budget-s", str(seconds * 9 // 10))
    fixed = ("--device", "cuda", *config, *options, *budget)
    return program(name, out, "benchmarks.end_to_end", seconds, *fixed)


def run_step(step: Step, left_s: float = float("inf")) -> Outcome:
    """Run a step, echoing its output; a step that outlasts its limit or cannot start has failed.

    left_s: seconds left to its part, which may be fewer than the step's own limit.
    """
    print(f"== {step.name}: {' '.join(step.command)}", flush=True)
    limit_s = int(min(step.limit_s, left_s))
    if limit_s < 1:
        print(f"-- {step.name}: FAILED, no time left")
        return Outcome(step.name, False, 0.0, " ".join(step.command), "no time left")
    if step.result is not None:
        step.result.unlink(missing_ok=True)  # of an earlier run
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **step.environment}
    try:
        passed, output = run_command(step.command, environment, limit_s)
    except OSError as error:
        passed, output = False, f"cannot run: {error}"
    seconds = time.perf_counter() - start
    print(f"{output.rstrip()}\n-- {step.name}: {'passed' if passed else 'FAILED'}, {seconds:.0f} s")
    found = step.result is not None and step.result.is_file()
    result = json.loads(step.result.read_text()) if step.result is not None and found else None
    return Outcome(step.name, passed, seconds, " ".join(step.command), output[-4000:], result)


def run_command(
    command: tuple[str, ...], environment: Mapping[str, str], limit_s: int
) -> tuple[bool, str]:
    """Whether the command succeeded in time, and its output. Kills its children with it."""
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = child.communicate(timeout=limit_s)
        return child.returncode == 0, output
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
        return False, f"{output}\nstopped after {limit_s} s"


def environment() -> dict[str, Any]:
    """The context of a published number: hardware, versions, commit, time."""
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


def groups(steps: list[Step]) -> list[list[Step]]:
    """Steps that run side by side together, the others alone, in their order."""
    return [
        part
        for beside, found in itertools.groupby(steps, key=lambda step: step.beside)
        for part in ([list(found)] if beside else [[step] for step in found])
    ]


def run_part(name: str, steps: list[Step], out: Path, budget_s: float | None = None) -> bool:
    """Run a part's steps and write its JSON; whether all passed. What a step found is printed last."""
    end = time.monotonic() + (PART_SECONDS if budget_s is None else budget_s)
    record: dict[str, Any] = {"part": name, "environment": environment()}
    outcomes: list[Outcome] = []
    target = out / f"gpu-check-{name}.json"
    for group in groups(steps):
        with ThreadPoolExecutor(len(group)) as pool:
            left = [end - time.monotonic()] * len(group)
            outcomes += pool.map(run_step, group, left)
        record["steps"] = [asdict(outcome) for outcome in outcomes]
        temporary = target.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(target)
    for outcome in outcomes:
        verdict = "passed" if outcome.passed else "FAILED"
        print(f"{outcome.name:<20} {verdict} {outcome.seconds:6.0f} s")
    print(f"written: {target}\n")
    for outcome in outcomes:
        print(findings(outcome), end="")
    return all(outcome.passed for outcome in outcomes)


def findings(outcome: Outcome) -> str:
    """The table of what a step measured, or nothing."""
    if not isinstance(outcome.result, dict):
        return ""
    result = outcome.result
    if "copy_bytes_per_s" in result:
        copy, product = result["copy_bytes_per_s"] / 1e12, result["bf16_product_flops"] / 1e12
        return f"copy {copy:.2f} TB/s, bfloat16 products {product:.0f} TFLOP/s\n"
    measured = [row for row in result.get("rows", []) if "median_ms" in row and "batch" in row]
    lines = [
        f"{row['config']:<11} B{row['batch']:<4} {row['what']:<9} {row.get('name', ''):<24}"
        f"{row['median_ms']:>10.2f} ms"
        + (f" {row['ours_is_faster_by']:>7.2f}x" if row.get("ours_is_faster_by") else "")
        + (f"  kernels {row['kernel_ms']:.2f} ms" if "kernel_ms" in row else "")
        + "\n"
        for row in measured
    ]
    return "".join(lines)


def main() -> int:
    """Run the parts that are named, or all, or the steps that ``--only`` names; 0 if all passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", help="kernels, cifar, imagenet, brief; the first three by default"
    )
    parser.add_argument("--only", default="", help="names of steps, separated by commas")
    parser.add_argument("--budget-s", type=float, default=PART_SECONDS, help="of each part")
    parser.add_argument("--data", type=Path, help="images of CIFAR-10, to train on in brief")
    parser.add_argument("--train-s", type=int, default=240, help="of which much")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    parts = plan(out, arguments.data and arguments.data.resolve(), arguments.train_s)
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"parts must be of {list(parts)}, got {sorted(unknown)}")
    parts = {name: parts[name] for name in arguments.parts or list(parts)[:3]}
    names = [step.name for steps in parts.values() for step in steps]
    chosen = [name for name in arguments.only.split(",") if name] or names
    if unknown := set(chosen) - set(names):
        parser.error(f"--only must name steps of {names}, got {sorted(unknown)}")
    import torch

    if not torch.cuda.is_available():
        print(f"gpu-check: no CUDA device (torch {torch.__version__}); nothing to check here")
        return NO_DEVICE
    for folder in (out, ROOT / "runs" / "gpu-check-steps"):
        folder.mkdir(parents=True, exist_ok=True)
    passed = [
        run_part(name, steps, out, arguments.budget_s)
        for name, all_steps in parts.items()
        if (steps := [step for step in all_steps if step.name in chosen])
    ]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Every op on every backend against PyTorch: python -m benchmarks.ops [--device cpu|cuda] [--json F]

Results are checked against float64 before anything is timed, variants are interleaved, and a figure is
the median of its rounds. On a CPU one thread is timed by process CPU time; on a GPU, replays of
a CUDA graph by events. "hot" repeats a call on one set of tensors; "cold" walks through sets that
no cache holds. The floor is a copy of as many bytes as the op must move, timed beside it in the same
state, or the op's floating-point operations at the machine's measured rate, whichever is longer.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.context import context, write_json
from benchmarks.sequences import PLAIN, sequence
from benchmarks.timing import interleave, interleave_graphs, summary
from iddpm_ext import _native
from iddpm_ext.ops.spec import BACKENDS, REGISTRY, Case, OpSpec, unavailable

# "cold" needs more than any cache holds: 32 MB on the CPUs at hand, 60 MB on an H200.
COLD_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}
# The largest allowed error against float64, as a multiple of PyTorch's own at the same dtype.
ERROR_RATIO = 2.0
FLOOR, EAGER, COMPILED, ORIGINAL = "floor", "eager", "compile", "original"


@dataclass(frozen=True)
class Row:
    """One variant of one call. `over_*` say how many times as long PyTorch, or the floor, takes."""

    op: str
    case: str
    what: str
    state: str
    variant: str
    median_us: float
    q25_us: float
    q75_us: float
    bytes: int
    error: float | None
    correct: bool | None
    over_eager: float | None = None
    over_compile: float | None = None
    over_original: float | None = None
    over_floor: float | None = None
    flops_share: float | None = None


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a result or in arguments, in order."""
    if isinstance(value, Tensor):
        return [value]
    items = list(value.values()) if isinstance(value, dict) else value
    return [x for item in items for x in tensors(item)] if isinstance(items, (list, tuple)) else []


def copies(kwargs: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The arguments with tensors of their own, floating ones in `dtype` where one is given."""

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
            return value.detach().to(kind, copy=True)
        return [copy(v) for v in value] if isinstance(value, list) else value

    return {name: copy(value) for name, value in kwargs.items()}


def leaves(spec: OpSpec, kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that the op is differentiable in."""
    return [kwargs[k] for k in spec.differentiable if isinstance(kwargs.get(k), Tensor)]


def runner(
    spec: OpSpec, function: Callable[..., Any], what: str
) -> Callable[[dict[str, Any]], list[Tensor]]:
    """A call of `function`, or the call and the gradients of the sum of its results; returns tensors."""
    if what == "forward":

        def forward(kwargs: dict[str, Any]) -> list[Tensor]:
            with torch.no_grad():
                result = function(**kwargs)
            return tensors(list(kwargs.values()) if result is None else result)

        return forward

    def with_gradient(kwargs: dict[str, Any]) -> list[Tensor]:
        results = [x for x in tensors(function(**kwargs)) if x.requires_grad]
        ones = [torch.ones_like(x) for x in results]
        found = torch.autograd.grad(results, leaves(spec, kwargs), ones)
        return [*(x.detach() for x in results), *found]

    return with_gradient


def functions(spec: OpSpec, case: Case, device: str, compile: bool) -> dict[str, Callable]:
    """Every way to compute the call, ours first."""
    dtype = next(x.dtype for x in tensors(case.kwargs) if x.is_floating_point())

    def bound(backend: str) -> Callable[..., Any]:
        return lambda **kwargs: spec.public(**kwargs, backend=backend)

    found = {
        backend: bound(backend)
        for backend in BACKENDS
        if backend != "reference" and unavailable(spec.name, backend, device, dtype) is None
    }
    # The usual PyTorch code: its own fused function if there is one, else the equation.
    found[EAGER] = PLAIN.get(spec.name, bound("reference"))
    if compile:
        torch.compiler.reset()
        found[COMPILED] = torch.compile(found[EAGER], dynamic=False)
    original = sequence(spec.name, case.kwargs)
    if original is not None:
        found[ORIGINAL] = original
    return found


def error(results: list[Tensor], exact: list[Tensor]) -> float:
    """Largest root-mean-square error of a result over its root mean square."""
    worst = 0.0
    for result, target in zip(results, exact, strict=True):
        if target.is_floating_point() and target.numel():
            size = target.square().mean().sqrt().clamp(min=1e-300)
            worst = max(worst, float((result.double() - target).square().mean().sqrt() / size))
    return worst


def errors(
    spec: OpSpec, case: Case, what: str, calls: dict[str, Callable]
) -> tuple[dict[str, float], dict[str, bool]]:
    """Every variant's error against float64, and whether that is within the bound."""
    exact = runner(spec, calls[EAGER], what)(prepared(spec, case, what, torch.float64))
    found = {}
    for name, function in calls.items():
        found[name] = error(runner(spec, function, what)(prepared(spec, case, what)), exact)
    # Roundings are of the largest value, which is some four times the root mean square.
    allowed = max(ERROR_RATIO * found[EAGER], 4 * spec.roundings * torch.finfo(torch.float32).eps)
    return found, {name: e <= allowed for name, e in found.items()}


def prepared(
    spec: OpSpec, case: Case, what: str, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Fresh arguments; for gradients, with leaves that require them."""
    kwargs = copies(case.kwargs, dtype)
    if what != "forward":
        for leaf in leaves(spec, kwargs):
            leaf.requires_grad_(True)
    return kwargs


def measure(
    spec: OpSpec, case: Case, device: str, rounds: int, compile: bool, peak: float
) -> Iterator[Row]:
    """All rows of one call."""
    calls = functions(spec, case, device, compile)
    if COMPILED in calls:
        try:
            runner(spec, calls[COMPILED], "forward")(prepared(spec, case, "forward"))
        except Exception as error:  # a variant that cannot be compiled is left out
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{spec.name} {case.label}: not compiled: {reason[:150]}", flush=True)
            del calls[COMPILED]
    size = spec.minimum_bytes(case.kwargs)
    flops = spec.flops(case.kwargs)
    for what in ("forward", "forward+gradient") if spec.differentiable else ("forward",):
        found, correct = errors(spec, case, what, calls)
        for state in ("hot", "cold"):
            sets = 1 if state == "hot" else max(2, COLD_BYTES[device] // max(size, 1))
            sets = min(sets, 256)
            times = _times(spec, case, what, calls, device, sets, size, rounds)
            yield from _rows(spec, case, what, state, times, found, correct, size, flops, peak)


def _times(
    spec: OpSpec,
    case: Case,
    what: str,
    calls: dict[str, Callable],
    device: str,
    sets: int,
    size: int,
    rounds: int,
) -> dict[str, list[float]]:
    """Milliseconds per call of every variant, and of the copy that is the floor."""
    arguments = [prepared(spec, case, what) for _ in range(sets)]

    def repeated(function: Callable) -> Callable[[], Any]:
        turn, run = cycle(arguments), runner(spec, function, what)
        return lambda: run(next(turn))

    half = max(size // 8, 1)
    room = torch.ones(sets, 2, half, device=device)  # written, so that its pages exist
    pairs = cycle(room.unbind())

    def copy() -> None:
        target, source = next(pairs)
        target.copy_(source)

    variants: dict[str, Callable[[], Any]] = {FLOOR: copy}
    variants |= {name: repeated(function) for name, function in calls.items()}
    if device == "cuda":
        return interleave_graphs(variants, rounds=rounds, calls=sets)
    clock = "process CPU time" if torch.get_num_threads() == 1 else "wall time"
    return interleave(variants, rounds=rounds, clock=clock)


def _rows(
    spec: OpSpec,
    case: Case,
    what: str,
    state: str,
    times: dict[str, list[float]],
    found: dict[str, float],
    correct: dict[str, bool],
    size: int,
    flops: int | None,
    peak: float,
) -> Iterator[Row]:
    # Gradients take other traffic than the forward pass, which `minimum_bytes` may not count.
    floor = summary(times[FLOOR])["median_ms"]
    busy = None
    if flops and peak and what == "forward":
        busy = flops / peak * 1e3
        floor = max(floor, busy)
    medians = {name: summary(values)["median_ms"] for name, values in times.items()}

    def over(other: str, name: str) -> float | None:
        return medians[other] / medians[name] if other in medians else None

    for name, values in times.items():
        if name == FLOOR:
            continue
        numbers = summary(values)
        yield Row(
            op=spec.name,
            case=case.label,
            what=what,
            state=state,
            variant=name,
            median_us=numbers["median_ms"] * 1e3,
            q25_us=numbers["q25_ms"] * 1e3,
            q75_us=numbers["q75_ms"] * 1e3,
            bytes=size,
            error=found[name],
            correct=correct[name],
            over_eager=over(EAGER, name),
            over_compile=over(COMPILED, name),
            over_original=over(ORIGINAL, name),
            over_floor=medians[name] / floor,
            flops_share=None if busy is None else busy / medians[name],
        )


def multiply_add_rate(device: str) -> float:
    """Floating-point operations a second: of registers on a CPU thread, of bf16 products on a GPU."""
    if device == "cuda":
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        times = interleave_graphs({"product": lambda: a @ a}, rounds=10, calls=4)["product"]
        return 2 * 8192**3 / (min(times) / 1e3)
    if _native.cpu_absence() is not None:
        return 0.0
    best, burst = 0.0, _native.native().multiply_add_burst
    for _ in range(5):
        start = time.process_time()
        done = burst(5_000_000)
        best = max(best, done / (time.process_time() - start))
    return best


def _cases(spec: OpSpec, device: str, quick: bool) -> list[Case]:
    cases = list(spec.benchmark_inputs(device))
    return cases[:1] if quick else cases


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def table(rows: list[Row]) -> str:
    """Rows of our backends as text: times and how many times as long the others take."""
    head = f"{'op, call':62} {'variant':8} {'us':>10} {'eager':>7} {'compile':>7} {'original':>8} "
    lines = [head + f"{'x floor':>7} {'of peak':>7}"]
    for row in rows:
        if row.variant in (EAGER, COMPILED, ORIGINAL):
            continue
        name = f"{row.op} {row.case}, {row.what}, {row.state}"
        flag = "" if row.correct else "  WRONG"
        lines.append(
            f"{name:62} {row.variant:8} {row.median_us:10.1f} {_number(row.over_eager, '7.2f'):>7} "
            f"{_number(row.over_compile, '7.2f'):>7} {_number(row.over_original, '8.1f'):>8} "
            f"{_number(row.over_floor, '7.2f'):>7} {_number(row.flops_share, '7.0%'):>7}{flag}"
        )
    return "\n".join(lines)


def main() -> int:
    """Measures, prints the table, writes JSON; 1 if a result of ours was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--ops", default="", help="names separated by commas; all by default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help="the first call of each op alone")
    parser.add_argument(
        "--budget-s", type=float, help="start no further call after so many seconds"
    )
    parser.add_argument("--json", type=Path, help="where to write the rows")
    args = parser.parse_args()
    wanted = [name for name in args.ops.split(",") if name] or list(REGISTRY)
    if unknown := set(wanted) - set(REGISTRY):
        parser.error(f"--ops must name ops of {', '.join(REGISTRY)}, got {sorted(unknown)}")
    torch.set_num_threads(args.threads)
    start, rows, left_out = time.monotonic(), [], 0
    peak = multiply_add_rate(args.device) * (args.threads if args.device == "cpu" else 1)
    print(f"multiply-add rate {peak / 1e9:.0f} GFLOP/s, load {os.getloadavg()[0]:.1f}", flush=True)
    for name in wanted:
        for case in _cases(REGISTRY[name], args.device, args.quick):
            if args.budget_s is not None and time.monotonic() - start > args.budget_s:
                left_out += 1
                continue
            found = list(
                measure(
                    REGISTRY[name],
                    case,
                    args.device,
                    args.rounds,
                    not args.no_compile,
                    peak,
                )
            )
            rows += found
            print(table(found).split("\n", 1)[1], flush=True)
            if args.json:
                record = {
                    **context("benchmarks.ops", ("torch", "triton")),
                    "multiply_add_flops": peak,
                }
                write_json(args.json, {**record, "rows": [asdict(row) for row in rows]})
    print(table(rows))
    if left_out:
        print(f"{left_out} calls were left out: --budget-s {args.budget_s:g}")
    wrong = [r for r in rows if not r.correct and r.variant in BACKENDS]
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

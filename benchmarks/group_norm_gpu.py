"""GroupNorm + SiLU on a GPU, backend against backend: python -m benchmarks.group_norm_gpu [--json F]

Every call is checked first: against float64, against itself, and against the same image alone in its batch.
Then graphs of calls are timed, interleaved, on the normalised maps of the CIFAR-10 network in channels_last.
"hot" repeats a call on one set of tensors; "cold" walks through sets that no cache holds, and keeps every
result. "x copy" is the time over that of a copy of as many bytes as the call must move, timed beside it in
the same state: 2 images in the forward pass, 3 in the backward pass.

The parts, in order of value, stop at --budget-s:
    forward, backward   ours, Triton's and PyTorch's
    extras              scale-shift, sums, float32, NCHW
    compile             torch.compile on a few shapes
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.context import context, write_json
from benchmarks.timing import interleave_graphs, spread
from iddpm_ext.ops import group_norm_silu as public
from iddpm_ext.ops.spec import unavailable

# Four times an H200's L2 cache.
COLD_BYTES = 240 << 20
DEVICE = "cuda"
MAPS = ((128, 32), (256, 32), (384, 32), (256, 16), (512, 16), (256, 8), (512, 8), (256, 4))
BATCHES = (128, 1, 16)
GROUPS = 32
OURS = ("cuda", "triton")
EAGER, COMPILED, COPY = "eager", "compile", "copy"
PARTS = ("forward", "backward", "extras", "compile")


@dataclass(frozen=True)
class Call:
    """One call: N x C x H x H, and what is asked of it."""

    n: int
    c: int
    size: int
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = True
    modulated: bool = False
    sums: bool = False

    @property
    def label(self) -> str:
        extras = [str(self.dtype)[6:], "NHWC" if self.channels_last else "NCHW"]
        extras += ["scale-shift"] * self.modulated + ["sums"] * self.sums
        return f"{self.n}x{self.c}x{self.size}x{self.size} {' '.join(extras)}"

    @property
    def image_bytes(self) -> int:
        return self.n * self.c * self.size**2 * self.dtype.itemsize

    def bytes(self, what: str) -> int:
        """The bytes to move: images in and out once."""
        images = 3 if what == "backward" else 2
        return (images + (2 if what == "forward" else 1) * self.sums) * self.image_bytes


@dataclass(frozen=True)
class Row:
    """One variant of one call."""

    call: str
    what: str
    state: str
    variant: str
    median_us: float
    p10_us: float
    p90_us: float
    bytes: int
    copy_us: float
    times_copy: float
    error: float | None
    correct: bool | None


def arguments(call: Call, seed: int = 0, n: int | None = None) -> dict[str, Any]:
    """Random tensors; the first image does not depend on the batch."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    layout = torch.channels_last if call.channels_last else torch.contiguous_format

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype)

    def images() -> Tensor:
        drawn = normal(call.n, call.c, call.size, call.size, dtype=call.dtype)
        return drawn[:n].contiguous(memory_format=layout)

    found: dict[str, Any] = {"x": images(), "num_groups": GROUPS}
    found |= {"weight": 1 + 0.3 * normal(call.c), "bias": normal(call.c)}
    if call.modulated:
        found |= {"scale": (0.5 * normal(call.n, call.c))[:n], "shift": normal(call.n, call.c)[:n]}
    if call.sums:
        found |= {"residual": images(), "channel_bias": normal(call.n, call.c)[:n]}
        found["return_sum"] = True
    return found


def plain(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    channel_bias: Tensor | None = None,
    return_sum: bool = False,
) -> Any:
    """What people write in PyTorch, in x's dtype."""

    def rows(value: Tensor) -> Tensor:
        return value.to(x.dtype)[:, :, None, None]

    if residual is not None and channel_bias is not None:
        x = x + residual + rows(channel_bias)
    y = F.group_norm(x, num_groups, weight.to(x.dtype), bias.to(x.dtype))
    if scale is not None and shift is not None:
        y = y * (1 + rows(scale)) + rows(shift)
    return (F.silu(y), x) if return_sum else F.silu(y)


def forward(backend: str) -> Callable[..., Any]:
    """The op on one backend."""
    return lambda **kwargs: public(**kwargs, backend=backend)


def with_gradient(function: Callable[..., Any], kwargs: dict[str, Any], dy: Tensor) -> list[Tensor]:
    """Gradients of every tensor argument."""
    leaves = [v for v in kwargs.values() if isinstance(v, Tensor)]
    y = function(**kwargs)
    results = list(y) if isinstance(y, tuple) else [y]
    return list(torch.autograd.grad(results, leaves, [dy] * len(results)))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def function_of(name: str, compiled: dict[str, Callable]) -> Callable[..., Any]:
    """The function of a variant; compiled ones are kept in `compiled`."""
    if name == COMPILED:
        return compiled.setdefault(COMPILED, torch.compile(plain, dynamic=False))
    return plain if name == EAGER else forward(name)


def results(
    call: Call, what: str, variant: str, kwargs: dict[str, Any], dy: Tensor, compiled: dict
) -> list[Tensor]:
    """All results of a variant."""
    function = function_of(variant, compiled)
    if what == "forward":
        with torch.no_grad():
            y = function(**kwargs)
        return list(y) if isinstance(y, tuple) else [y]
    leaves = {
        k: v.detach().requires_grad_(True) if isinstance(v, Tensor) else v
        for k, v in kwargs.items()
    }
    return with_gradient(function, leaves, dy)


def relative(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest ||found - exact|| / ||exact|| of the results."""
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    return max(e if e == e else float("inf") for e in errors)


def check(
    call: Call, what: str, variants: list[str], compiled: dict
) -> dict[str, tuple[float, bool, str]]:
    """Error, whether that is as good as PyTorch's at the dtype, and what else is wrong."""
    kwargs, generator = arguments(call), torch.Generator(DEVICE).manual_seed(7)
    dy = torch.empty_like(kwargs["x"]).normal_(generator=generator)
    in_double = {k: v.double() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    exact = results(call, what, EAGER, in_double, dy.double(), {})
    rounded = [e.to(call.dtype) if e.dim() == 4 else e.float() for e in exact]
    # The sum is rounded before it is normalised, which is one rounding more.
    allowed = (2.0 if call.sums else 1.25) * relative(rounded, exact) + 4e-6
    found: dict[str, tuple[float, bool, str]] = {}
    for variant in variants:
        with poisoned() if variant in OURS else contextlib.nullcontext():
            mine = results(call, what, variant, kwargs, dy, compiled)
        error, note = relative(mine, exact), ""
        if variant in OURS:
            again = results(call, what, variant, kwargs, dy, compiled)
            if not all(torch.equal(a, b) for a, b in zip(mine, again, strict=True)):
                note = "not repeatable"
            if call.n > 1:
                single = replace(call, n=1)
                alone = {
                    k: v[:1]
                    if isinstance(v, Tensor) and v.shape[0] == call.n and v.dim() > 1
                    else v
                    for k, v in kwargs.items()
                }
                one = results(single, what, variant, alone, dy[:1], compiled)
                same = [
                    torch.equal(a[:1], b) for a, b in zip(mine, one, strict=True) if a.dim() > 1
                ]
                if not all(same):
                    note = "depends on the batch"
        found[variant] = (error, error <= allowed and not note, note)
    return found


def timed(
    call: Call, what: str, state: str, variants: list[str], rounds: int, compiled: dict
) -> dict[str, list[float]]:
    """Milliseconds per call of every variant and of the copy."""
    moved = call.bytes(what)
    sets = 1 if state == "hot" else max(2, min(COLD_BYTES // moved, 256))
    inputs = [arguments(call, seed) for seed in range(sets)]
    gradients = [torch.randn_like(kwargs["x"]) for kwargs in inputs]

    def repeated(variant: str) -> Callable[[], Any]:
        function, turn = function_of(variant, compiled), cycle(range(sets))
        kept: list[Any] = [None] * sets
        if what == "backward" and variant in OURS:
            saved = [_saved(variant, kwargs) for kwargs in inputs]

        def run() -> None:
            i = next(turn)
            if what == "forward":
                with torch.no_grad():
                    kept[i] = function(**inputs[i])
            elif variant in OURS:
                kept[i] = _backward(variant, inputs[i], saved[i], gradients[i])
            else:
                leaves = {
                    k: v.detach().requires_grad_(True) if isinstance(v, Tensor) else v
                    for k, v in inputs[i].items()
                }
                kept[i] = with_gradient(function, leaves, gradients[i])

        return run

    room = torch.ones(sets, 2, moved // 2, device=DEVICE, dtype=torch.uint8)
    pairs = cycle(room.unbind())

    def copy() -> None:
        target, source = next(pairs)
        target.copy_(source)

    calls: dict[str, Callable[[], Any]] = {COPY: copy}
    calls |= {variant: repeated(variant) for variant in variants}
    return interleave_graphs(calls, rounds=rounds, calls=sets, milliseconds=1.0)


def _saved(backend: str, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    # What the forward pass saves for the backward pass: normalised tensor, mean and 1 / deviation.
    call = {"scale": None, "shift": None, "residual": None, "channel_bias": None, **kwargs}
    with torch.no_grad():
        _, total, mean, rstd = torch.ops.iddpm_ext.group_norm_silu(
            call["x"], None, call["residual"], call["channel_bias"], call["weight"], call["bias"],
            call["scale"], call["shift"], GROUPS, 1e-5, True, "residual" in kwargs, backend,
        )  # fmt: skip
    return (total if "residual" in kwargs else call["x"], mean, rstd)


def _backward(
    backend: str, kwargs: dict[str, Any], saved: tuple[Tensor, ...], dy: Tensor
) -> tuple[Tensor, ...]:
    x, mean, rstd = saved
    sums = "residual" in kwargs
    with torch.no_grad():
        found: tuple[Tensor, ...] = torch.ops.iddpm_ext.group_norm_silu_bwd(
            dy, dy if sums else None, x, None, None, kwargs["weight"], kwargs["bias"],
            kwargs.get("scale"), kwargs.get("shift"), mean, rstd, True, sums, backend,
        )  # fmt: skip
    return found


def measure(
    call: Call, what: str, states: tuple[str, ...], variants: list[str], rounds: int, compiled: dict
) -> Iterator[Row]:
    """All rows of one call; PyTorch's backward pass is that of both passes less the forward pass."""
    if COMPILED in variants:
        torch.compiler.reset()
    compiled.clear()
    checked = check(call, what, variants, compiled)
    for state in states:
        times = timed(call, what, state, variants, rounds, compiled)
        others = [v for v in variants if v in (EAGER, COMPILED)]
        first = (
            timed(call, "forward", state, others, rounds, compiled) if what == "backward" else {}
        )
        copy_us = spread(times[COPY])["median_ms"] * 1e3
        for variant in variants:
            numbers = {k: v * 1e3 for k, v in spread(times[variant]).items()}
            if variant in first:
                before = spread(first[variant])["median_ms"] * 1e3
                numbers = {k: v - before for k, v in numbers.items()}
            error, correct, note = checked[variant]
            yield Row(
                call=call.label,
                what=what,
                state=state,
                variant=variant,
                median_us=numbers["median_ms"],
                p10_us=numbers["p10_ms"],
                p90_us=numbers["p90_ms"],
                bytes=call.bytes(what),
                copy_us=copy_us,
                times_copy=numbers["median_ms"] / copy_us,
                error=error,
                correct=correct if variant in OURS else None,
            )
            if note or (variant in OURS and not correct):
                print(f"{call.label} {what} {variant}: WRONG {note} error {error:.2e}", flush=True)


def jobs(parts: list[str], quick: bool) -> Iterator[tuple[Call, str, tuple[str, ...], list[str]]]:
    """(call, pass, states, variants), most valuable first."""
    maps = MAPS[:1] if quick else MAPS
    batches = BATCHES[:2] if quick else BATCHES
    calls = [Call(n, c, size) for n in batches for c, size in maps]

    def states(call: Call) -> tuple[str, ...]:
        return ("hot",) if call.n == 1 else ("cold",) if call.n > 16 else ("hot", "cold")

    for what in ("forward", "backward"):
        if what in parts:
            for call in calls:
                yield call, what, states(call), [*OURS, EAGER]
    if "extras" in parts:
        for what in ("forward", "backward"):
            for n in batches[:2]:
                call = Call(n, 256, 16)
                for change in (
                    {"modulated": True},
                    {"sums": True},
                    {"dtype": torch.float32},
                    {"channels_last": False},
                    {"channels_last": False, "dtype": torch.float32},
                ):
                    found = replace(call, **change)  # type: ignore[arg-type]
                    yield found, what, states(found), [*OURS, EAGER]
    if "compile" in parts:
        for call in (Call(128, 128, 32), Call(1, 128, 32), Call(128, 256, 16)):
            for what in ("forward", "backward"):
                yield call, what, states(call), ["cuda", EAGER, COMPILED]


def line(row: Row) -> str:
    """A row as text; "one-way" is over the time in which one image would be read or written."""
    flag = "  WRONG" if row.correct is False else ""
    one_way = f"{2 * row.times_copy * 1.5:6.2f} one-way" if row.what == "backward" else ""
    return (
        f"{row.call:36} {row.what:8} {row.state:4} {row.variant:8} {row.median_us:8.2f} us "
        f"{row.times_copy:6.2f} x copy {one_way} {row.error or 0:.1e}{flag}"
    )


def main() -> int:
    """Checks, measures, prints and writes; 1 if a result of ours was wrong, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--budget-s", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="one map alone")
    parser.add_argument("--check-only", action="store_true", help="time nothing")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts must be of {', '.join(PARTS)}, got {sorted(unknown)}")
    if not torch.cuda.is_available():
        print(f"group_norm_gpu: no CUDA device (torch {torch.__version__})", file=sys.stderr)
        return 2
    for backend in OURS:
        if reason := unavailable("group_norm_silu", backend, "cuda", torch.bfloat16):
            parser.error(f"backend {backend}: {reason}")
    start, left_out, wrong = time.monotonic(), 0, 0
    rows: list[Row] = []
    record = context("benchmarks.group_norm_gpu", ("torch", "triton"))
    compiled: dict[str, Callable] = {}
    for call, what, states, variants in jobs(parts, args.quick):
        if time.monotonic() - start > args.budget_s:
            left_out += 1
            continue
        if args.check_only:
            for variant, (error, correct, note) in check(call, what, variants, compiled).items():
                wrong += variant in OURS and not correct
                print(f"{call.label} {what} {variant}: {error:.1e} {correct} {note}", flush=True)
            continue
        found = list(measure(call, what, states, variants, args.rounds, compiled))
        wrong += sum(row.correct is False for row in found)
        rows += found
        print("\n".join(map(line, found)), flush=True)
        if args.json:
            write_json(args.json, {**record, "rows": [asdict(row) for row in rows]})
    print(f"{time.monotonic() - start:.0f} s, {wrong} wrong, {left_out} calls left out")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

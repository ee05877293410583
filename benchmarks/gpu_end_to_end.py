"""The network, 50-step sampling and the training step on a GPU, against PyTorch eager and torch.compile.

    python -m benchmarks.end_to_end --device cuda --json runs/cifar.json

Everything in one dtype and one process, variants interleaved, between CUDA events; median, tenth and
ninetieth percentile. The time in which kernels run is listed beside it; a difference is waiting for the host.
"ours tuned" is captured with `torch.backends.cudnn.benchmark`, as a user may set it.
"compile reduce-overhead" is torch.compile with CUDA graphs, the baseline to beat. The baselines keep their
weights in that dtype when sampling, and are trained under autocast, with PyTorch's fused optimiser. Rows are
printed and written as they are measured, the most important first; after `--budget-s` seconds no new one is
begun, and missing ones have the reason.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import iddpm_ext
from benchmarks import peers, training
from benchmarks.context import context, write_json
from benchmarks.kernel_times import kernel_ms
from benchmarks.networks import make_inputs, make_network
from benchmarks.original import Trainer, original_network
from benchmarks.time_box import time_box
from benchmarks.timing import interleave_on_device, spread
from iddpm_ext.engines.cuda.engine import CUDAEngine
from iddpm_ext.networks.unet import UNet

WHATS = ("forward", "sampling", "training")
OURS, TUNED = "ours", "ours tuned"
MODES = {
    "compile reduce-overhead": "reduce-overhead",
    "compile": None,
    "compile max-autotune": "max-autotune",
}
VARIANTS = (OURS, *list(MODES)[:1], "eager NHWC", "eager", *list(MODES)[1:], TUNED)
BATCHES = (128, 1, 64, 16, 256)  # the most important first
TRAINED = (128,)
STEPS = 50
TIMES = (37.0, 500.0, 999.0)  # where errors are measured; the middle one is timed
EXACT = 4  # images that are compared with float64

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """Measurements that share their networks."""

    config: str
    batch: int
    whats: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """A way to evaluate the network: at a timestep of TIMES by its index, and in a whole chain."""

    at: Callable[[Tensor, int], Tensor]
    draw: Callable[[], Tensor]


class Budget:
    """Seconds until nothing new is begun."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.seconds = seconds

    def left(self) -> float:
        return self._end - time.monotonic()


def plan(
    configs: list[str], batches: list[int], whats: list[str], trained: list[int]
) -> list[Cell]:
    """The cells in the order of measurement: sampling of a batch, then training with it."""
    cells = []
    for config in configs:
        for batch in batches:
            drawn = tuple(what for what in WHATS[:2] if what in whats)
            if drawn:
                cells.append(Cell(config, batch, drawn))
            if "training" in whats and batch in trained:
                cells.append(Cell(config, batch, ("training",)))
    return cells


def build_network(name: str, model: UNet, x: Tensor, dtype: torch.dtype, steps: int) -> Variant:
    """One variant for sampling; ours raises NotSupported where it cannot run."""
    common: dict[str, Any] = {
        "steps": steps, "n": len(x), "batch_size": len(x), "progress": False,
    }  # fmt: skip
    times = [torch.full((len(x),), moment, device=x.device) for moment in TIMES]
    if name in (OURS, TUNED):
        engine = CUDAEngine(model, dtype=dtype)
        engine.begin(torch.tensor(TIMES, device=x.device))
        with searching(name == TUNED), torch.no_grad():
            engine(x, 1)
        return Variant(engine, lambda: iddpm_ext.sample(model, dtype=dtype, **common))
    network = peers.plain(model).to(dtype)
    if name != "eager":
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    call = peers.labelled(network, None)
    if name in MODES:
        own = f"{name}{len(x)}".title().translate({ord(c): None for c in " -"})
        call = peers.compiled(network, None, own, False, MODES[name])
    foreign = {**common, "diffusion": model.diffusion, "image_shape": tuple(x.shape[1:])}
    # The original's operations around the plain module, our fused step around compiled ones.
    backend = "auto" if name in MODES else "reference"

    def chain() -> Tensor:
        return iddpm_ext.sample(call, backend=backend, x_T=x, **foreign)

    return Variant(lambda x, i: call(x, times[i]), chain)


@contextmanager
def searching(on: bool) -> Iterator[None]:
    """A context in which cuDNN benchmarks convolutions, if `on`; captured graphs keep its choice."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def build_trainer(name: str, model: UNet, x_0: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    """A training step on x_0."""
    if name in (OURS, TUNED):
        step = training.our_variant(model, x_0, dtype).step
        with searching(name == TUNED):
            step(x_0)
        return lambda: step(x_0)
    assert model.diffusion is not None
    network: nn.Module = original_network(model).requires_grad_()
    if name in MODES:
        own = f"Train{name}".title().translate({ord(c): None for c in " -"})
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        network = training.compiled(network, own, MODES[name])  # type: ignore[arg-type]
    last = name != "eager"
    trainer = Trainer(network, model.diffusion, dtype, best=last, channels_last=last)
    return lambda: trainer.step(x_0)


def built(
    names: list[str], build: Callable[[str], Any], budget: Budget, limit_s: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """The variants that could be built and run once, by name, and the reasons for the others."""
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name in names:
        seconds = int(min(limit_s, budget.left()))
        if seconds < 1:
            missing[name] = f"not begun within {budget.seconds:g} s"
            continue
        print(f"  building {name}", file=sys.stderr, flush=True)
        began = time.monotonic()
        try:
            with time_box(seconds):
                found[name] = build(name)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if time.monotonic() - began >= seconds:  # compilers report the alarm in their own words
                reason = f"not built within {seconds} s"
            missing[name] = reason
            print(f"  {name} is missing: {reason}", file=sys.stderr, flush=True)
    return found, missing


def errors(variants: dict[str, Variant], model: UNet, x: Tensor) -> dict[str, float]:
    """Largest difference from float64 over largest output, the worst at TIMES, of the first images."""
    exact = peers.plain(model).double()
    some, found = x[:EXACT], dict.fromkeys(variants, 0.0)
    for i, moment in enumerate(TIMES):
        truth = exact(some.double(), torch.full((len(some),), moment, device=x.device).double())
        for name, variant in variants.items():
            gap = (variant.at(x, i)[: len(some)].double() - truth).abs().max() / truth.abs().max()
            found[name] = max(found[name], gap.item())
    return found


def measure(cell: Cell, args: argparse.Namespace, device: str, budget: Budget) -> Iterator[Row]:
    """The rows of a cell."""
    dtype = getattr(torch, args.dtype)
    model = make_network(cell.config).to(device)
    x = make_inputs(model, cell.batch)[0].to(device)
    head: Row = {"config": cell.config, "batch": cell.batch, "dtype": args.dtype}
    calls: dict[str, dict[str, Callable[[], Any]]]
    gaps: dict[str, float] = {}
    if cell.whats == ("training",):
        x_0 = x.clamp(-1, 1)

        def trainer(name: str) -> Callable[[], Any]:
            step = build_trainer(name, model, x_0, dtype)
            step()
            return step

        steps, missing = built(args.variants, trainer, budget, args.build_seconds)
        calls = {"training": steps}
    else:

        def network(name: str) -> Variant:
            variant = build_network(name, model, x, dtype, args.steps)
            with torch.no_grad():
                variant.at(x, 1)
            return variant

        with torch.no_grad():
            variants, missing = built(args.variants, network, budget, args.build_seconds)
            gaps = errors(variants, model, x)
        calls = {
            "forward": {name: lambda v=v: v.at(x, 1) for name, v in variants.items()},
            "sampling": {name: v.draw for name, v in variants.items()},
        }
    for what in cell.whats:
        yield from ({**head, "what": what, "name": n, "missing": why} for n, why in missing.items())
        if not calls[what]:
            continue
        with torch.set_grad_enabled(what == "training"):
            whole = what == "sampling"
            times = interleave_on_device(
                calls[what],
                device=device,
                rounds=max(3, args.rounds // 3) if whole else args.rounds,
                # Steps follow one another as in a run, where the host is ahead of the device.
                milliseconds={"sampling": 1.0, "forward": 20.0, "training": 120.0}[what],
                warm_ups=1 if whole else 3,
            )
            # A chain has the forward pass's kernels, and a profile of all its launches takes long.
            profiled = {} if whole or device == "cpu" else calls[what]
            busy = {name: kernel_ms(call) for name, call in profiled.items()}
        yield from rows(head, what, times, gaps, busy)


def rows(
    head: Row,
    what: str,
    times: dict[str, list[float]],
    gaps: dict[str, float],
    busy: dict[str, float],
) -> Iterator[Row]:
    """What was measured, with how many times as long as ours it takes."""
    ours = spread(times[OURS])["median_ms"] if OURS in times else None
    for name, values in times.items():
        numbers = spread(values)
        row = {**head, "what": what, "name": name, **numbers, "rounds": len(values)}
        row["images_per_s"] = head["batch"] / numbers["median_ms"] * 1e3
        row["ours_is_faster_by"] = None if ours is None else numbers["median_ms"] / ours
        if name in busy:
            row["kernel_ms"] = busy[name]
        if what == "forward" and name in gaps:
            row["error"] = gaps[name]
        yield row


def line(row: Row) -> str:
    """A row as text."""
    head = f"{row['config']:10} B{row['batch']:<3} {row['what']:8} {row['name']:23} "
    if "missing" in row:
        return f"{head} missing: {row['missing']}"
    ratio, error, busy = row["ours_is_faster_by"], row.get("error"), row.get("kernel_ms")
    return (
        f"{head}{row['median_ms']:9.2f} ms [{row['p10_ms']:.2f}, {row['p90_ms']:.2f}] "
        f"{row['images_per_s']:9.1f} images/s"
        + ("" if busy is None else f"  kernels {busy:7.2f} ms")
        + ("" if ratio is None else f" {ratio:6.2f}x")
        + ("" if error is None else f"  error {error:.1e}")
    )


def table(found: list[Row]) -> str:
    """All rows as text, those of one measurement together."""
    keys = list(dict.fromkeys((r["config"], r["batch"], r["what"]) for r in found))
    blocks = [
        "\n".join(line(r) for r in found if (r["config"], r["batch"], r["what"]) == key)
        for key in keys
    ]
    return "\n\n".join(blocks)


def _listed(
    kind: Callable[[str], Any], allowed: tuple[str, ...] = ()
) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        items = [kind(item) for item in text.split(",") if item]
        if allowed and (unknown := [item for item in items if item not in allowed]):
            raise argparse.ArgumentTypeError(f"must be of {', '.join(allowed)}, got {unknown}")
        return items

    return parse


def parser() -> argparse.ArgumentParser:
    """The command line's."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--device", choices=["cuda"], default="cuda")
    found.add_argument(
        "--configs", type=_listed(str, ("small", "cifar", "imagenet64")), default=["cifar"]
    )
    found.add_argument("--batches", type=_listed(int), default=list(BATCHES))
    found.add_argument("--training-batches", type=_listed(int), default=list(TRAINED))
    found.add_argument("--what", type=_listed(str, WHATS), default=list(WHATS))
    found.add_argument("--variants", type=_listed(str, VARIANTS), default=list(VARIANTS[:-2]))
    found.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    found.add_argument("--rounds", type=int, default=30)
    found.add_argument("--steps", type=int, default=STEPS, help="of the timed chain")
    found.add_argument("--build-seconds", type=int, default=240, help="for each variant")
    found.add_argument("--budget-s", type=float, default=float("inf"))
    found.add_argument("--json", type=Path, help="where to write the rows")
    return found


def run(args: argparse.Namespace, device: str) -> list[Row]:
    """Measures what the arguments ask for; prints and writes rows as they are found."""
    budget, found = Budget(args.budget_s), list[Row]()
    head = context("benchmarks.end_to_end", ("torch", "triton"))
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        head["gpu_memory_gib"] = properties.total_memory / 2**30
        head["cuda"], head["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    for cell in plan(args.configs, args.batches, args.what, args.training_batches):
        for row in measure(cell, args, device, budget):
            found.append(row)
            print(line(row), flush=True)
            if args.json:
                write_json(args.json, {**head, "rows": found})
        if device == "cuda":
            torch.cuda.empty_cache()
    print(f"\n{table(found)}")
    return found


def main(arguments: list[str]) -> int:
    """Run what the command line asks for; 2 without a GPU."""
    args = parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"end_to_end: no CUDA device (torch {torch.__version__})", file=sys.stderr)
        return 2
    run(args, args.device)
    return 0

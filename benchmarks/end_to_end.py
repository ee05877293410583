"""The network and the sampler against other runtimes: python -m benchmarks.end_to_end --device cpu

One process, variants interleaved; one thread is timed by process CPU time, which other load on the
machine hardly affects, more threads by wall time. `engine` takes its embedding projections from the
schedule's table, as in sampling; `engine, any t` computes them at every call, like all peers. A peer
that is not installed, does not support the network or takes longer than `--build-seconds` to build
(torch.compile takes minutes) is reported with the reason.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import iddpm_ext
from benchmarks.context import context, write_json
from benchmarks.networks import make_inputs, make_network
from benchmarks.peers import PEERS, Peer
from benchmarks.time_box import time_box
from benchmarks.timing import interleave, summary
from iddpm_ext.engines.cpu.engine import CPUEngine, NotSupported
from iddpm_ext.networks.unet import UNet

TIMES = (37.0, 500.0, 999.0)  # where errors are measured; the middle one is timed
PACKAGES = ("torch", "onnxruntime", "openvino", "diffusers")
OURS = ("engine", "engine exact", "engine, any t", "engine bf16")
_PER_CALL, _TABLE = "computed at every call", "from the schedule's table"


def build_ours(model: UNet, x: Tensor, labels: Tensor | None, threads: int, name: str) -> Peer:
    """The engine in one of its variants."""
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    engine = CPUEngine(model, len(x), dtype=dtype, exact="exact" in name, num_threads=threads)
    if "any t" in name:
        return lambda x, t: engine.at(x, t, labels)
    engine.begin(torch.tensor(TIMES), labels)
    return lambda x, t: engine(x, TIMES.index(float(t[0])))


def build(
    model: UNet, x: Tensor, labels: Tensor | None, threads: int, names: list[str], seconds: int
) -> tuple[dict[str, Peer], dict[str, str]]:
    """Callables (x, timesteps) by name, and the reasons why others are missing."""
    calls: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    for name in (*OURS, *names):
        print(f"  building {name}", file=sys.stderr, flush=True)
        began = time.monotonic()
        try:
            with time_box(seconds):
                if name in OURS:
                    calls[name] = build_ours(model, x, labels, threads, name)
                else:
                    calls[name] = PEERS[name](model, x, labels, threads)
                calls[name](x, torch.full((len(x),), TIMES[1]))
        except Exception as error:
            if name in OURS and not isinstance(error, NotSupported):
                raise
            calls.pop(name, None)
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if time.monotonic() - began >= seconds:  # compilers report the alarm in their own words
                reason = f"not built within {seconds} s"
            missing[name] = reason
            print(f"  {name} is missing: {missing[name]}", file=sys.stderr, flush=True)
    return calls, missing


def errors(
    calls: dict[str, Peer], model: UNet, x: Tensor, labels: Tensor | None
) -> dict[str, list[float]]:
    """Largest difference from float64 over largest output, at each of TIMES."""
    exact = copy.deepcopy(model).double()
    gaps: dict[str, list[float]] = {name: [] for name in calls if name != "diffusers"}
    for moment in TIMES:
        t = torch.full((len(x),), moment)
        truth = exact(x.double(), t.double(), labels)
        for name, measured in gaps.items():  # the weights of diffusers' network are its own
            gap = (calls[name](x, t).double() - truth).abs().max() / truth.abs().max()
            measured.append(gap.item())
    return gaps


def forward_variants(calls: dict[str, Peer], x: Tensor) -> dict[str, Callable[[], Any]]:
    """One evaluation of the network."""
    t = torch.full((len(x),), TIMES[1])
    return {name: lambda c=call: c(x, t) for name, call in calls.items()}


def step_variants(
    calls: dict[str, Peer], model: UNet, labels: Tensor | None, batch: int, steps: int
) -> dict[str, Callable[[], Any]]:
    """An ancestral chain of few steps: by the engine, in plain PyTorch, and with a peer's network."""
    c = model.config
    common: dict[str, Any] = {"steps": steps, "n": batch, "batch_size": batch, "progress": False}
    shape = (c.in_channels, c.image_size, c.image_size)
    plain = {**common, "labels": labels, "engine": False, "backend": "reference"}
    variants: dict[str, Callable[[], Any]] = {
        "engine": lambda: iddpm_ext.sample(model, labels=labels, **common),
        "engine bf16": lambda: iddpm_ext.sample(
            model, labels=labels, dtype=torch.bfloat16, **common
        ),
        "eager": lambda: iddpm_ext.sample(model, **plain),
    }
    if "engine bf16" not in calls:
        del variants["engine bf16"]
    for name, call in calls.items():
        if name in variants or name in OURS:
            continue
        foreign = {**common, "diffusion": model.diffusion, "image_shape": shape}
        variants[name] = lambda f=call, k=foreign: iddpm_ext.sample(
            lambda x, t: f(x, t.float().contiguous()), **k
        )
    return variants


def measure(args: argparse.Namespace, config: str, batch: int, threads: int) -> list[dict]:
    """All rows of one configuration, batch size and number of threads."""
    torch.set_num_threads(threads)
    model = make_network(config)
    x, labels = make_inputs(model, batch)
    calls, missing = build(model, x, labels, threads, args.peers, args.build_seconds)
    clock = "process CPU time" if threads == 1 else "wall time"
    gaps = errors(calls, model, x, labels)
    head = {"config": config, "batch": batch, "threads": threads, "clock": clock}
    rows = [{**head, "what": "forward", "name": n, "missing": why} for n, why in missing.items()]
    timings = {"forward": interleave(forward_variants(calls, x), rounds=args.rounds, clock=clock)}
    if args.steps:
        chains = step_variants(calls, model, labels, batch, args.steps)
        rounds = max(3, args.rounds // 3)
        whole = interleave(chains, rounds=rounds, clock=clock)
        timings["sampling step"] = {k: [t / args.steps for t in v] for k, v in whole.items()}
    for what, times in timings.items():
        ours = summary(times["engine"])["median_ms"]
        for name, values in times.items():
            numbers = summary(values)
            row = {**head, "what": what, "name": name, **numbers, "rounds": len(values)}
            row["engine_is_faster_by"] = numbers["median_ms"] / ours
            from_table = name in OURS and "any t" not in name
            row["embedding"] = _TABLE if from_table else _PER_CALL
            if what == "forward" and name in gaps:
                row["error"] = max(gaps[name])
                row["error_by_t"] = dict(zip(map(str, TIMES), gaps[name], strict=True))
            rows.append(row)
            print(_line(row), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    error = row.get("error")
    return (
        f"{row['config']:8} B{row['batch']:<3} {row['threads']}T {row['what']:13} {row['name']:16} "
        f"{row['median_ms']:9.2f} ms [{row['q25_ms']:.2f}, {row['q75_ms']:.2f}] "
        f"{row['engine_is_faster_by']:6.2f}x" + ("" if error is None else f"  error {error:.1e}")
    )


def _listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(item) for item in text.split(",") if item]


def main() -> None:
    """Run what the command line asks for."""
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", default="cpu")
    if device.parse_known_args()[0].device == "cuda":
        from benchmarks import gpu_end_to_end

        raise SystemExit(gpu_end_to_end.main(sys.argv[1:]))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda has options of its own"
    )
    parser.add_argument("--configs", type=_listed(str), default=["bundled", "small", "cifar"])
    parser.add_argument("--batches", type=_listed(int), default=[1, 8, 16])
    parser.add_argument("--threads", type=_listed(int), default=[1])
    parser.add_argument("--peers", type=_listed(str), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="of the timed chain; 0: none")
    parser.add_argument("--build-seconds", type=int, default=600, help="for each peer")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    rows = []
    with torch.no_grad():
        for config in args.configs:
            for batch in args.batches:
                for threads in args.threads:
                    rows += measure(args, config, batch, threads)
                    if args.output:
                        head = context("benchmarks.end_to_end", PACKAGES)
                        write_json(args.output, {**head, "rows": rows})


if __name__ == "__main__":
    main()

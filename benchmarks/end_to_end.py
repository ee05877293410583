"""The network and the sampler against other runtimes: python -m benchmarks.end_to_end --device cpu

One process, variants interleaved; one thread is timed by process CPU time, which other load on the
machine hardly moves, more threads by wall time. `engine` takes its embedding projections from the
schedule's table, as in sampling; `engine, any t` computes them at every call, as all peers do.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import iddpm_ext
from benchmarks.context import context
from benchmarks.networks import CONFIGS, make_inputs, make_network
from benchmarks.peers import PEERS, Peer
from benchmarks.timing import interleave, summary
from iddpm_ext.sampling.cpu_engine import CPUEngine
from iddpm_ext.unet import UNet

TIMES = (37.0, 500.0, 999.0)  # where errors are measured; the middle one is timed
PACKAGES = ("torch", "onnxruntime", "openvino", "diffusers")
OURS = ("engine", "engine exact", "engine, any t")


def build(
    model: UNet, x: Tensor, labels: Tensor | None, threads: int, names: list[str]
) -> tuple[dict[str, Peer], dict[str, str]]:
    """Callables (x, timesteps) by name, and the reasons why others are missing."""
    calls: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    for name in OURS:
        engine = CPUEngine(model, len(x), exact="exact" in name, num_threads=threads)
        if "any t" in name:
            calls[name] = lambda x, t, e=engine: e.forward(x, t, labels)
        else:
            engine.set_schedule(torch.tensor(TIMES), labels)
            calls[name] = lambda x, t, e=engine: e(x, TIMES.index(float(t[0])))
    for name in names:
        print(f"  building {name}", file=sys.stderr, flush=True)
        try:
            calls[name] = PEERS[name](model, x, labels, threads)
            calls[name](x, torch.full((len(x),), TIMES[1]))
        except Exception as error:
            calls.pop(name, None)
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(f"  {name} is missing: {missing[name]}", file=sys.stderr, flush=True)
    return calls, missing


def errors(calls: dict[str, Peer], model: UNet, x: Tensor, labels: Tensor | None) -> dict[str, Any]:
    """Largest difference from float64 over largest output, the worst of TIMES."""
    exact = copy.deepcopy(model).double()
    worst: dict[str, Any] = dict.fromkeys(calls, 0.0)
    for time in TIMES:
        t = torch.full((len(x),), time)
        truth = exact(x.double(), t.double(), labels)
        for name, call in calls.items():
            gap = (call(x, t).double() - truth).abs().max() / truth.abs().max()
            worst[name] = max(worst[name], gap.item())
    if "diffusers" in worst:
        worst["diffusers"] = None  # its weights are its own
    return worst


def forward_variants(calls: dict[str, Peer], x: Tensor) -> dict[str, Callable[[], Any]]:
    """One evaluation of the network."""
    t = torch.full((len(x),), TIMES[1])
    return {name: lambda c=call: c(x, t) for name, call in calls.items()}


def step_variants(
    calls: dict[str, Peer], model: UNet, labels: Tensor | None, batch: int, steps: int
) -> dict[str, Callable[[], Any]]:
    """A whole ancestral chain of few steps: ours, the plain formulation, and ours around a peer."""
    c = model.config
    common: dict[str, Any] = {"steps": steps, "n": batch, "batch_size": batch, "progress": False}
    shape = (c.in_channels, c.image_size, c.image_size)
    plain = {**common, "labels": labels, "engine": False, "backend": "reference"}
    variants: dict[str, Callable[[], Any]] = {
        "engine": lambda: iddpm_ext.sample(model, labels=labels, **common),
        "eager": lambda: iddpm_ext.sample(model, **plain),
    }
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
    calls, missing = build(model, x, labels, threads, args.peers)
    clock = "process CPU time" if threads == 1 else "wall time"
    worst = errors(calls, model, x, labels)
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
            if what == "forward":
                row["error"] = worst[name]
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--configs", type=_listed(str), default=list(CONFIGS))
    parser.add_argument("--batches", type=_listed(int), default=[1, 8, 16])
    parser.add_argument("--threads", type=_listed(int), default=[1])
    parser.add_argument("--peers", type=_listed(str), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="of the timed chain; 0: none")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    rows = []
    with torch.no_grad():
        for config in args.configs:
            for batch in args.batches:
                for threads in args.threads:
                    rows += measure(args, config, batch, threads)
                    if args.output:
                        text = json.dumps(
                            {**context("benchmarks.end_to_end", PACKAGES), "rows": rows}, indent=1
                        )
                        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""What `iddpm_ext.accelerate` gains on networks of diffusers: python -m benchmarks.accelerate

`UNet2DModel`s of the configurations of `benchmarks.networks`, as they are and accelerated, evaluated
without gradients, and trained: forward, squared error, backward. One thread, process CPU time, the
variants interleaved in one process; beside them the engine by which `iddpm_ext.sample` runs such a
network. `error` is the largest difference to the stock network's output, relative to its largest value.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import iddpm_ext
from benchmarks.context import context, write_json
from benchmarks.networks import make_network
from benchmarks.timing import interleave, summary
from iddpm_ext.engines.cpu.engine import CPUEngine

CLOCK = "process CPU time"
BATCHES = {"small": 8, "cifar": 2}


def variants(name: str) -> dict[str, nn.Module]:
    """The stock network, contiguous and channels_last, and the accelerated one."""
    stock = iddpm_ext.to_diffusers(make_network(name)).requires_grad_(True)
    networks = {
        "diffusers": stock,
        "diffusers, channels_last": copy.deepcopy(stock).to(memory_format=torch.channels_last),
        "accelerate, without convolutions": copy.deepcopy(stock),
        "accelerate": copy.deepcopy(stock),
    }
    iddpm_ext.accelerate(networks["accelerate, without convolutions"], convolutions=False)
    iddpm_ext.accelerate(networks["accelerate"])
    return networks


def inference(network: nn.Module, x: Tensor, t: Tensor) -> Callable[[], Tensor]:
    """One evaluation without gradients."""

    def call() -> Tensor:
        with torch.no_grad():
            return network(x, t).sample

    return call


def by_engine(network: nn.Module, x: Tensor, t: Tensor) -> Callable[[], Tensor]:
    """One evaluation of a `UNet2DModel` by the CPU engine, as in `iddpm_ext.sample`."""
    model = iddpm_ext.from_diffusers(network)
    engine = CPUEngine(model, len(x), num_threads=1)
    engine.begin(t[:1], None)
    return lambda: engine(x, 0)


def training(network: nn.Module, x: Tensor, t: Tensor) -> Callable[[], None]:
    """Forward, squared error and backward."""

    def call() -> None:
        network.zero_grad()
        network(x, t).sample.square().mean().backward()

    return call


def measure(name: str, task: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each variant, the stock network first."""
    networks = variants(name)
    generator = torch.Generator().manual_seed(1)
    batch = BATCHES[name]
    x = torch.randn(batch, 3, 32, 32, generator=generator)
    t = torch.full((batch,), 250.0)  # the same for all images, as in sampling
    make: Callable[..., Callable[[], Any]] = inference if task == "inference" else training
    calls = {key: make(network, x, t) for key, network in networks.items()}
    outputs = {key: inference(network, x, t)() for key, network in networks.items()}
    if task == "inference":
        calls["sample's engine"] = by_engine(networks["diffusers"], x, t)
        outputs["sample's engine"] = calls["sample's engine"]()
    times = interleave(calls, rounds=rounds, clock=CLOCK)
    first = outputs["diffusers"]
    base = summary(times["diffusers"])["median_ms"]
    return [
        {
            "network": name, "task": task, "batch": batch, "variant": key, **summary(values),
            "speedup": base / summary(values)["median_ms"],
            "error": float((outputs[key] - first).abs().max() / first.abs().max()),
        }
        for key, values in times.items()
    ]  # fmt: skip


def main() -> None:
    """Prints the rows and writes them with what they were measured on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in arguments.networks:
        for task in ("inference", "training"):
            for row in measure(name, task, arguments.rounds):
                rows.append(row)
                print(
                    f"{row['network']:6} {row['task']:9} batch {row['batch']}  {row['variant']:33}"
                    f"{row['median_ms']:9.1f} ms ({row['q25_ms']:.1f}-{row['q75_ms']:.1f})"
                    f"  {row['speedup']:.2f}x  error {row['error']:.1e}",
                    flush=True,
                )
    if arguments.out is not None:
        head = context("benchmarks.accelerate", ("torch", "diffusers"))
        write_json(arguments.out, {**head, "rows": rows})


if __name__ == "__main__":
    main()

"""A training step against the original's formulation and torch.compile: python -m benchmarks.training

Forward, hybrid loss, backward, AdamW and average of the weights of one batch, one thread, process CPU
time, variants interleaved in one process. Ours is `iddpm_ext.training.step.train_step`, the step that
`iddpm train` makes. For all variants the allocator keeps freed memory, as in `iddpm train`.
The error is that of the weights' gradient for one batch, relative to float64.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.context import context, write_json
from benchmarks.networks import make_inputs, make_network
from benchmarks.original import EMA_DECAY, LEARNING_RATE, Trainer, hybrid_loss, original_network
from benchmarks.timing import interleave, summary
from iddpm_ext.data import Batch
from iddpm_ext.networks.unet import UNet
from iddpm_ext.training.config import TrainConfig
from iddpm_ext.training.memory import keep_freed_memory
from iddpm_ext.training.parallel import Parallel
from iddpm_ext.training.state import new_state
from iddpm_ext.training.step import train_step

CLOCK = "process CPU time"
BATCHES = {"small": 16, "cifar": 4}
OURS = {"ours": None, "ours bf16": torch.bfloat16}
BASELINES = ("original", "compile", "compile bf16")
PEERS = ("original", "original bf16", "original channels_last", "compile", "compile bf16")

Network = Callable[..., Tensor]


class Variant:
    """One way to train: `step` makes a step on x_0, `network` and `dtype` are what it differentiates."""

    def __init__(
        self, step: Callable[[Tensor], Any], network: nn.Module, dtype: torch.dtype | None
    ):
        self.step, self.network, self.dtype = step, network, dtype


def our_variant(model: UNet, x_0: Tensor, dtype: torch.dtype | None) -> Variant:
    """The trainer's own step on the device of x_0, with its defaults: on a GPU a graph."""
    device = x_0.device.type
    c = model.config
    config = TrainConfig(
        batch_size=len(x_0),
        model_channels=c.model_channels,
        num_res_blocks=c.num_res_blocks,
        channel_mult=c.channel_mult,
        attention_resolutions=c.attention_resolutions,
        num_heads=c.num_heads,
        lr=LEARNING_RATE,
        ema=(EMA_DECAY,),
        dtype="float32" if dtype is None else str(dtype).removeprefix("torch."),
        device=device,
    )
    parallel = Parallel(device)
    state = new_state(config, (c.in_channels, c.image_size, c.image_size), None, parallel)
    state.model.load_state_dict(model.state_dict())

    def batches() -> Iterator[Batch]:
        for step in itertools.count():
            positions = torch.arange(step * len(x_0), (step + 1) * len(x_0))
            yield Batch(positions, x_0, None, [])

    source = batches()
    return Variant(lambda _: train_step(config, state, source, parallel), state.model, dtype)


def compiled(network: UNet, name: str, mode: str | None = None) -> nn.Module:
    """The network through torch.compile."""

    # torch.compile keeps its graphs with the code object, which copies of a model share.
    def forward(self: Any, *args: Tensor) -> Tensor:
        return self.network(*args)

    code = forward.__code__.replace(co_name=name)
    own = types.FunctionType(code, forward.__globals__, name)
    holder: Any = type(name, (nn.Module,), {"forward": own})()
    holder.network = network
    return torch.compile(holder, fullgraph=True, dynamic=False, mode=mode)  # type: ignore[return-value]


def build(model: UNet, x_0: Tensor, peers: Sequence[str]) -> dict[str, Variant]:
    """Ours and those peers, by name. The compiled ones have PyTorch's fused optimiser too, their best."""
    diffusion = model.diffusion
    assert diffusion is not None
    variants = {name: our_variant(model, x_0, dtype) for name, dtype in OURS.items()}

    def add(name: str, dtype: torch.dtype | None = None, **options: bool) -> None:
        if name not in peers:
            return
        network: nn.Module = original_network(model).requires_grad_()
        if options.get("best"):
            network = compiled(network, name.title().replace(" ", ""))
        trainer = Trainer(network, diffusion, dtype, **options)
        variants[name] = Variant(trainer.step, network, dtype)

    add("original")
    add("original bf16", torch.bfloat16)
    add("original channels_last", channels_last=True)
    add("compile", best=True)
    add("compile bf16", torch.bfloat16, best=True)
    return variants


def gradient_errors(variants: dict[str, Variant], model: UNet, x_0: Tensor) -> dict[str, float]:
    """Distance of the weights' gradient from float64's, relative to its length."""
    diffusion = model.diffusion
    assert diffusion is not None
    draw = torch.Generator().manual_seed(2)
    t = torch.randint(0, diffusion.num_timesteps, (len(x_0),), generator=draw)
    noise = torch.randn(x_0.shape, generator=draw)

    def gradient(network: nn.Module, dtype: torch.dtype | None, like: torch.dtype) -> Tensor:
        loss = hybrid_loss(network, diffusion, x_0.to(like), t, noise.to(like), dtype)
        weights = list(network.parameters())
        return torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, weights)])

    exact = copy.deepcopy(model).double().requires_grad_()
    exact.backend = "plain"
    truth = gradient(exact, None, torch.float64)
    errors = {}
    for name, variant in variants.items():
        print(f"  gradient of {name}", file=sys.stderr, flush=True)
        found = gradient(variant.network, variant.dtype, torch.float32)
        errors[name] = float((found - truth).norm() / truth.norm())
    return errors


def measure(config: str, batch: int, rounds: int, peers: Sequence[str]) -> list[dict[str, Any]]:
    """All rows of one configuration."""
    model = make_network(config)
    x_0 = make_inputs(model, batch)[0].clamp(-1, 1)
    variants = build(model, x_0, peers)
    errors = gradient_errors(variants, model, x_0)
    calls = {name: lambda v=variant: v.step(x_0) for name, variant in variants.items()}
    times = interleave(calls, rounds=rounds, clock=CLOCK)
    medians = {name: summary(values)["median_ms"] for name, values in times.items()}
    rows = []
    for name, values in times.items():
        row: dict[str, Any] = {"config": config, "batch": batch, "threads": 1, "clock": CLOCK}
        row |= {"name": name, **summary(values), "rounds": rounds, "gradient_error": errors[name]}
        for baseline in BASELINES:
            if baseline in medians:
                row[f"faster_than_{baseline.replace(' ', '_')}"] = medians[baseline] / medians[name]
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    ratios = [
        f"{row[key]:.2f}x {key.removeprefix('faster_than_').replace('_', ' ')}"
        for key in row
        if key.startswith("faster_than_")
    ]
    return (
        f"{row['config']:6} B{row['batch']:<3} {row['name']:23} {row['median_ms']:9.1f} ms "
        f"[{row['q25_ms']:.1f}, {row['q75_ms']:.1f}]  {', '.join(ratios)}  "
        f"gradient error {row['gradient_error']:.1e}"
    )


def profile(config: str, batch: int) -> None:
    """Prints the shares of our step by operator."""
    model = make_network(config)
    x_0 = make_inputs(model, batch)[0].clamp(-1, 1)
    for name, dtype in OURS.items():
        variant = our_variant(model, x_0, dtype)
        variant.step(x_0)
        with torch.profiler.profile() as found:
            variant.step(x_0)
        table = found.key_averages()
        total = sum(event.self_cpu_time_total for event in table)
        print(f"{config}, batch {batch}, {name}")
        for event in sorted(table, key=lambda e: -e.self_cpu_time_total)[:25]:
            share = event.self_cpu_time_total / total
            print(
                f"  {share:6.1%} {event.self_cpu_time_total / 1e3:8.2f} ms {event.count:4} x {event.key}"
            )


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", nargs="+", choices=BATCHES, default=["small"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=PEERS, help="torch.compile takes minutes each"
    )
    parser.add_argument(
        "--profile", action="store_true", help="print our shares by operator instead"
    )
    parser.add_argument("--json", type=Path, help="where to write the rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    head = context(
        "benchmarks.training"
    )  # of the code that was imported, whatever is edited meanwhile
    rows = []
    for config in args.configs:
        if args.profile:
            profile(config, BATCHES[config])
            continue
        rows += measure(config, BATCHES[config], args.rounds, args.peers)
        if args.json:
            write_json(args.json, {**head, "rows": rows})


if __name__ == "__main__":
    main()

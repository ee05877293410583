"""The kernels of a call on the GPU, with their times: python -m benchmarks.kernel_times --json kernels.json

The kernels of a forward pass and of a training step of the CIFAR-10 network, with their times as PyTorch's
profiler reads them from the device. The rest of the wall time is waiting, mostly for the host.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.context import context, write_json
from benchmarks.networks import make_inputs, make_network
from benchmarks.timing import interleave_on_device, spread


class Kernel(NamedTuple):
    """One kernel's share of a call."""

    name: str
    microseconds: float
    launches: float


def kernels_of(call: Callable[[], Any], calls: int = 3) -> list[Kernel]:
    """The kernels (and memory copies) of one call, those that take longest first."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for event in profile.events():
        # Marked ranges, such as an optimiser's step, contain kernels that are listed too.
        marked = event.name.startswith(("Optimizer.", "ProfilerStep"))
        if event.device_type == torch.autograd.DeviceType.CUDA and not marked:
            times[event.name] += event.time_range.elapsed_us()
            counts[event.name] += 1
    found = [Kernel(name, time / calls, counts[name] / calls) for name, time in times.items()]
    return sorted(found, key=lambda kernel: -kernel.microseconds)


def kernel_ms(call: Callable[[], Any]) -> float:
    """The sum of the times of a call's kernels, in milliseconds."""
    return sum(kernel.microseconds for kernel in kernels_of(call)) / 1e3


def calls_of(
    config: str, batch: int, whats: list[str], dtype: torch.dtype
) -> dict[str, Callable[[], Any]]:
    """Ours, ready to be called."""
    from benchmarks import gpu_end_to_end, training

    model = make_network(config).cuda()
    x = make_inputs(model, batch)[0].cuda()
    calls: dict[str, Callable[[], Any]] = {}
    if "forward" in whats:
        variant = gpu_end_to_end.build_network(gpu_end_to_end.OURS, model, x, dtype, steps=2)
        calls["forward"] = lambda: variant.at(x, 1)
    if "training" in whats:
        step = training.our_variant(model, x.clamp(-1, 1), dtype).step
        calls["training"] = lambda: step(x)
    return calls


def main() -> int:
    """Measure, print, write; 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="cifar")
    parser.add_argument("--batches", default="128,1")
    parser.add_argument("--what", default="forward,training", help="training: of the first batch")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rows", type=int, default=40, help="kernels printed of each call")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"kernel_times: no CUDA device (torch {torch.__version__})", file=sys.stderr)
        return 2
    batches = [int(batch) for batch in args.batches.split(",")]
    found: list[dict[str, Any]] = []
    for batch in batches:
        whats = [w for w in args.what.split(",") if w == "forward" or batch == batches[0]]
        for what, call in calls_of(args.config, batch, whats, getattr(torch, args.dtype)).items():
            for _ in range(3):
                call()
            span = 120.0 if what == "training" else 20.0
            times = interleave_on_device({what: call}, device="cuda", rounds=9, milliseconds=span)[
                what
            ]
            kernels = kernels_of(call)
            total = sum(kernel.microseconds for kernel in kernels) / 1e3
            row = {"config": args.config, "batch": batch, "dtype": args.dtype, "what": what}
            row |= {**spread(times), "kernel_ms": total}
            row["launches"] = sum(kernel.launches for kernel in kernels)
            found.append({**row, "kernels": [kernel._asdict() for kernel in kernels]})
            print(
                f"== {args.config} {batch} {what}: {row['median_ms']:.3f} ms, kernels {total:.3f} ms "
                f"in {row['launches']:.0f} launches"
            )
            for kernel in kernels[: args.rows]:
                print(
                    f"{kernel.microseconds:10.1f} us {kernel.microseconds / total / 10:5.1f}% "
                    f"x{kernel.launches:<6.0f} {kernel.name[:110]}",
                    flush=True,
                )
            if args.json:
                head = context("benchmarks.kernel_times", ("torch", "triton"))
                write_json(args.json, {**head, "rows": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())

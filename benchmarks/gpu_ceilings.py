"""Measures the peak rates of a GPU: python -m benchmarks.gpu_ceilings --json ceilings.json

The bandwidth of a copy larger than the caches (bytes read and written), and the rate of a bfloat16 matrix
product of random numbers (zeros would draw less power and run faster).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.context import context, write_json
from benchmarks.ops import multiply_add_rate
from benchmarks.timing import interleave_on_device, spread


def copy_bandwidth(size: int, device: str, rounds: int = 10) -> float:
    """Bytes a second, read and written together, of copying `size` bytes."""
    source = torch.zeros(size // 2, dtype=torch.int16, device=device)
    target = torch.empty_like(source)
    times = interleave_on_device(
        {"copy": lambda: target.copy_(source)}, device=device, rounds=rounds
    )
    return 2 * size / (spread(times["copy"])["median_ms"] / 1e3)


def main() -> int:
    """Measure, print, write; 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--copy-gib", type=float, default=8.0)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"gpu_ceilings: no CUDA device (torch {torch.__version__})", file=sys.stderr)
        return 2
    record = {
        **context("benchmarks.gpu_ceilings"),
        "copy_bytes_per_s": copy_bandwidth(int(args.copy_gib * 2**30), "cuda"),
        "bf16_product_flops": multiply_add_rate("cuda"),
    }
    print(f"copy {record['copy_bytes_per_s'] / 1e12:.2f} TB/s")
    print(f"bfloat16 products {record['bf16_product_flops'] / 1e12:.0f} TFLOP/s")
    if args.json:
        write_json(args.json, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Measures which convolution algorithm is fastest for which shape, and stores it for later engines.

A whole network runs operation by operation, so that every convolution is timed with the caches as they
are in use: its weights are cold.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from iddpm_ext import _native
from iddpm_ext.engines.cpu.algorithms import (
    ALGORITHMS,
    CANDIDATES,
    Algorithm,
    Table,
    cpu_family,
    load_chooser,
    load_table,
    user_table_path,
)
from iddpm_ext.engines.cpu.engine import CPUEngine, why_not_supported
from iddpm_ext.files import write_whole
from iddpm_ext.networks.unet import UNet
from iddpm_ext.scalars import plain

_MARGIN = 0.97  # of F2's time, which F4 must beat: F2 is the more accurate


def tune(
    model: UNet,
    batch_sizes: Sequence[int] = (1, 8, 16),
    *,
    rounds: int = 7,
    path: Path | None = None,
) -> Path:
    """Measures the convolutions of `model` on this machine and stores the fastest algorithms.

    Engines that are built afterwards, for any network with convolutions of these shapes, follow
    the table; shapes that it lacks keep their algorithm. One thread, process CPU time.

    Args:
        model: a `UNet` that the CPU engine supports.
        batch_sizes: batch sizes to measure; other sizes follow the nearest of them.
        rounds: how often each operation is timed; the median counts.
        path: the JSON file to update; the user's own, in the cache directory, if None.

    Returns:
        The path of the table, which is replaced atomically.

    Raises:
        ValueError: for bad arguments, or where the file holds something else.
        NotSupported: where the engine cannot run the network.
    """
    batch_sizes, rounds = plain(batch_sizes), plain(rounds)
    if not batch_sizes or any(b < 1 for b in batch_sizes):
        raise ValueError(f"tune: batch_sizes must be at least 1, got {list(batch_sizes)}")
    if rounds < 1:
        raise ValueError(f"tune: rounds must be at least 1, got {rounds}")
    path = user_table_path(cpu_family()) if path is None else path
    if path is None:
        raise ValueError("tune: path must be given for a user without a home, got None")
    # Checked now, before minutes of measuring.
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"tune: path must be in a folder that can be written, got {path}")
    table = load_table(path)
    for batch in batch_sizes:
        for precision, choices in measure(model, batch, rounds).items():
            table.setdefault(precision, {}).update(choices)
    write_whole(path, (json.dumps(table, indent=1, sort_keys=True) + "\n").encode())
    return path


def measure(model: UNet, batch: int, rounds: int) -> Table:
    """The fastest algorithm of every convolution of `model` at one batch size."""
    chooser = load_chooser(tiles=_native.native().has_tiles())
    supported = why_not_supported(model, torch.bfloat16) is None and chooser.rounding_pays
    candidates = {
        precision: [
            name
            for name in CANDIDATES[precision]
            if (chooser.tiles if name == "AMX" else chooser.fast_products or "bf16" not in name)
        ]
        for precision in (("float32", "bfloat16") if supported else ("float32",))
    }
    names = dict.fromkeys(name for some in candidates.values() for name in some)
    runs = {name: _Run(model, batch, ALGORITHMS[name]) for name in names}
    for _ in range(rounds):  # interleaved, so that other load on the machine slows all of them
        for run in runs.values():
            run()
    times = {name: run.times() for name, run in runs.items()}
    return {
        precision: {
            key: min(some, key=lambda name: times[name][key] * (_MARGIN if name == "F2" else 1.0))
            for key in times["F2"]
        }
        for precision, some in candidates.items()
    }


class _Run:
    """A network with one algorithm for all its convolutions; a call times each convolution once."""

    def __init__(self, model: UNet, batch: int, algorithm: Algorithm) -> None:
        precision = torch.bfloat16 if algorithm.bf16 else torch.float32
        self._engine = CPUEngine(model, batch, dtype=precision, num_threads=1, algorithm=algorithm)
        classes = model.config.num_classes
        labels = None if classes is None else torch.zeros(batch, dtype=torch.int64, device="cpu")
        self._engine.begin(torch.zeros(1, dtype=torch.float32, device="cpu"), labels)
        shape = (batch, self._engine.in_channels, *self._engine.size)
        x = torch.zeros(shape, dtype=torch.float32, device="cpu")
        self._run_row = self._engine.prepare_rows(x)
        self._seconds: dict[int, list[float]] = {row: [] for row, _ in self._engine.convolutions}

    def __call__(self) -> None:
        for row in range(self._engine.num_rows):
            start = time.process_time()
            self._run_row(row)
            if row in self._seconds:
                self._seconds[row].append(time.process_time() - start)

    def times(self) -> dict[str, float]:
        """Median seconds of all convolutions of each shape."""
        total: dict[str, float] = {}
        for row, shape in self._engine.convolutions:
            total[shape.key] = total.get(shape.key, 0.0) + statistics.median(self._seconds[row])
        return total

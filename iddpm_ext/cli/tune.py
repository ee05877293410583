"""Measure which convolution algorithms are fastest on this CPU, for the CPU engine to use.

Example: iddpm tune runs/mine --batch-sizes 1,16
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def run(
    checkpoint: Annotated[str, tyro.conf.Positional] = "fashion-mnist",
    *,
    batch_sizes: tuple[int, ...] = (1, 8, 16),
    rounds: int = 7,
    out: Path | None = None,
) -> None:
    """Measures the convolutions of one network and stores the fastest algorithms.

    Args:
        checkpoint: a bundled name, a file, a run's folder or hf://org/name: the network.
        batch_sizes: batch sizes to measure.
        rounds: how often each operation is timed.
        out: the table to write or update; by default the one in the user's cache directory.
    """
    import iddpm_ext
    from iddpm_ext.sampling import tune

    print(tune(iddpm_ext.load(checkpoint), batch_sizes, rounds=rounds, path=out))

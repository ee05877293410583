"""Measure which convolutions are fastest on this CPU, for the sampling engine to follow.

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
    """Measures the convolutions of one network and stores what is fastest.

    Args:
        checkpoint: a bundled name, a file, a run's folder or hf://org/name: the network.
        batch_sizes: numbers of images that are evaluated at once.
        rounds: how often each operation is timed.
        out: the table to write or update; the one in the user's cache directory if left out.
    """
    import iddpm_ext
    from iddpm_ext.sampling import tune

    print(tune(iddpm_ext.load(checkpoint), batch_sizes, rounds=rounds, path=out))

"""Make the averaged weights of any length from what a run has stored (post-hoc EMA).

Example: iddpm average runs/mine --sigma-rel 0.12 --out averaged.safetensors
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from iddpm_ext.cli._common import result, starting


def run(
    source: Annotated[Path, tyro.conf.Positional],
    *,
    sigma_rel: float,
    out: Path,
    step: int | None = None,
) -> None:
    """Writes a network with the average of that width.

    Args:
        source: the folder of a run with --ema-profile power.
        sigma_rel: relative width of the average; 0.05 is short, 0.25 long.
        out: the file to write, a .safetensors that every verb reads.
        step: where the average ends; the last stored step if left out.
    """
    starting("average", f"reading {source}")
    from iddpm_ext.training.averages import reconstruct_average

    fit = reconstruct_average(source, out, sigma_rel, step)
    used = int((fit.weights != 0).sum())
    result(
        f"{out}: {used} stored averages, the profile to {fit.error:.2%}",
        {"file": str(out), "averages": used, "error": fit.error},
    )

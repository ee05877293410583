"""Write one HTML page about a model, or about several side by side.

Example: iddpm report runs/mine --quick --out report.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from iddpm_ext.cli._common import pick_device, quiet, result, starting


def run(
    checkpoints: Annotated[list[str], tyro.conf.Positional],
    *,
    data: str | None = None,
    out: Path = Path("report.html"),
    quick: bool = False,
    classes: str = "auto",
    value_range: tuple[float, ...] | None = None,
    alpha: Literal["refuse", "drop", "black", "white"] = "refuse",
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Measures a model and writes a page about it into one file.

    It has samples, the chain as a film, nearest training images, bits/dim, advice on sampler and number of
    steps, the losses of a run, the configuration, and the command that reproduces each of them.

    Args:
        checkpoints: bundled names, files, folders of runs or hf://org/name; several are shown side by side.
        data: images like those it was trained on; by default those of the run, if they still exist.
        out: the .html file.
        quick: measure less: a minute for a small model.
        classes: source of the classes: auto, folders, names, file (dataset.json), ids, none or a column.
        value_range: the values of black and white, 0,1 or 0,4095 or =-1,1, if the type does not imply them.
        alpha: handling of transparent pixels: refuse; drop (keep their colours); black or white.
        seed: of all noise.
        device: auto, cpu, cuda or cuda:1.
    """
    starting("report", f"loading {', '.join(checkpoints)}")
    from iddpm_ext.report import write_report

    path = write_report(
        checkpoints, out, data=data, classes=classes, value_range=value_range, alpha=alpha,
        quick=quick, seed=seed, device=pick_device(device), progress=not quiet(),
    )  # fmt: skip
    result(str(path.resolve()), {"file": str(path.resolve())})

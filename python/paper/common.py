"""Shared by the programs of the paper's figures and tables: flags, plots, files, small trainings."""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from torch import Tensor

import iddpm_ext
from iddpm_ext.data import open_data
from iddpm_ext.engines.cpu.algorithms import cpu_family
from iddpm_ext.files import write_whole
from iddpm_ext.likelihood import Likelihood
from iddpm_ext.training import TrainConfig, read_records, train

DATA = "/usr/share/datasets/fashion-mnist"
#: A network that a CPU trains: the shape of `fashion-mnist`, thinner.
SMALL = {
    "num_res_blocks": 1, "channel_mult": (1, 1, 1), "attention_resolutions": (7,), "lr": 1e-3,
    "batch_size": 32, "ema": (0.995,), "progress": False, "sample_every": 0,
}  # fmt: skip


def arguments(description: str | None, *, checkpoint: bool = True, **defaults: Any) -> Any:
    """The flags of a program: --checkpoint, --data, --out, --toy, --dtype, and one for each default.

    A default (full, toy) is `full` without --toy and `toy` with it; a given flag overrides both.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    if checkpoint:
        parser.add_argument("--checkpoint", default="fashion-mnist", help="as iddpm_ext.load takes")
    parser.add_argument("--data", default=DATA, help="as iddpm_ext.data.open_data takes")
    parser.add_argument("--out", type=Path, default=Path("python/paper/results"))
    parser.add_argument("--toy", action="store_true", help="a size that runs in about a minute")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of training and sampling",
    )
    for name, (full, _) in defaults.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(full, (list, tuple)):
            parser.add_argument(flag, nargs="+", type=type(full[0]), help=f"default {full}")
        else:
            parser.add_argument(flag, type=type(full), help=f"default {full}")
    found = parser.parse_args()
    for name, (full, toy) in defaults.items():
        if getattr(found, name) is None:
            setattr(found, name, toy if found.toy else full)
    found.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if found.toy:  # where few samples need no mention
        warnings.filterwarnings("ignore", message=".*its covariance is singular")
    found.precision = getattr(torch, found.dtype)  # of samples
    found.began = time.perf_counter()
    return found


def write(
    flags: Any,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    figure: Figure | None = None,
    **facts: Any,
) -> None:
    """Writes NAME.csv (the rows), NAME.json (their settings and other facts) and NAME.png."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        for row in rows
    )
    write_whole(flags.out / f"{name}.csv", table.getvalue().encode())
    known = {
        "command": " ".join(["python", *sys.argv]),
        "seconds": round(time.perf_counter() - flags.began, 1),
        "torch": torch.__version__,
        "iddpm_ext": iddpm_ext.__version__,
        "machine": f"{cpu_family()}, {torch.get_num_threads()} threads",
        "toy": flags.toy,
        **facts,
    }
    write_whole(flags.out / f"{name}.json", (json.dumps(known, indent=1) + "\n").encode())
    if figure is not None:
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110)
        write_whole(flags.out / f"{name}.png", picture.getvalue())
    print(f"{flags.out / name}.* after {known['seconds']} s")


def axes(*titles: str, size: tuple[float, float] = (5.0, 3.8)) -> tuple[Figure, list[Any]]:
    """A figure with one panel for each title, side by side."""
    figure = Figure(figsize=(size[0] * len(titles), size[1]), layout="constrained")
    panels = list(figure.subplots(1, len(titles), squeeze=False)[0])
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
    return figure, panels


def plain_numbers(*axes_: Any) -> None:
    """Shows plain numbers instead of powers of ten on logarithmic axes of a short range."""
    for axis in axes_:
        axis.set_major_formatter(LogFormatter(labelOnlyBase=False))
        axis.set_minor_formatter(LogFormatter(labelOnlyBase=False))


def table_figure(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """A table as a figure."""
    columns = list(rows[0])
    text = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [
        max(len(line) for line in [column, *(cells[i] for cells in text)])
        for i, column in enumerate(columns)
    ]
    figure = Figure(figsize=(1 + 0.1 * sum(widths), 0.8 + 0.28 * len(rows)), layout="constrained")
    panel = figure.subplots()
    panel.set_axis_off()
    panel.set_title(title, fontsize=10)
    drawn = panel.table(
        text, colLabels=columns, loc="center", colWidths=[w / sum(widths) for w in widths]
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    drawn.scale(1, 1.3)
    return figure


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def progress(items: Sequence[Any] | Iterable[Any], name: str) -> Iterable[Any]:
    """The items, with a bar where stderr is a terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=name, disable=None, leave=False)


def images_of(path: str, n: int, split: str = "test") -> tuple[Tensor, Tensor | None]:
    """The first n images of a random order, float32 [n, C, H, W] in [-1, 1], and their labels."""
    data = open_data(path, split=split)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:n].sort().values
    images, used, _ = data.images(order)
    return images, data.labels(used)


def bits(model: iddpm_ext.UNet, flags: Any, **options: Any) -> Likelihood:
    """The bits/dim of --images test images with --budget evaluations each, classes given if wanted."""
    images, labels = images_of(flags.data, flags.images)
    wanted = model.config.num_classes is not None
    options = {"budget": flags.budget, "progress": False, **options}
    return iddpm_ext.nll(model, images, labels=labels if wanted else None, **options)


def trained(flags: Any, name: str, **settings: Any) -> tuple[iddpm_ext.UNet, list[dict[str, Any]]]:
    """A network trained for one row of a table, with averaged weights, and the records of its run.

    A training with the same settings is reused from `runs` in the folder of the results; one of fewer steps
    is continued, so that one training gives a whole learning curve.
    """
    folder = flags.out / "runs" / name.replace(" ", "-").replace(",", "")
    settings = {
        **SMALL, "dtype": flags.dtype, **({"batch_size": 4} if flags.toy else {}), **settings
    }  # fmt: skip
    config = TrainConfig(out=str(folder), save_every=settings["steps"], keep=1000, **settings)
    if folder.exists() and not _same_training(folder, config):
        shutil.rmtree(folder)
    checkpoint = folder / "ckpt" / f"step-{config.steps}"
    if not checkpoint.exists() and train(config) != checkpoint:
        raise KeyboardInterrupt  # it was stopped and has saved; the next call continues
    model = iddpm_ext.load(checkpoint / f"ema_{config.ema[0]}.safetensors")
    return model, [record for record in read_records(folder) if record["step"] <= config.steps]


def _same_training(folder: Path, config: TrainConfig) -> bool:
    """Whether the run in a folder has the same settings except for its length."""
    try:
        before = TrainConfig.from_json(folder / "config.json")
    except (OSError, ValueError):
        return False
    return replace(before, steps=config.steps, save_every=config.save_every) == config


def distance(model: Any, data: str, flags: Any, **sampling: Any) -> tuple[float, float]:
    """FD of --samples samples against --references images, and half its 95 % interval.

    The extractor is --extractor: efficientnet-lite0 for numbers to look at; it is never FID.
    """
    found = iddpm_ext.evaluate(
        model, data, extractor=flags.extractor, metrics=("fid",), n=flags.samples,
        reference_n=flags.references, resamples=10, batch_size=50,
        dtype=flags.precision, **sampling,
    )  # fmt: skip
    (score,) = found.scores.values()
    half = float("nan") if score.ci95 is None else (score.ci95.high - score.ci95.low) / 2
    return score.value, half

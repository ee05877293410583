"""`write_report`: measure, fill the template, write the file."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import iddpm_ext
from iddpm_ext.files import write_whole
from iddpm_ext.report.charts import require_matplotlib
from iddpm_ext.report.elements import Body, Missing, Text
from iddpm_ext.report.parts import PARTS, Part
from iddpm_ext.report.subject import FULL, QUICK, DataArguments, Subject, open_subject
from iddpm_ext.scalars import plain

_TEMPLATE = "page.html.jinja"


def write_report(
    checkpoints: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] = "report.html",
    *,
    data: str | os.PathLike[str] | None = None,
    classes: str = "auto",
    value_range: Sequence[float] | None = None,
    alpha: str = "refuse",
    quick: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Path:
    """Writes one HTML file about a model, or about several side by side. Nothing is downloaded.

    For what cannot be measured (no data, no run, no diffusion process) the page gives the reason.

    Args:
        checkpoints: as in `load`, one or several: names, files, folders of runs.
        out: the file, which is written atomically.
        data: images like those it was trained on, as in `open_data`; None takes those of the run, if they
            still exist.
        classes, value_range, alpha: as in `open_data`.
        quick: measure less: about a minute for a small model.
        seed: of all noise.
        device: of the networks.
        progress: show a bar, or a line for each part if stderr is no terminal.

    Returns:
        the path.

    Raises:
        ValueError, OSError: a checkpoint or the data cannot be read, or the file not written.
        ImportError: matplotlib or Jinja2 is not installed.
    """
    require_matplotlib()
    template = _template()
    target = Path(out)
    if target.suffix not in (".html", ".htm"):
        raise ValueError(f"report: out must end in .html, got {str(out)!r}")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"report: out must be in a folder that exists, got {str(out)!r}")
    names = [checkpoints] if isinstance(checkpoints, (str, os.PathLike)) else list(checkpoints)
    if not names:
        raise ValueError("report: checkpoints must name at least one, got none")
    if data is not None and not str(data).startswith("hf:") and not Path(data).exists():
        raise FileNotFoundError(f"report: data must exist, got {str(data)!r}")
    seed, value_range = plain(seed), plain(value_range)
    where = DataArguments(None if data is None else os.fspath(data), classes, value_range, alpha)
    effort = QUICK if quick else FULL
    subjects = [
        open_subject(os.fspath(name), where, effort, seed, torch.device(device)) for name in names
    ]
    bodies = _measure(subjects, progress)
    page = template.render(
        subjects=subjects,
        parts=[(part, [bodies[part.id, i] for i in range(len(subjects))]) for part in PARTS],
        facts=_facts(bodies, len(subjects)),
        made=_made(subjects, data, quick),
    )
    write_whole(target, page.encode())
    return target


def _measure(subjects: Sequence[Subject], progress: bool) -> dict[tuple[str, int], Body]:
    """Every part of every model, by its id and the model's index."""
    from tqdm import tqdm

    jobs = [(part, i) for part in PARTS for i in range(len(subjects))]
    terminal = progress and sys.stderr.isatty()
    found: dict[tuple[str, int], Body] = {}
    with tqdm(total=len(jobs), unit="part", disable=not terminal) as bar:
        for part, i in jobs:
            bar.set_description_str(part.title)
            if progress and not terminal:
                print(f"report: {subjects[i].name}: {part.title}", file=sys.stderr, flush=True)
            found[part.id, i] = _body(part, subjects[i])
            bar.update()
    return found


def _body(part: Part, subject: Subject) -> Body:
    try:
        return part.make(subject)
    except Missing as missing:
        return Body((Text(f"Left out: {missing}"),))


def _facts(bodies: dict[tuple[str, int], Body], count: int) -> list[tuple[str, list[str]]]:
    """The table at the top: the facts about each model."""
    merged: list[dict[str, str]] = [{} for _ in range(count)]
    for (_, i), body in bodies.items():
        merged[i].update(body.facts)
    order = dict.fromkeys(name for body in bodies.values() for name in body.facts)
    return [(name, [facts.get(name, "-") for facts in merged]) for name in order]


def _made(subjects: Sequence[Subject], data: Any, quick: bool) -> dict[str, str]:
    words = ["iddpm", "report", *(subject.name for subject in subjects)]
    words += ["--data", str(data)] if data is not None else []
    words += ["--quick"] if quick else []
    words += ["--seed", str(subjects[0].seed)] if subjects[0].seed else []
    return {
        "command": shlex.join(words),
        "version": iddpm_ext.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _template() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError("report: the page must have Jinja2: pip install Jinja2") from error
    environment = Environment(
        loader=PackageLoader("iddpm_ext.report", package_path=""),
        # Text from files, such as class names, must not be taken for markup.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE)

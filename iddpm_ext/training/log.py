"""The log of a run: metrics.jsonl, TensorBoard, a progress bar."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from iddpm_ext.files import write_whole
from iddpm_ext.text import duration

# Before the second line, which first tells the pace, and before every later one.
_SECOND_LINE_SECONDS = 10.0
_LINE_EVERY_SECONDS = 60.0


def say(text: str) -> None:
    """Prints a message, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


class RunLog:
    """Writes records of a run; does nothing in processes other than the `main` one.

    Args:
        out: the run's folder.
        first_step, steps: where this process starts and the run ends. Records after `first_step`, from an
            earlier process that got further than its last checkpoint, are dropped.
        main: whether this is the process that writes.
        tensorboard: also write the numbers and the grids of samples for TensorBoard, into out/tensorboard.
        progress: show a bar on a terminal, or a line per minute elsewhere.

    Raises:
        ImportError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        out: Path,
        first_step: int,
        steps: int,
        *,
        main: bool,
        tensorboard: bool,
        progress: bool,
    ):
        self._main, self._steps = main, steps
        self._progress = progress and main
        self._writer: Any = None
        self._last_line, self._lines = -math.inf, 0
        if not main:
            return
        _drop_after(out, first_step)
        self._file = open(out / "metrics.jsonl", "a")
        if tensorboard:
            try:
                module = importlib.import_module("torch.utils.tensorboard")
            except ImportError as error:
                raise ImportError(
                    "train: tensorboard must be installed for --tensorboard: "
                    "pip install tensorboard"
                ) from error
            self._writer = module.SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)
        terminal = self._progress and sys.stderr.isatty()
        self._bar = tqdm(initial=first_step, total=steps, unit="step", disable=not terminal)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._main:
            self._bar.close()
            self._file.close()
            if self._writer is not None:
                self._writer.close()

    def step(self) -> None:
        """Counts one more step."""
        if self._main:
            self._bar.update()

    def record(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl: numbers with `step` among them, null where not finite."""
        if not self._main:
            return
        # JSON has no infinity: other readers refuse what Python writes for it.
        known = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps(known) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, values["step"])

    def picture(self, name: str, path: Path, step: int) -> None:
        """A picture that was written to a file, for TensorBoard."""
        if self._main and self._writer is not None:
            with Image.open(path) as image:
                levels = np.asarray(image.convert("RGB"))
            self._writer.add_image(name, levels, step, dataformats="HWC")

    def due(self, step: int) -> bool:
        """Whether to print a line: after the first step, soon again, every minute, after the last step."""
        wait = _LINE_EVERY_SECONDS if self._lines > 1 else _SECOND_LINE_SECONDS
        late = time.monotonic() - self._last_line >= wait
        return self._progress and (late or step == self._steps)

    def line(self, values: dict[str, Any]) -> None:
        """Shows the progress, on the bar or as a line; to be called when one is due.

        values: loss, step, and once the pace is known images_per_second and eta_seconds.
        """
        self._last_line = time.monotonic()
        self._lines += 1
        pace = f"loss {values['loss']:.4f}"
        if "images_per_second" in values:
            pace += f", {values['images_per_second']:.1f} images/s"
        if not self._bar.disable:
            self._bar.set_postfix_str(pace)
            return
        seconds = values.get("eta_seconds")
        left = f", {duration(seconds)} left" if seconds else ""
        say(f"step {values['step']}/{self._steps}: {pace}{left}")

    def say(self, text: str) -> None:
        """Prints a message."""
        if self._main:
            say(text)


def read_records(out: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """What a run has measured so far, in the order of its steps.

    Args:
        out: the run's folder.

    Returns:
        the records of its `metrics.jsonl`; none if there is no such file. A line that is cut short, as
        that of a running or killed process may be, is left out.
    """
    path = Path(out) / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    return found


def _drop_after(out: Path, step: int) -> None:
    """Removes records of steps after `step`, and an incomplete last line, atomically."""
    if (out / "metrics.jsonl").exists():
        kept = [json.dumps(record) + "\n" for record in read_records(out) if record["step"] <= step]
        write_whole(out / "metrics.jsonl", "".join(kept).encode())

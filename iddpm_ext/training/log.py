"""What a run tells while it lasts: metrics.jsonl, TensorBoard, a progress bar."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

_LINE_EVERY_SECONDS = 60.0


class RunLog:
    """Writes records of a run; every method does nothing on a process that is not the `main` one.

    Args:
        out: the run's folder.
        first_step, steps: where this life of the run begins and where the run is to end. Records after
            `first_step`, of a life that got further than its last checkpoint, are dropped.
        main: whether this is the process that speaks.
        tensorboard: write the same numbers for TensorBoard, into out/tensorboard.
        progress: show a bar on a terminal, or a line a minute elsewhere.

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
        if not main:
            return
        self._path = out / "metrics.jsonl"
        _drop_after(self._path, first_step)
        self._file = open(self._path, "a")
        if tensorboard:
            try:
                module = importlib.import_module("torch.utils.tensorboard")
            except ImportError as error:
                raise ImportError(
                    "train: tensorboard must be installed for --tensorboard: "
                    "pip install iddpm-ext[train]"
                ) from error
            self._writer = module.SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)
        terminal = self._progress and sys.stderr.isatty()
        self._bar = tqdm(initial=first_step, total=steps, unit="step", disable=not terminal)
        self._last_line = time.monotonic()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._main:
            self._bar.close()
            self._file.close()
            if self._writer is not None:
                self._writer.close()

    def step(self) -> None:
        """One more step is done."""
        if self._main:
            self._bar.update()

    def record(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl: numbers with `step` among them, null where not finite."""
        if not self._main:
            return
        # JSON has no word for infinity: Python's own would be refused by other readers.
        known = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps(known) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, values["step"])
        rate = values["images_per_second"]
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:.1f} images/s")
        if self._progress and self._bar.disable:
            self._print_line(values)

    def say(self, text: str) -> None:
        """A message to whoever watches."""
        if self._main:
            tqdm.write(text, file=sys.stderr)

    def _print_line(self, values: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._last_line >= _LINE_EVERY_SECONDS or values["step"] == self._steps:
            self._last_line = now
            seconds = values["eta_seconds"]
            print(
                f"step {values['step']}/{self._steps}  loss {values['loss']:.4f}  "
                f"{values['images_per_second']:.1f} images/s  "
                f"{seconds // 3600:.0f}:{seconds // 60 % 60:02.0f} left",
                file=sys.stderr,
                flush=True,
            )


def _drop_after(path: Path, step: int) -> None:
    """Removes records of steps after `step`, and a line that was cut off, all at once or not at all."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text("".join(kept))
    temporary.replace(path)

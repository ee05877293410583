"""Reads the folder of a training run: finds its newest valid checkpoint.

`OUT/ckpt/step-N/` holds safetensors files, `state.json`, and `MANIFEST.json` with the size and sha256 of
every other file. `iddpm_ext.training.checkpoints` writes them.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

MANIFEST = "MANIFEST.json"
WEIGHTS = "model.safetensors"
_STEP = re.compile(r"step-(\d+)")
_PIECE = 1 << 20


def ema_file(decay: float) -> str:
    """The file of the average with this decay in a checkpoint directory."""
    return f"ema_{decay}.safetensors"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every `step-N` in `folder`, newest first, valid or not."""
    if not folder.is_dir():
        return []
    found = [(m, path) for path in folder.iterdir() if (m := _STEP.fullmatch(path.name))]
    return sorted(((int(m[1]), path) for m, path in found), reverse=True)


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of `folder` that verifies, and a line for each newer one that does not."""
    skipped: list[str] = []
    for _, path in list_checkpoints(folder):
        problem = verify_checkpoint(path)
        if problem is None:
            return path, skipped
        skipped.append(f"{path}: {problem}")
    return None, skipped


def verify_checkpoint(path: Path) -> str | None:
    """What is wrong with the checkpoint directory `path`, or None when its manifest verifies."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        for name, entry in manifest.items():
            file = path / name
            if file.parent != path or not file.is_file():
                return f"{name} is no file in it"
            size = file.stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes instead of {entry['size']}"
            if _sha256(file) != entry["sha256"]:
                return f"{name} does not have the sha256 of the manifest"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None if "state.json" in manifest else "the manifest names no state.json"


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of the file `name` in the checkpoint directory `path`."""
    return load((path / name).read_bytes())


def read_state(path: Path) -> dict[str, Any]:
    """The contents of state.json in the checkpoint directory `path`."""
    return json.loads((path / "state.json").read_bytes())


def is_run(folder: Path) -> bool:
    """Whether `folder` is that of a run, the `ckpt` in it, or one checkpoint's."""
    return (
        (folder / MANIFEST).is_file()
        or (folder / "ckpt").is_dir()
        or bool(list_checkpoints(folder))
    )


def weights_of_run(folder: Path, *, average: bool = True) -> Path:
    """The file to sample from: the first average of the newest valid checkpoint.

    folder: of a run, the `ckpt` in it, or one checkpoint's. average: False for the weights themselves.
    Raises ValueError if no checkpoint is valid; warns of newer ones that are not.
    """
    if (folder / MANIFEST).is_file():
        newest, problem = folder, verify_checkpoint(folder)
        if problem is not None:
            raise ValueError(f"load: {folder} must be a sound checkpoint, got {problem}")
    else:
        inside = folder / "ckpt"
        found, skipped = newest_checkpoint(inside if inside.is_dir() else folder)
        if found is None:
            raise ValueError(
                f"load: {folder} must hold a sound checkpoint, got {'; '.join(skipped) or 'none yet'}"
            )
        for line in skipped:
            warnings.warn(f"load: skipped a checkpoint that is not sound: {line}", stacklevel=4)
        newest = found
    if average:
        try:
            name = ema_file(read_state(newest)["config"]["ema"][0])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"load: {newest} must hold the state of a run, got {error!r}"
            ) from None
        if (newest / name).is_file():
            return newest / name
    return newest / WEIGHTS


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()

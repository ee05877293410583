"""Checkpoint directories that are either complete or absent, whatever happens to the process.

A checkpoint is `step-N/`: safetensors files, `state.json`, and `MANIFEST.json` with the size and
sha256 of every other file. It is written under a temporary name in the same folder, each file and the
directory flushed to disk, then renamed, then the parent flushed; older ones are deleted last.
Nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

_STEP = re.compile(r"step-(\d+)")
_MANIFEST = "MANIFEST.json"


def write_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str] | None]],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes `folder/step-N` and deletes all but the newest `keep` up to it.

    tensors: file name -> (tensors by name, text metadata or None). state: JSON-ready.
    What a killed process left half-written is removed first. Returns the checkpoint's path. Raises
    OSError, in which case the older checkpoints stand as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = folder / f"step-{step}", folder / f".step-{step}.tmp-{os.getpid()}"
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        manifest = {}
        for name, (values, metadata) in tensors.items():
            data = save(
                {k: v.contiguous() for k, v in values.items()},
                None if metadata is None else dict(metadata),
            )
            manifest[name] = _write(temporary / name, data)
        manifest["state.json"] = _write(temporary / "state.json", _json(state))
        _write(temporary / _MANIFEST, _json(manifest))
        _flush_directory(temporary)
        if final.exists():
            # A directory cannot be renamed over another: the old one steps aside first.
            aside = folder / f".step-{step}.old-{os.getpid()}"
            final.rename(aside)
            temporary.rename(final)
            shutil.rmtree(aside)
        else:
            temporary.rename(final)
        _flush_directory(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # Those of later steps were found unsound, else the run had gone on from them: they take no one's place.
    for _, old in [entry for entry in list_checkpoints(folder) if entry[0] <= step][keep:]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every `step-N` in `folder`, newest first, sound or not."""
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
        manifest = json.loads((path / _MANIFEST).read_bytes())
        for name, entry in manifest.items():
            data = (path / name).read_bytes()
            if len(data) != entry["size"]:
                return f"{name} has {len(data)} bytes instead of {entry['size']}"
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
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


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _write(path: Path, data: bytes) -> dict[str, Any]:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Writes checkpoint directories atomically: they are either complete or absent.

A checkpoint is a directory `step-N/`, as `iddpm_ext.checkpoint.runs` reads it. It is written under a
temporary name in the same folder, every file and the directory are flushed to disk, it is renamed, and the
parent is flushed; then older ones are deleted. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from iddpm_ext.checkpoint.runs import MANIFEST, list_checkpoints
from iddpm_ext.files import flush


def write_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str] | None]],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes `folder/step-N` and deletes all but the newest `keep` up to it.

    tensors: file name -> (tensors by name, text metadata or None). state: JSON-ready.
    Removes what killed processes left half-written first. Returns the checkpoint's path. Raises OSError,
    after which the older checkpoints are unchanged.
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
        _write(temporary / MANIFEST, _json(manifest))
        flush(temporary)
        if final.exists():
            # A directory cannot be renamed over another, so the old one is renamed first.
            aside = folder / f".step-{step}.old-{os.getpid()}"
            final.rename(aside)
            temporary.rename(final)
            shutil.rmtree(aside)
        else:
            temporary.rename(final)
        flush(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # Checkpoints of later steps are damaged, or the run would have continued from them: not counted.
    for _, old in [entry for entry in list_checkpoints(folder) if entry[0] <= step][keep:]:
        shutil.rmtree(old)
    return final


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _write(path: Path, data: bytes) -> dict[str, Any]:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

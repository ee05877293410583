"""Evaluations on disk: an interrupted run continues where it was, and loses at most one batch.

A folder holds one file per process, `RUN.PROCESS.rows`, where RUN is the first half of the run's fingerprint.
A file is a sequence of blocks, one per batch: the number of rows, their ids, their values, a checksum. Files
are only appended to; when one is opened again, all that follows the last valid block is cut off.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from iddpm_ext.files import locked

_HEAD = struct.Struct("<4sI")
_MAGIC = b"rows"


class Journal:
    """The rows of one run: id -> `width` float32 values.

    Args:
        folder: created if absent; None stores nothing.
        run: the run's fingerprint, hexadecimal.
        process: number of this process, which writes its own file and reads those of all.
        width: values per row.

    Raises RuntimeError if another run uses the folder, OSError if it cannot be written.
    """

    def __init__(self, folder: Path | None, run: str, process: int, width: int):
        self._width = width
        self._lock = contextlib.ExitStack()
        self._file = None
        self.ids = torch.empty(0, dtype=torch.int64, device="cpu")
        self.values = torch.empty(0, width, dtype=torch.float32, device="cpu")
        if folder is None:
            return
        if process == 0:
            self._lock.enter_context(locked(folder, "nll"))
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f"{run[:32]}.{process}.rows"
        found = [(self.ids, self.values)]
        self._paths = sorted({own, *folder.glob(f"{run[:32]}.*.rows")})
        for path in self._paths:
            data = path.read_bytes() if path.exists() else b""
            blocks, sound = self._parse(data)
            found += blocks
            if path == own and sound < len(data):
                os.truncate(path, sound)
        self.ids = torch.cat([ids for ids, _ in found])
        self.values = torch.cat([values for _, values in found])
        self._file = open(own, "ab")

    def _parse(self, data: bytes) -> tuple[list[tuple[Tensor, Tensor]], int]:
        """The valid blocks at the beginning of `data`, and where they end."""
        blocks, at = [], 0
        while at + _HEAD.size <= len(data):
            magic, count = _HEAD.unpack_from(data, at)
            end = at + _HEAD.size + count * (8 + 4 * self._width)
            if magic != _MAGIC or end + 4 > len(data):
                break
            if data[end : end + 4] != struct.pack("<I", zlib.crc32(data[at:end])):
                break
            body = bytearray(data[at + _HEAD.size : end])
            if count:
                ids = torch.frombuffer(body, dtype=torch.int64, count=count)
                values = torch.frombuffer(body, dtype=torch.float32, offset=8 * count)
                blocks.append((ids, values.view(count, self._width)))
            at = end + 4
        return blocks, at

    def append(self, ids: Tensor, values: Tensor) -> None:
        """Writes a batch: ids int64 [n], values float32 [n, width]."""
        if self._file is None:
            return
        block = _HEAD.pack(_MAGIC, len(ids)) + ids.numpy().tobytes() + values.numpy().tobytes()
        self._file.write(block + struct.pack("<I", zlib.crc32(block)))
        self._file.flush()

    def remove(self) -> None:
        """Deletes the run's files, once its result exists."""
        if self._file is not None:
            self._file.close()
            for path in self._paths:
                path.unlink(missing_ok=True)
            self._lock.close()
            with contextlib.suppress(OSError):  # other runs' files keep the folder
                self._paths[0].parent.rmdir()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.close()

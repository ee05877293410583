"""IDX files, the format of MNIST and its family, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from .memory import Stream, read_at_most, require_memory

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_PREFIXES = {"train": "train-", "test": "t10k-"}


def read_idx(path: str | Path) -> np.ndarray:
    """The array of one IDX file, in native byte order.

    Layout: two zero bytes, a type code, the number of dimensions, each size as a big-endian uint32,
    then the values. Raises ValueError if the file is malformed, or shorter or longer than its header says.
    """
    path = Path(path)
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            return _read_array(path, gzip.GzipFile(fileobj=raw) if packed else raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"read_idx: {path} must be a complete gzip file, got {error}") from error


def _read_array(path: Path, file: Stream) -> np.ndarray:
    head = file.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _TYPES or head[3] == 0:
        raise ValueError(f"read_idx: {path} must begin with an IDX header, got {head!r}")
    dtype, sizes = np.dtype(_TYPES[head[2]]), file.read(4 * head[3])
    shape = tuple(int(size) for size in np.frombuffer(sizes[: len(sizes) // 4 * 4], ">u4"))
    header, needed = 4 + 4 * head[3], math.prod(shape) * dtype.itemsize
    require_memory(f"read_idx: {path}", needed)
    values = read_at_most(file, needed + 1)
    if len(shape) != head[3] or len(values) != needed:
        more = "more" if len(values) > needed else str(4 + len(sizes) + len(values))
        raise ValueError(
            f"read_idx: {path} must hold {header + needed} bytes for shape {shape}, got {more}"
        )
    return np.frombuffer(values, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def find_idx(path: Path, split: str) -> tuple[Path, Path | None] | None:
    """The (images, labels) files of `path`: a folder with MNIST's file names, or one file of images.

    split: "train" or "test", selects among a folder's files. The labels are None if there is no file with the
    images' name and "labels-idx1" instead of "images-idx3". Returns None for anything else.
    """
    if path.is_dir():
        stem = f"{_PREFIXES[split]}images-idx3-ubyte"
        candidates = [path / stem, path / f"{stem}.gz"]
    else:
        candidates = [path] if "idx3" in path.name else []
    for images in candidates:
        if images.is_file():
            labels = images.with_name(images.name.replace("images-idx3", "labels-idx1"))
            return images, labels if labels != images and labels.is_file() else None
    return None

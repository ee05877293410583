"""Readers of NumPy's array files and CIFAR's binary batches. Nothing here is ever unpickled."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from .classes import shown
from .memory import Stream, read_at_most, require_memory
from .names import printable

_IMAGE_KEYS = ("images", "image", "x", "arr_0")
_LABEL_KEYS = ("labels", "label", "y", "arr_1")
# NumPy's own limit.
_MOST_HEADER = 10_000


class Arrays(NamedTuple):
    """images and labels as `ArrayData` takes them; class names or None; notes on what is left out."""

    images: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def read_npy(path: Path) -> Arrays:
    """A .npy file of images, memory-mapped."""
    try:
        with open(path, "rb") as file:
            header = _read_header(file, path.stat().st_size)
            start = file.tell()
        order: Literal["F", "C"] = "F" if header.by_column else "C"
        return Arrays(np.memmap(path, header.dtype, "r", start, header.shape, order))
    except (ValueError, OSError) as error:
        raise ValueError(f"open_data: {path} must be a complete .npy array, got {error}") from error


class _Header(NamedTuple):
    shape: tuple[int, ...]
    by_column: bool
    dtype: np.dtype
    bytes: int


def _read_header(file: Stream, size: int) -> _Header:
    """The header of an array's file; ValueError if it is malformed or describes more than `size` bytes."""
    start = file.read(8)
    if len(start) < 8 or start[:6] != b"\x93NUMPY":
        raise ValueError("a file that does not begin like an array")
    width = 2 if start[6] == 1 else 4
    stated = file.read(width)
    length = int.from_bytes(stated, "little")
    if length > _MOST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    text = io.BytesIO(stated + file.read(length))
    form = np.lib.format
    shape, by_column, dtype = (
        form.read_array_header_1_0(text) if width == 2 else form.read_array_header_2_0(text)
    )
    if dtype.kind not in "buif":
        raise ValueError(f"values of {dtype}, which are no numbers")
    needed = math.prod(shape) * dtype.itemsize
    if needed > size:
        raise ValueError(f"{needed} bytes claimed for {shape} of {size}")
    return _Header(shape, by_column, dtype, needed)


def read_npz(path: Path) -> Arrays:
    """A .npz file: images under `images` or `arr_0`, labels, if any, under `labels` or `arr_1`.

    Raises ValueError when it is damaged, holds Python objects, has no images, or would not fit into memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {i.filename.removesuffix(".npy"): i for i in archive.infolist()}
            used = [
                next((k for k in keys if k in members), None) for keys in (_IMAGE_KEYS, _LABEL_KEYS)
            ]
            if used[0] is None:
                raise ValueError(
                    f"images under one of {_IMAGE_KEYS} are missing, of {list(members)}"
                )
            require_memory(str(path), sum(members[key].file_size for key in used if key))
            images, labels = (
                None if k is None else _read_member(archive, members[k]) for k in used
            )
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, RuntimeError, NotImplementedError,
            zlib.error) as error:  # fmt: skip
        raise ValueError(f"open_data: {path} must be a sound .npz file, got {error}") from error
    assert images is not None
    others = [printable(key) for key in members if key not in used]
    notes = (f"arrays of other names are left out: {shown(others)}",) if others else ()
    return Arrays(images, labels, None, notes)


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """One array. Its header is compared with the actual size before any memory is allocated."""
    with archive.open(member) as file:
        shape, by_column, dtype, needed = _read_header(file, member.file_size)
        values = read_at_most(file, needed + 1)
    if len(values) != needed:
        got = "more" if len(values) > needed else "fewer"
        raise ValueError(
            f"{got} than the {needed} bytes of {shape} in {printable(member.filename)}"
        )
    array = np.frombuffer(values, dtype)
    array = array.reshape(shape[::-1]).T if by_column else array.reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


def find_cifar(path: Path, split: str) -> list[Path]:
    """CIFAR's binary files of a split in a folder, or the file itself; empty where there are none."""
    if path.is_file():
        return [path] if path.suffix == ".bin" else []
    batches = sorted(path.glob("data_batch_*.bin")) if split == "train" else []
    return batches or [
        p for p in (path / f"{split}_batch.bin", path / f"{split}.bin") if p.exists()
    ]


def read_cifar(paths: list[Path]) -> Arrays:
    """CIFAR-10 records (label, 3072 values) or CIFAR-100 ones (coarse label, fine label, 3072 values)."""
    fine = paths[0].name in ("train.bin", "test.bin")
    record = 3074 if fine else 3073
    for path in paths:
        size = path.stat().st_size
        if size == 0 or size % record:
            raise ValueError(
                f"open_data: {path} must hold whole records of {record} bytes, got {size} bytes"
            )
    data = np.concatenate([np.fromfile(path, np.uint8).reshape(-1, record) for path in paths])
    images = data[:, record - 3072 :].reshape(-1, 3, 32, 32)
    listing = paths[0].parent / ("fine_label_names.txt" if fine else "batches.meta.txt")
    names = tuple(listing.read_text().split()) if listing.exists() else None
    return Arrays(images, data[:, record - 3073].astype(np.int64), names)

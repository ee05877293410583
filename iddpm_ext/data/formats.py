"""Readers of array files: NumPy's and CIFAR's binary batches. Nothing here is ever unpickled."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

_IMAGE_KEYS = ("images", "image", "x", "arr_0")
_LABEL_KEYS = ("labels", "label", "y", "arr_1")


class Arrays(NamedTuple):
    """images as `ArrayData` takes them; labels int64 [N] or None; class names or None."""

    images: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None


def read_npy(path: Path) -> Arrays:
    """A .npy file of images, memory-mapped."""
    try:
        return Arrays(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"open_data: {path} must be a complete .npy array, got {error}") from error


def read_npz(path: Path) -> Arrays:
    """A .npz file: images under `images` or `arr_0`, labels, if any, under `labels` or `arr_1`.

    Raises ValueError when it is damaged, holds Python objects, has no images, or would not fit into memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            require_memory(str(path), sum(info.file_size for info in archive.infolist()))
        with np.load(path, allow_pickle=False) as file:
            images, labels = (
                next((file[key] for key in keys if key in file.files), None)
                for keys in (_IMAGE_KEYS, _LABEL_KEYS)
            )
            names = list(file.files)
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise ValueError(f"open_data: {path} must be a sound .npz file, got {error}") from error
    if images is None:
        raise ValueError(f"open_data: {path} must hold one of {_IMAGE_KEYS}, got {names}")
    return Arrays(images, labels)


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


def require_memory(what: str, needed: int) -> None:
    """Raises ValueError when `needed` bytes are more than the machine has free."""
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not every system tells
        return
    if needed > available:
        raise ValueError(
            f"{what} must unpack to at most the {available} bytes of free memory, got {needed}"
        )

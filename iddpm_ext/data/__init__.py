"""Images for training and likelihood, in [-1, 1], from the formats that data sets come in."""

from __future__ import annotations

from pathlib import Path

from .arrays import ArrayData, to_signed_unit
from .idx import find_idx, read_idx
from .order import Order

__all__ = ["ArrayData", "Order", "open_data", "read_idx", "to_signed_unit"]


def open_data(path: str | Path, *, split: str = "train") -> ArrayData:
    """The images at `path`: a folder of IDX files (MNIST's family), or one such file.

    split: "train" or "test", of the sources that have both.
    Raises FileNotFoundError when nothing is there, ValueError when it is of no known format.
    """
    path = Path(path)
    if split not in ("train", "test"):
        raise ValueError(f"open_data: split must be 'train' or 'test', got {split!r}")
    if not path.exists():
        raise FileNotFoundError(f"open_data: path must exist, got {path}")
    found = find_idx(path, split)
    if found is None:
        raise ValueError(
            f"open_data: path must be a folder of IDX files or one of them, got {path}"
        )
    images, labels = found
    return ArrayData(read_idx(images), None if labels is None else read_idx(labels))

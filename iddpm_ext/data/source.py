"""One string that names the data, whatever the format."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Protocol

from torch import Tensor

from .arrays import ArrayData
from .files import FileData, Folder, Zip
from .formats import Arrays, find_cifar, read_cifar, read_npy, read_npz
from .hub import HubData, is_saved_dataset
from .idx import find_idx, read_idx


class ImageData(Protocol):
    """What training and likelihood ask of data.

    image_shape: (C, H, W) of every image. class_names: one a class, None without classes.
    """

    class_names: tuple[str, ...] | None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        ...

    def __len__(self) -> int: ...

    def images(self, indices: Tensor) -> tuple[Tensor, Tensor, list[str]]:
        """float32 [N, C, H, W] in [-1, 1], the indices really used, complaints about the others."""
        ...

    def labels(self, indices: Tensor) -> Tensor | None:
        """int64 [N], or None."""
        ...


def open_data(
    path: str | Path,
    *,
    split: str = "train",
    image_size: int | None = None,
    channels: int | None = None,
    bad_images: str = "skip",
) -> ImageData:
    """The images at `path`.

    Args:
        path: a folder or zip of image files, a .npz or .npy file of arrays, IDX files (MNIST's family) or
            CIFAR's binary batches (one, or the folder with them), or "hf:name" and folders of
            `datasets.save_to_disk` with the `data` extra.
        split: "train" or "test", of sources that have both.
        image_size: side of the square that every image is resized and cropped to; None: as they are.
        channels: 1 or 3 for image files; None: 1 where they are all grey.
        bad_images: "skip" or "stop", see `FileData`.

    Raises:
        FileNotFoundError: nothing is there. ValueError: it is of no known format, damaged or empty.
    """
    if split not in ("train", "test"):
        raise ValueError(f"open_data: split must be 'train' or 'test', got {split!r}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"open_data: image_size must be at least 1, got {image_size}")
    if channels not in (None, 1, 3):
        raise ValueError(f"open_data: channels must be 1 or 3, got {channels}")
    if str(path).startswith("hf:"):
        return HubData(str(path)[3:], split=split, image_size=image_size, channels=channels)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"open_data: path must exist, got {path}")
    if path.is_dir() and is_saved_dataset(path):
        return HubData(str(path), split=split, image_size=image_size, channels=channels)
    arrays = _read_arrays(path, split)
    if arrays is not None:
        data = ArrayData(*arrays, image_size=image_size)
        if channels not in (None, data.image_shape[0]):
            raise ValueError(
                f"open_data: channels must be those of the array, {data.image_shape[0]}, got {channels}"
            )
        return data
    if not path.is_dir() and not zipfile.is_zipfile(path) and path.suffix != ".zip":
        raise ValueError(
            "open_data: path must be a folder, .zip, .npz, .npy, IDX or CIFAR .bin file, "
            f"got {path}"
        )
    return FileData(
        Folder(path) if path.is_dir() else Zip(path),
        split=split,
        image_size=image_size,
        channels=channels,
        bad_images=bad_images,
    )


def _read_arrays(path: Path, split: str) -> Arrays | None:
    if path.suffix == ".npy":
        return read_npy(path)
    if path.suffix == ".npz":
        return read_npz(path)
    idx = find_idx(path, split)
    if idx is not None:
        images, labels = idx
        return Arrays(read_idx(images), None if labels is None else read_idx(labels))
    cifar = find_cifar(path, split)
    if cifar:
        return read_cifar(cifar)
    if path.is_dir() and (path / "data_batch_1").exists():
        raise ValueError(
            "open_data: path must hold CIFAR's binary version (data_batch_1.bin), "
            f"got the Python version, which would have to be unpickled, in {path}"
        )
    return None

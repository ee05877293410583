"""One string that names the data, whatever the format."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from iddpm_ext.scalars import plain

from .arrays import ArrayData
from .containers import Folder, Zip
from .files import FileData
from .formats import Arrays, find_cifar, read_cifar, read_npy, read_npz
from .hub import HubData, is_saved_dataset
from .idx import find_idx, read_idx
from .names import printable
from .values import check_value_range

SPLITS = ("train", "test", "all")


class ImageData(Protocol):
    """What training and likelihood ask of data.

    image_shape: (C, H, W) of every image. class_names: one a class, None without classes. notes: what
    reading leaves out or changes, one line each.
    """

    class_names: tuple[str, ...] | None
    notes: list[str]

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
    classes: str = "auto",
    value_range: Sequence[float] | None = None,
    alpha: str = "refuse",
) -> ImageData:
    """The images at `path`.

    Args:
        path: a folder or zip of image files, a .npz or .npy file of arrays, IDX files (MNIST's family) or
            CIFAR's binary batches (one, or the folder with them), or "hf:name" and folders of
            `datasets.save_to_disk` with the `data` extra.
        split: "train" or "test", of sources that have both; of folders and zips also "all", which takes no
            folder for a split.
        image_size: side of the square that every image is resized and cropped to; None: as they are.
        channels: 1 or 3 for image files; None: 1 where they are all grey.
        bad_images: "skip" or "stop", see `FileData`.
        classes: where classes come from: "auto"; "folders", "names" (up to the first "_") or "file"
            (dataset.json) of image files; "ids" where labels are any numbers, of which each is a class; the
            name of a column of a Hugging Face data set; "none" for none.
        value_range: (black, white), the values that they have: (0, 1), (-1, 1), (0, 255), (0, 4095). None
            where the type of the values tells: 8 bits, 16 bits that are used, floating in [-1, 1].
        alpha: what becomes of image files with transparent pixels: "refuse"; "drop" shows the colours
            below; "black" or "white" lays them over that.

    Nothing is dropped, rescaled or relabelled silently: `notes` of what is returned say what was, and where
    it is not certain what was meant, the error says how to tell.

    Raises:
        FileNotFoundError: nothing is there. ValueError: it is of no known format, damaged or empty, or
        could be meant in more than one way.
    """
    image_size, channels, value_range = plain((image_size, channels, value_range))
    if split not in SPLITS:
        raise ValueError(f"open_data: split must be one of {', '.join(SPLITS)}, got {split!r}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"open_data: image_size must be at least 1, got {image_size}")
    if channels not in (None, 1, 3):
        raise ValueError(f"open_data: channels must be 1 or 3, got {channels}")
    values = check_value_range(value_range)
    hub = str(path)[3:] if str(path).startswith("hf:") else None
    if hub is None and is_saved_dataset(Path(path)):
        hub = str(path)
    if hub is not None:
        return HubData(
            hub, split=split, image_size=image_size, channels=channels, classes=classes,
            value_range=values, alpha=alpha,
        )  # fmt: skip
    source = file_source(path)
    if source is not None:
        return FileData(
            source, split=split, image_size=image_size, channels=channels, bad_images=bad_images,
            classes=classes, value_range=values, alpha=alpha,
        )  # fmt: skip
    images, labels, names, notes = _read_arrays(Path(path), split)
    data = ArrayData(
        images, labels, names, image_size, value_range=values, classes=classes, notes=notes
    )
    if channels not in (None, data.image_shape[0]):
        raise ValueError(
            f"open_data: channels must be those of the array, {data.image_shape[0]}, got {channels}"
        )
    return data


def file_source(path: str | Path) -> Folder | Zip | None:
    """The folder or zip of image files at `path`, or None where it holds data in another form.

    Raises FileNotFoundError or ValueError as `open_data`.
    """
    path = Path(path)
    shown = printable(str(path))
    if not path.exists():
        raise FileNotFoundError(f"open_data: path must exist, got {shown}")
    if path.suffix in (".npy", ".npz") and path.is_file():
        return None
    if any(find_idx(path, split) or find_cifar(path, split) for split in ("train", "test")):
        return None
    if path.is_dir() and (path / "data_batch_1").exists():
        raise ValueError(
            "open_data: path must hold CIFAR's binary version (data_batch_1.bin), "
            f"got the Python version, which would have to be unpickled, in {shown}"
        )
    if not path.is_dir() and not zipfile.is_zipfile(path) and path.suffix != ".zip":
        raise ValueError(
            "open_data: path must be a folder, .zip, .npz, .npy, IDX or CIFAR .bin file, "
            f"got {shown}"
        )
    return Folder(path) if path.is_dir() else Zip(path)


def _read_arrays(path: Path, split: str) -> Arrays:
    if path.suffix == ".npy":
        return read_npy(path)
    if path.suffix == ".npz":
        return read_npz(path)
    if split == "all":
        raise ValueError(f"open_data: split must be train or test for {path}, got {split!r}")
    idx = find_idx(path, split)
    if idx is not None:
        images, labels = idx
        return Arrays(read_idx(images), None if labels is None else read_idx(labels))
    cifar = find_cifar(path, split)
    if cifar:
        return read_cifar(cifar)
    raise ValueError(f"open_data: split must be one that {path} has, got {split!r}")

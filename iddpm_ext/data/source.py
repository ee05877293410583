"""Opens data of any format by one string."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from iddpm_ext.scalars import plain
from iddpm_ext.sizes import checked_size

from .arrays import ArrayData
from .containers import Container, Folder, Zip
from .files import FileData
from .formats import Arrays, find_cifar, read_cifar, read_npy, read_npz
from .hub import HubData, is_saved_dataset
from .idx import find_idx, read_idx
from .lmdb_file import Lmdb, is_lmdb
from .names import printable
from .shards import Shards, is_shards
from .values import check_value_range

SPLITS = ("train", "test", "all")


class ImageData(Protocol):
    """The interface of data for training and likelihood.

    image_shape: (C, H, W) of every image. class_names: one per class, None without classes. notes: one line
    for everything that reading skips or changes.
    """

    class_names: tuple[str, ...] | None
    notes: list[str]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        ...

    def __len__(self) -> int: ...

    def images(
        self, indices: Tensor, crops: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[str]]:
        """float32 [N, C, H, W] in [-1, 1], the indices that were used, messages about the others.

        crops: [N, 3], three numbers in [0, 1) per image for a random crop; None crops at the centre.
        """
        ...

    def labels(self, indices: Tensor) -> Tensor | None:
        """int64 [N], or None."""
        ...


def open_data(
    path: str | Path,
    *,
    split: str = "train",
    image_size: int | Sequence[int] | None = None,
    channels: int | None = None,
    bad_images: str = "skip",
    classes: str = "auto",
    value_range: Sequence[float] | None = None,
    alpha: str = "refuse",
) -> ImageData:
    """The images at `path`.

    Args:
        path: a folder or zip of image files; tar archives of them, one, a folder of them, or
            "train-{0000..0099}.tar"; an LMDB database of them (with the `data`
            extra); a .npz or .npy file of arrays, IDX files (MNIST's family) or
            CIFAR's binary batches (one, or the folder with them), or "hf:name" and folders of
            `datasets.save_to_disk` with the `data` extra.
        split: "train" or "test", for sources that have both; for folders and zips also "all", for which
            folders of these names are not splits.
        image_size: side, or (height, width), that every image is resized and cropped to; None: as they are.
        channels: 1 or 3 for image files; None: 1 if they are all grey.
        bad_images: "skip" or "stop", see `FileData`.
        classes: source of the classes: "auto"; "folders", "names" (up to the first "_") or "file"
            (dataset.json) of image files; "ids" for labels that are arbitrary numbers, each of them a class;
            the name of a column of a Hugging Face data set; "none" for none.
        value_range: (black, white): (0, 1), (-1, 1), (0, 255), (0, 4095). None if the type of the values
            implies them: 8 bits, 16 bits that are all used, floating in [-1, 1].
        alpha: handling of transparent pixels in image files: "refuse"; "drop" keeps their colours; "black" or
            "white" composites over that colour.

    Nothing is dropped, rescaled or relabelled silently: `notes` of the result list what was, and errors on
    ambiguous data say how to resolve the ambiguity.

    Raises:
        FileNotFoundError: nothing is there. ImportError: the library for it is not installed.
        ValueError: it is of no known format, damaged, empty or ambiguous.
    """
    image_size, channels, value_range = plain((image_size, channels, value_range))
    if split not in SPLITS:
        raise ValueError(f"open_data: split must be one of {', '.join(SPLITS)}, got {split!r}")
    size = None if image_size is None else checked_size("open_data", image_size)
    if channels not in (None, 1, 3):
        raise ValueError(f"open_data: channels must be 1 or 3, got {channels}")
    values = check_value_range(value_range)
    hub = str(path)[3:] if str(path).startswith("hf:") else None
    if hub is None and is_saved_dataset(Path(path)):
        hub = str(path)
    if hub is not None:
        return HubData(
            hub, split=split, image_size=size, channels=channels, classes=classes,
            value_range=values, alpha=alpha,
        )  # fmt: skip
    source = file_source(path)
    if source is not None:
        return FileData(
            source, split=split, image_size=size, channels=channels, bad_images=bad_images,
            classes=classes, value_range=values, alpha=alpha,
        )  # fmt: skip
    images, labels, names, notes = _read_arrays(Path(path), split)
    data = ArrayData(images, labels, names, size, value_range=values, classes=classes, notes=notes)
    if channels not in (None, data.image_shape[0]):
        raise ValueError(
            f"open_data: channels must be those of the array, {data.image_shape[0]}, got {channels}"
        )
    return data


def file_source(path: str | Path) -> Container | None:
    """The container of image files at `path`, or None if it holds data in another form.

    Raises FileNotFoundError, ValueError or ImportError as `open_data`.
    """
    if is_shards(path):
        return Shards(path)
    path = Path(path)
    if is_lmdb(path):
        return Lmdb(path)
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
            "open_data: path must be a folder, .zip, .tar, .mdb, .npz, .npy, IDX or CIFAR .bin file, "
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

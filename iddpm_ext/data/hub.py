"""Hugging Face data sets, through the optional `datasets` library."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iddpm_ext.sizes import ImageSize, height_and_width

from .classes import of_numbers
from .files import Extremes, resizing_note
from .image import BadImage, Reading, is_grey, look_at, open_image, to_array
from .names import printable
from .values import Range

_PROBED = 64


def is_saved_dataset(path: Path) -> bool:
    """Whether `path` is a folder written by `Dataset.save_to_disk`."""
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()


class HubData:
    """The images of a `datasets.Dataset` that has an `Image` column and, perhaps, a `ClassLabel` one.

    Args:
        name: "owner/name" on the hub, or the path of a folder written by `save_to_disk`.
        split: of the data set.
        image_size: side, or (height, width), that each image is brought to; None takes that of the first.
        channels: 1 or 3; None takes 1 where the first images are all grey.
        classes: "auto", "none", or the name of the column of classes, which must be given if there are
            several.
        value_range, alpha: as in `FileData`.

    Raises:
        ImportError: `datasets` is not installed. ValueError: there is no image column, several columns are
        possible, or images cannot be read.
    """

    def __init__(
        self,
        name: str,
        *,
        split: str = "train",
        image_size: ImageSize | None = None,
        channels: int | None = None,
        classes: str = "auto",
        value_range: Range | None = None,
        alpha: str = "refuse",
    ):
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                "open_data: hf: sources need the library `datasets`: pip install datasets"
            ) from error
        if Path(name).is_dir():
            loaded: Any = datasets.load_from_disk(name)
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(name, split=split)
        features = rows.features
        images = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
        labels = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        if not images:
            raise ValueError(f"open_data: {name} must have an Image column, got {list(features)}")
        self._name, self._column = printable(name), images[0]
        self.notes = []
        if len(images) > 1:
            self.notes.append(f"of the image columns {', '.join(images)} the first is read")
        self.class_names: tuple[str, ...] | None = None
        self._labels: Tensor | None = None
        column = _label_column(labels, classes)
        if column is not None:
            values = np.array(rows[column][:], dtype=np.int64)
            found = of_numbers("open_data", values, features[column].names)
            self._labels, self.class_names = found
        # Not decoded by the library, which has other limits.
        self._rows = rows.cast_column(self._column, datasets.Image(decode=False))
        self._size = None if image_size is None else height_and_width(image_size)
        self._reading = Reading(value_range, alpha)
        self.image_shape = self._probe(channels)

    def __len__(self) -> int:
        return len(self._rows)

    def images(
        self, indices: Tensor, crops: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[str]]:
        """indices int64 [N] -> float32 [N, C, H, W] in [-1, 1], the indices, and no complaints.

        crops: as of `FileData.images`.
        """
        channels, *shape = self.image_shape
        arrays = []
        chosen = [None] * len(indices) if crops is None else crops.tolist()
        for index, crop in zip(indices.tolist(), chosen, strict=True):
            image = open_image(self._read(index), self._label(index))
            array = to_array(image, channels, self._size, self._reading, self._label(index), crop)
            if list(array.shape[:2]) != shape:
                raise ValueError(
                    f"open_data: image_size must be given where sizes differ, got "
                    f"{shape[1]}x{shape[0]} and {array.shape[1]}x{array.shape[0]}"
                )
            arrays.append(array)
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous(), indices, []

    def labels(self, indices: Tensor) -> Tensor | None:
        """indices: int64 [N]. Returns int64 [N], or None where the data has no classes."""
        return None if self._labels is None else self._labels[indices]

    def _label(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def _read(self, index: int) -> bytes:
        stored = self._rows[index][self._column]
        if stored.get("bytes") is not None:
            return stored["bytes"]
        try:
            return Path(stored["path"]).read_bytes()
        except (OSError, TypeError) as error:
            raise BadImage(f"{self._label(index)}: must be readable, got {error}") from error

    def _probe(self, channels: int | None) -> tuple[int, int, int]:
        chosen = np.unique(np.linspace(0, len(self) - 1, min(len(self), _PROBED)).astype(int))
        sizes: Counter[tuple[int, int]] = Counter()
        traits: Counter[str] = Counter()
        ranges, grey = Extremes(), True
        for index in chosen.tolist():
            image, found = look_at(self._read(index), self._label(index))
            to_array(image, 1, None, self._reading, self._label(index))
            ranges.add(image)
            traits.update(found)
            sizes[image.height, image.width] += 1
            grey = grey and is_grey(image)
        ranges.check(f"open_data: {self._name}", self._reading.value_range)
        self.notes += [f"{n} of {len(chosen)} images: {t}" for t, n in traits.items()]
        height, width = next(iter(sizes))
        if self._size is None and len(sizes) > 1:
            both = " and ".join(f"{w}x{h}" for h, w in list(sizes)[:2])
            raise ValueError(f"open_data: image_size must be given where sizes differ, got {both}")
        if self._size is not None:
            self.notes += resizing_note(sizes, self._size)
            height, width = self._size
        return (1 if grey else 3) if channels is None else channels, height, width


def _label_column(labels: list[str], classes: str) -> str | None:
    if classes == "none" or (classes == "auto" and not labels):
        return None
    if classes == "auto" and len(labels) == 1:
        return labels[0]
    if classes not in labels:
        raise ValueError(
            f"open_data: classes must be 'none' or one of the columns {', '.join(labels) or '(none)'}, "
            f"got {classes!r}"
        )
    return classes

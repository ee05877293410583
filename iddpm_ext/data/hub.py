"""Hugging Face data sets, through the optional `datasets` library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .image import is_grey, to_array


def is_saved_dataset(path: Path) -> bool:
    """Whether `path` is a folder written by `Dataset.save_to_disk`."""
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()


class HubData:
    """The images of a `datasets.Dataset` that has an `Image` column and, perhaps, a `ClassLabel` one.

    Args:
        name: "owner/name" on the hub, or the path of a folder written by `save_to_disk`.
        split: of the data set.
        image_size: side of the square that each image is brought to; None takes the first image's size.
        channels: 1 or 3; None looks at the first image.

    Raises:
        ImportError: `datasets` is not installed. ValueError: there is no image column.
    """

    def __init__(
        self,
        name: str,
        *,
        split: str = "train",
        image_size: int | None = None,
        channels: int | None = None,
    ):
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                "open_data: hf: sources need the library `datasets`: pip install iddpm-ext[data]"
            ) from error
        if Path(name).is_dir():
            loaded = datasets.load_from_disk(name)
            self._rows: Any = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            self._rows = datasets.load_dataset(name, split=split)
        features = self._rows.features
        images = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
        classes = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        if not images:
            raise ValueError(f"open_data: {name} must have an Image column, got {list(features)}")
        self._column = images[0]
        self.class_names = tuple(features[classes[0]].names) if classes else None
        self._labels = torch.tensor(self._rows[classes[0]][:]) if classes else None
        first = self._rows[0][self._column]
        self._size = image_size
        channels = (1 if is_grey(first) else 3) if channels is None else channels
        height, width = (first.height, first.width) if image_size is None else (image_size,) * 2
        self.image_shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, indices: Tensor) -> tuple[Tensor, Tensor, list[str]]:
        """indices int64 [N] -> float32 [N, C, H, W] in [-1, 1], the indices, and no complaints."""
        channels = self.image_shape[0]
        rows = self._rows[indices.tolist()][self._column]
        arrays = [to_array(image, channels, self._size) for image in rows]
        if (
            len({array.shape for array in arrays}) > 1
            or arrays[0].shape[:2] != self.image_shape[1:]
        ):
            raise ValueError("open_data: image_size must be given where sizes differ, got None")
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous(), indices, []

    def labels(self, indices: Tensor) -> Tensor | None:
        """indices: int64 [N]. Returns int64 [N], or None where the data has no classes."""
        return None if self._labels is None else self._labels[indices]

"""Images that are already one array: what every reader of a fixed-size format returns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .image import fit


class ArrayData:
    """Images in one array, with or without class labels.

    Args:
        images: [N, H, W], [N, H, W, C] or [N, C, H, W] with C of 1 or 3; uint8, uint16, or floating
            in [-1, 1]. May be memory-mapped: only what is asked for is read.
        labels: integers [N] from 0, or None.
        class_names: one a class; the numbers if not given.
        image_size: side of the square that each image is brought to; None keeps them as they are.

    Raises:
        ValueError or TypeError for anything else.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
        image_size: int | None = None,
    ):
        self._images = _channels_last(images)
        if images.dtype not in (np.uint8, np.uint16) and images.dtype.kind != "f":
            raise TypeError(
                f"ArrayData: images must be uint8, uint16 or floating, got {images.dtype}"
            )
        height, width = self._images.shape[1:3]
        self._size = (
            None if image_size in (None, height) and image_size in (None, width) else image_size
        )
        self._labels: Tensor | None = None
        self.class_names: tuple[str, ...] | None = None
        if labels is not None:
            self._labels, self.class_names = _check_labels(labels, len(images), class_names)

    def __len__(self) -> int:
        return len(self._images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, height, width, channels = self._images.shape
        return (channels, height, width) if self._size is None else (channels, *[self._size] * 2)

    def images(self, indices: Tensor) -> tuple[Tensor, Tensor, list[str]]:
        """The images of these indices.

        Args:
            indices: int64 [N].

        Returns:
            float32 [N, C, H, W] in [-1, 1]; the indices; and no complaints, since an array has no
            unreadable images.

        Raises:
            ValueError: floating images outside [-1, 1], or not finite.
        """
        values = self._images[indices.numpy()]
        unit = _to_signed_unit(values)
        if self._size is not None:
            unit = np.stack([_resized(image, self._size) for image in unit])
        return torch.from_numpy(unit).permute(0, 3, 1, 2).contiguous(), indices, []

    def labels(self, indices: Tensor) -> Tensor | None:
        """indices: int64 [N]. Returns int64 [N], or None where the data has no classes."""
        return None if self._labels is None else self._labels[indices]


def _to_signed_unit(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "u":
        return values.astype(np.float32) / np.float32(np.iinfo(values.dtype).max / 2) - 1
    if not (values.min() >= -1 and values.max() <= 1):
        raise ValueError(
            f"ArrayData: floating images must lie in [-1, 1], got {values.min()} .. {values.max()}"
        )
    return values.astype(np.float32)


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    planes = [fit(Image.fromarray(np.ascontiguousarray(p)), size) for p in image.transpose(2, 0, 1)]
    return np.clip(np.stack([np.asarray(plane) for plane in planes], axis=-1), -1, 1)


def _channels_last(images: np.ndarray) -> np.ndarray:
    """[N, H, W, C] for any of the layouts that ArrayData takes."""
    if images.ndim == 3:
        images = images[..., None]
    elif images.ndim == 4 and images.shape[-1] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            "ArrayData: images must have shape [N, H, W], [N, H, W, C] or [N, C, H, W] with C of 1 "
            f"or 3 and no size 0, got {list(images.shape)}"
        )
    return images


def _check_labels(
    labels: np.ndarray, count: int, class_names: Sequence[str] | None
) -> tuple[Tensor, tuple[str, ...]]:
    if labels.shape != (count,):
        raise ValueError(f"ArrayData: labels must have shape [{count}], got {list(labels.shape)}")
    if labels.dtype.kind not in "iu":
        raise TypeError(f"ArrayData: labels must be integers, got {labels.dtype}")
    low, high = int(labels.min()), int(labels.max())
    classes = high + 1 if class_names is None else len(class_names)
    if low < 0 or high >= classes:
        raise ValueError(f"ArrayData: labels must lie in [0, {classes - 1}], got {low} .. {high}")
    names = map(str, range(classes)) if class_names is None else class_names
    return torch.from_numpy(labels.astype(np.int64)), tuple(names)

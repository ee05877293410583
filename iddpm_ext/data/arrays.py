"""Images that are already arrays: what every reader of a fixed-size format returns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_signed_unit(values: np.ndarray) -> Tensor:
    """uint8 or uint16 levels, or floats already in [-1, 1], as float32 in [-1, 1], same shape."""
    if values.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(values)).float() / 127.5 - 1
    if values.dtype == np.uint16:
        return torch.from_numpy(values.astype(np.float32)) / 32767.5 - 1
    return torch.from_numpy(values.astype(np.float32))


class ArrayData:
    """Images in one array, with or without class labels.

    images: [N, H, W] or [N, H, W, C] with C of 1 or 3; uint8, uint16, or floating in [-1, 1].
    labels: integers [N] from 0, or None. class_names: one a class; the numbers if not given.
    Raises ValueError or TypeError for anything else.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
    ):
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
            raise ValueError(
                f"ArrayData: images must have shape [N, H, W] or [N, H, W, 1 or 3], none of it 0, "
                f"got {list(images.shape)}"
            )
        if images.dtype not in (np.uint8, np.uint16) and not np.issubdtype(
            images.dtype, np.floating
        ):
            raise TypeError(
                f"ArrayData: images must be uint8, uint16 or floating, got {images.dtype}"
            )
        self._images = images
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
        return channels, height, width

    def images(self, indices: Tensor) -> Tensor:
        """indices: int64 [N]. Returns float32 [N, C, H, W] in [-1, 1]."""
        return to_signed_unit(self._images[indices.numpy()]).permute(0, 3, 1, 2).contiguous()

    def labels(self, indices: Tensor) -> Tensor | None:
        """indices: int64 [N]. Returns int64 [N], or None where the data has no classes."""
        return None if self._labels is None else self._labels[indices]


def _check_labels(
    labels: np.ndarray, count: int, class_names: Sequence[str] | None
) -> tuple[Tensor, tuple[str, ...]]:
    if labels.shape != (count,):
        raise ValueError(f"ArrayData: labels must have shape [{count}], got {list(labels.shape)}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"ArrayData: labels must be integers, got {labels.dtype}")
    classes = int(labels.max()) + 1 if class_names is None else len(class_names)
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"ArrayData: labels must lie in [0, {classes - 1}], got {labels.min()} .. {labels.max()}"
        )
    names = map(str, range(classes)) if class_names is None else class_names
    return torch.from_numpy(labels.astype(np.int64)), tuple(names)

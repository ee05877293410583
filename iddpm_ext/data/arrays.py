"""Images in one array, as every reader of a fixed-size format returns them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iddpm_ext.sizes import ImageSize, height_and_width

from .classes import of_numbers
from .image import fit, random_crop
from .values import Range, choose_range, extremes, to_signed_unit

ARRAY_CLASSES = ("auto", "ids", "none")


class ArrayData:
    """Images in one array, with or without class labels.

    Args:
        images: [N, H, W], [N, H, W, C] or [N, C, H, W] with C of 1 or 3; uint8, uint16, or floating
            in [-1, 1], or of the `value_range`. May be memory-mapped: only requested images are read, except
            that floating values are all checked once.
        labels: integers [N] from 0, or None.
        class_names: one per class; the numbers if not given.
        image_size: side, or (height, width), that each image is resized to; None keeps them as they are.
        value_range: the values of black and white; None: those of the type, if that is unambiguous.
        classes: "auto"; "ids" makes a class of each different label, whatever the numbers; "none" ignores
            labels.
        notes: messages about the data.

    Raises:
        ValueError or TypeError for anything else.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
        image_size: ImageSize | None = None,
        *,
        value_range: Range | None = None,
        classes: str = "auto",
        notes: Sequence[str] = (),
    ):
        if classes not in ARRAY_CLASSES:
            raise ValueError(
                f"ArrayData: classes must be one of {', '.join(ARRAY_CLASSES)}, got {classes!r}"
            )
        if images.dtype.kind not in "buif":
            raise TypeError(f"ArrayData: images must be numbers, got {images.dtype}")
        self._images = _channels_last(images)
        #: The type of the values, and the smallest and largest of those that were checked.
        self.dtype = images.dtype
        self.extremes = extremes(self._images)
        self._range = choose_range("ArrayData: images", images.dtype, self.extremes, value_range)
        height, width = self._images.shape[1:3]
        size = (height, width) if image_size is None else height_and_width(image_size)
        self._size = None if size == (height, width) else size
        self._labels: Tensor | None = None
        self.class_names: tuple[str, ...] | None = None
        self.notes = list(notes)
        if self._size is not None:
            self.notes.append(
                f"images of {width}x{height} are resized and cropped to {self._size[1]}x{self._size[0]}"
            )
        if labels is not None and classes != "none":
            if labels.shape != (len(images),):
                raise ValueError(
                    f"ArrayData: labels must have shape [{len(images)}], got {list(labels.shape)}"
                )
            found = of_numbers("ArrayData", labels, class_names, ids=classes == "ids")
            self._labels, self.class_names = found

    def __len__(self) -> int:
        return len(self._images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, height, width, channels = self._images.shape
        return (channels, height, width) if self._size is None else (channels, *self._size)

    def images(
        self, indices: Tensor, crops: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[str]]:
        """The images of these indices.

        Args:
            indices: int64 [N].
            crops: as of `FileData.images`.

        Returns:
            float32 [N, C, H, W] in [-1, 1]; the indices; and an empty list, since an array has no unreadable
            images.

        Raises:
            ValueError: values outside the range.
        """
        values = self._images[indices.numpy()]
        unit = to_signed_unit("ArrayData: images", values, self._range)
        if self._size is not None or crops is not None:
            _, *size = self.image_shape
            chosen = [None] * len(unit) if crops is None else crops.tolist()
            unit = np.stack(
                [
                    _resized(image, (size[0], size[1]), crop)
                    for image, crop in zip(unit, chosen, strict=True)
                ]
            )
        return torch.from_numpy(unit).permute(0, 3, 1, 2).contiguous(), indices, []

    def labels(self, indices: Tensor) -> Tensor | None:
        """indices: int64 [N]. Returns int64 [N], or None where the data has no classes."""
        return None if self._labels is None else self._labels[indices]


def _resized(image: np.ndarray, size: tuple[int, int], crop: Sequence[float] | None) -> np.ndarray:
    whole = [Image.fromarray(np.ascontiguousarray(plane)) for plane in image.transpose(2, 0, 1)]
    planes = [fit(p, size) if crop is None else random_crop(p, size, crop) for p in whole]
    return np.clip(np.stack([np.asarray(plane) for plane in planes], axis=-1), -1, 1)


def _channels_last(images: np.ndarray) -> np.ndarray:
    """images as [N, H, W, C], from any of the layouts of `ArrayData`."""
    if images.ndim == 3 and images.shape[-1] in (1, 3):
        raise ValueError(
            "ArrayData: images must be [N, H, W, C] where they have channels, also one image alone, got "
            f"{list(images.shape)}"
        )
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

"""The images whose likelihood is computed: 8-bit levels in [-1, 1], with their labels."""

from __future__ import annotations

import os
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from iddpm_ext.data import ImageData, Order, open_data
from iddpm_ext.sizes import ImageSize

# Tolerance in levels, for float32 and for other people's arithmetic on the way to [-1, 1].
_ROUNDING = 1e-2
#: What `nll` takes: images in a tensor, opened data, or a path to open.
Data = Tensor | ImageData | str | os.PathLike[str]


class Images(NamedTuple):
    """x_0: float32 [N, C, H, W], 8-bit levels in [-1, 1]. labels: int64 [N], or None.

    class_names: the names of the labels, or None. used: the labels that occur in the whole data.
    """

    x_0: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...] | None = None
    used: tuple[int, ...] = ()


def read_images(
    data: Data,
    *,
    who: str,
    split: str,
    limit: int | None,
    size: ImageSize | None,
    shuffle: bool = False,
) -> Images:
    """All images of `data`, or the first `limit`; images from files are resized to `size`.

    shuffle: take `limit` images of opened data at random, always the same ones.

    The bound is for 8-bit images. A tensor must hold such levels; images from files that do not (16 bits,
    resized) are rounded to them with a warning. There are also warnings of all that reading skips or changes.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"{who}: limit must be an int above 0, got {limit!r}")
    if isinstance(data, Tensor):
        _check_tensor(who, data)
        return Images(data[:limit].detach().float(), None)
    if isinstance(data, (str, os.PathLike)):
        data = open_data(os.fspath(data), split=split, image_size=size, bad_images="stop")
    if not hasattr(data, "images") or not hasattr(data, "labels"):
        raise TypeError(f"{who}: data must be a tensor, a path or image data, got {type(data)}")
    for note in getattr(data, "notes", ()):
        warnings.warn(f"{who}: {note}", stacklevel=4)
    count = len(data) if limit is None else min(limit, len(data))
    indices = torch.arange(count, dtype=torch.int64, device="cpu")
    if shuffle:
        indices = Order(len(data), seed=0).at(indices)
    given = (torch.cat([data.images(part)[0] for part in indices.split(256)]) + 1) * 127.5
    levels = given.round()
    if bool(((given - levels).abs() > _ROUNDING).any()):
        warnings.warn(
            f"{who}: images are rounded to the 256 levels of the bound, as they have others",
            stacklevel=4,
        )
    labels = data.labels(indices)
    if labels is None or data.class_names is None:
        return Images(levels / 127.5 - 1, None)
    every = data.labels(torch.arange(len(data), dtype=torch.int64, device="cpu"))
    used = tuple(every.unique().tolist()) if every is not None else ()
    return Images(levels / 127.5 - 1, labels, data.class_names, used)


def _check_tensor(who: str, data: Tensor) -> None:
    if not data.is_floating_point():
        raise TypeError(f"{who}: data must be floating in [-1, 1], got {data.dtype}")
    if data.dim() != 4 or 0 in data.shape:
        raise ValueError(f"{who}: data must be [N, C, H, W], got {list(data.shape)}")
    low, high = float(data.min()), float(data.max())
    if not (low >= -1 and high <= 1):
        raise ValueError(f"{who}: data must lie in [-1, 1], got {low:g} .. {high:g}")
    for part in data.split(256):
        levels = (part.double() + 1) * 127.5
        wrong = (levels - levels.round()).abs() > _ROUNDING
        if bool(wrong.any()):
            value = float(part[wrong][0])
            raise ValueError(
                f"{who}: data must hold the 256 levels k / 127.5 - 1, got {value:.6g}: a scale other "
                f"than [-1, 1], or images that are not 8-bit"
            )

"""Sizes of images as users give them: a side, or height and width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: The side of a square, or (height, width).
ImageSize = int | tuple[int, int]


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """(height, width) of a size."""
    return (size, size) if isinstance(size, int) else size


def checked_size(who: str, size: int | Sequence[int]) -> ImageSize:
    """The size: of a square its side, however it was given.

    Raises TypeError or ValueError for what is no size, in the name of `who`.
    """
    sides: list[Any] = list(size) if isinstance(size, (list, tuple)) else [size]
    for side in sides:
        if isinstance(side, bool) or not isinstance(side, int):
            raise TypeError(f"{who}: image_size must be an integer, or two, got {size!r}")
        if side < 1:
            raise ValueError(f"{who}: image_size must be at least 1, got {side}")
    if len(sides) not in (1, 2):
        raise ValueError(f"{who}: image_size must be a side, or height and width, got {size!r}")
    return sides[0] if len(set(sides)) == 1 else (sides[0], sides[1])

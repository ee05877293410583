"""The meaning of an image's numbers: which of them is black and which is white."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

#: (black, white)
Range = tuple[float, float]

# Cameras and scanners use 10, 12 or 14 of 16 bits, rarely all. Values below this leave the top two unused.
_DEEP = 1 << 14
_CHUNK_BYTES = 1 << 24
_PROBED = 64


def check_value_range(value_range: object) -> Range | None:
    """The argument `value_range` of readers: None, or two finite numbers, black below white."""
    if value_range is None:
        return None
    try:
        low, high = (float(v) for v in value_range)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        low = high = np.nan
    if not (np.isfinite([low, high]).all() and low < high):
        raise ValueError(
            f"open_data: value_range must be two numbers, those of black and white, got {value_range!r}"
        )
    return low, high


def choose_range(who: str, dtype: np.dtype, found: Range, given: Range | None) -> Range:
    """The values of black and white for images of this type, with values from found[0] to found[1].

    Raises ValueError if values are not finite or outside `given`; and without `given` if more than one range
    is likely, naming them.
    """
    low, high = found
    if not np.isfinite([low, high]).all():
        raise ValueError(f"{who} must be finite, got values {low} .. {high}")
    if given is not None:
        if low < given[0] or high > given[1]:
            raise ValueError(
                f"{who} must lie in the value_range {given[0]:g},{given[1]:g}, "
                f"got values {low:g} .. {high:g}"
            )
        if dtype == np.uint8 and (given[0] < 0 or given[1] > 255):
            raise ValueError(
                f"{who} must have values of the value_range {given[0]:g},{given[1]:g}, got 8 bits"
            )
        return given
    if dtype.kind == "b":
        return 0.0, 1.0
    likely = _likely(dtype, low, high)
    if len(likely) > 1:
        ways = " or ".join(f"{a:g},{b:g}" for a, b in likely)
        raise ValueError(
            f"{who} must have a value_range that says which values are black and white ({ways}?) for "
            f"{dtype} between {low:g} and {high:g}, got None"
        )
    return likely[0]


def _likely(dtype: np.dtype, low: float, high: float) -> list[Range]:
    """The likely ranges for values of this type between these extremes."""
    if dtype == np.uint8:
        return [(0, 1), (0, 255)] if high == 1 else [(0, 255)]
    if dtype == np.uint16:
        # The smallest sufficient number of bits, at least 8.
        bits = max(8, int(high).bit_length())
        return [(0, 2**bits - 1), (0, 65535)] if high < _DEEP else [(0, 65535)]
    if dtype.kind == "f" and low >= -1 and high <= 1:
        return [(-1, 1)] if low < 0 else [(0, 1), (-1, 1)]
    if low >= 0:
        limits = [255.0] if high <= 255 else []
        limits += [high, 65535 if high <= 65535 else 2.0 ** int(high).bit_length() - 1]
        return [(0.0, limit) for limit in dict.fromkeys(limits)][:2]
    ways = [(low, high), (low, -low), (0.0, high) if high > 0 else (low, 0.0)]
    if dtype.kind == "i":
        ways.insert(0, (float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)))
    return list(dict.fromkeys(ways))[:2]


def extremes(images: np.ndarray) -> Range:
    """The smallest and the largest value (NaN if any is NaN).

    Of all images if they are floating; of 64 spread over the data if they are integers, which are all valid.
    """
    if images.dtype.kind in "ub" and images.dtype.itemsize <= 2:
        chosen = np.unique(np.linspace(0, len(images) - 1, _PROBED).astype(np.int64))
        parts: Iterator[np.ndarray] = (images[i] for i in chosen)
    else:
        rows = max(1, _CHUNK_BYTES // max(1, images[0].nbytes))
        parts = (images[i : i + rows] for i in range(0, len(images), rows))
    found = [(float(part.min()), float(part.max())) for part in parts]
    lows, highs = zip(*found, strict=True)
    return float(np.min(lows)), float(np.max(highs))


def to_signed_unit(who: str, values: np.ndarray, value_range: Range) -> np.ndarray:
    """float32 in [-1, 1]: black is -1, white is 1. Raises ValueError for values outside the range."""
    low, high = value_range
    least, most = values.min(), values.max()
    if not (least >= low and most <= high):
        raise ValueError(f"{who} must lie in {low:g} .. {high:g}, got values {least} .. {most}")
    if value_range == (-1, 1):
        return values.astype(np.float32)
    exact = values.dtype.kind in "ub" and values.dtype.itemsize <= 2
    wide = values.astype(np.float32 if exact else np.float64)
    return ((wide - low) / ((high - low) / 2) - 1).astype(np.float32)

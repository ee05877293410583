"""Checks data for problems before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from .arrays import ArrayData
from .containers import Container
from .files import Extremes, FileData, Listing, list_images
from .hub import is_saved_dataset
from .image import BadImage, Reading, UnclearImage, bit_depth, is_grey, look_at, to_array
from .names import printable
from .source import ImageData, file_source, open_data
from .values import Range, check_value_range

_LISTED = 20
_CHUNK = 1000


@dataclass
class DataReport:
    """The result of `check_data`. Counters map a property to the number of images that have it.

    values: smallest and largest, by type. unclear: what reading would refuse because it is ambiguous, with
    the possible meanings. notes: what reading skips or changes.
    """

    path: str
    images: int = 0
    unreadable: list[str] = field(default_factory=list)
    sizes: Counter[str] = field(default_factory=Counter)
    channels: Counter[str] = field(default_factory=Counter)
    bits: Counter[str] = field(default_factory=Counter)
    values: dict[str, Range] = field(default_factory=dict)
    classes: Counter[str] = field(default_factory=Counter)
    unclear: list[str] = field(default_factory=list)
    empty_classes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether training can use every image."""
        return not (self.unreadable or self.unclear or self.empty_classes)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.images} images, {len(self.unreadable)} unreadable"]
        for title in ("sizes", "channels", "bits", "classes"):
            counts: Counter[str] = getattr(self, title)
            if counts:
                shown = ", ".join(f"{name} ({n})" for name, n in counts.most_common(_LISTED))
                more = f", and {len(counts) - _LISTED} more" if len(counts) > _LISTED else ""
                lines.append(f"  {title}: {shown}{more}")
        if self.values:
            ranges = (f"{low:g} .. {high:g} ({kind})" for kind, (low, high) in self.values.items())
            lines.append(f"  values: {', '.join(ranges)}")
        for title, found in (
            ("empty class", self.empty_classes),
            ("unclear", self.unclear),
            ("unreadable", self.unreadable),
        ):
            lines += [f"  {title}: {line}" for line in found[:_LISTED]]
            if len(found) > _LISTED:
                lines.append(f"  {title}: {len(found) - _LISTED} more")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def check_data(
    path: str | Path,
    *,
    split: str = "train",
    classes: str = "auto",
    value_range: Sequence[float] | None = None,
    alpha: str = "refuse",
) -> DataReport:
    """Reads every image of one split and reports its properties, unreadable images, and what reading changes.

    Args:
        path, split, classes, value_range, alpha: as `open_data` takes them.

    Raises:
        FileNotFoundError or ValueError: there is nothing to check.
    """
    is_hub = str(path).startswith("hf:") or is_saved_dataset(Path(path))
    source = None if is_hub else file_source(path)
    if source is None:
        data = open_data(path, split=split, classes=classes, value_range=value_range, alpha=alpha)
        report = DataReport(printable(str(path)), images=len(data), notes=list(data.notes))
        _check_arrays(data, report)
    else:
        listing = list_images(source, split, classes)
        report = DataReport(
            printable(str(path)), images=len(listing.names), notes=list(listing.notes)
        )
        _check_files(source, listing, report, check_value_range(value_range), alpha)
    _add_notes(report)
    return report


def empty_classes(data: ImageData) -> list[str]:
    """The classes without an image: folders without a file, or labels that do not occur."""
    if isinstance(data, FileData) and data.empty_classes:
        return data.empty_classes
    names = data.class_names
    labels = data.labels(torch.arange(len(data), dtype=torch.int64, device="cpu"))
    if labels is None or names is None:
        return []
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    return [name for name, count in zip(names, counts, strict=True) if not count]


def _check_files(
    source: Container,
    listing: Listing,
    report: DataReport,
    value_range: Range | None,
    alpha: str,
) -> None:
    reading, ranges = Reading(value_range, alpha), Extremes()
    traits: Counter[str] = Counter()
    where = printable(str(source.path))
    for i, name in enumerate(listing.names):
        label = f"{where}/{printable(name)}"
        try:
            image, found = look_at(source.read(name), label)
            to_array(image, 1, None, reading, label)
        except UnclearImage as error:
            report.unclear.append(str(error))
        except BadImage as error:
            report.unreadable.append(str(error))
            continue
        report.sizes[f"{image.width}x{image.height}"] += 1
        report.channels[_channels(image, is_grey(image))] += 1
        report.bits[str(bit_depth(image))] += 1
        traits.update(found)
        ranges.add(image)
        if listing.classes is not None:
            report.classes[listing.classes.names[int(listing.classes.labels[i])]] += 1
    try:
        ranges.check("images", value_range)
    except ValueError as error:
        report.unclear.append(str(error))
    report.values = {str(dtype): found for dtype, found in ranges.found.items()}
    report.notes += [f"{count} images: {trait}" for trait, count in traits.items()]
    report.empty_classes = list(listing.empty)
    if listing.classes is not None:
        report.empty_classes += [name for name in listing.classes.names if not report.classes[name]]


def _channels(image: Image.Image, grey: bool) -> str:
    name = "1" if grey else "4 (CMYK)" if image.mode == "CMYK" else "3"
    return f"{name} + alpha" if image.has_transparency_data else name


def _check_arrays(data: ImageData, report: DataReport) -> None:
    channels, height, width = data.image_shape
    report.sizes[f"{width}x{height}"] = report.images
    report.channels[str(channels)] = report.images
    for first in range(0, len(data), _CHUNK):
        last = min(first + _CHUNK, len(data))
        indices = torch.arange(first, last, dtype=torch.int64, device="cpu")
        try:
            data.images(indices)
        except ValueError as error:
            report.unreadable.append(f"images {first} to {last - 1}: {error}")
        labels = data.labels(indices)
        if labels is not None and data.class_names is not None:
            report.classes.update(data.class_names[label] for label in labels.tolist())
    report.empty_classes = empty_classes(data)
    if isinstance(data, ArrayData):
        report.values = {str(data.dtype): data.extremes}


def _add_notes(report: DataReport) -> None:
    if len(report.sizes) > 1:
        report.notes.append("sizes differ: training needs --image-size")
    elif report.sizes and len(set(next(iter(report.sizes)).split("x"))) > 1:
        report.notes.append("images are not square: --image-size crops the middle")
    if len(report.channels) > 1:
        report.notes.append("grey and colour images are mixed: all are read as colour")
    if any("alpha" in name for name in report.channels):
        report.notes.append("alpha channels are dropped where all pixels are opaque")
    if not report.classes:
        report.notes.append("no classes found: --class-cond would be refused")

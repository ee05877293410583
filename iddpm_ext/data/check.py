"""What would go wrong in training on these images, found out before."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .files import FileData, class_of_each
from .image import BadImage, bit_depth, is_grey, open_image
from .source import ImageData, open_data

_LISTED = 20
_CHUNK = 1000


@dataclass
class DataReport:
    """What `check_data` found. Counters map a property to the number of images that have it."""

    path: str
    images: int = 0
    unreadable: list[str] = field(default_factory=list)
    sizes: Counter[str] = field(default_factory=Counter)
    channels: Counter[str] = field(default_factory=Counter)
    bits: Counter[str] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    empty_classes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether training would meet every image as it expects it."""
        return not self.unreadable and not self.empty_classes

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.images} images, {len(self.unreadable)} unreadable"]
        for title in ("sizes", "channels", "bits", "classes"):
            counts: Counter[str] = getattr(self, title)
            if counts:
                shown = ", ".join(f"{name} ({n})" for name, n in counts.most_common(_LISTED))
                more = f", and {len(counts) - _LISTED} more" if len(counts) > _LISTED else ""
                lines.append(f"  {title}: {shown}{more}")
        lines += [f"  empty class: {name}" for name in self.empty_classes]
        lines += [f"  unreadable: {line}" for line in self.unreadable[:_LISTED]]
        if len(self.unreadable) > _LISTED:
            lines.append(f"  and {len(self.unreadable) - _LISTED} more unreadable")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def check_data(path: str | Path, *, split: str = "train") -> DataReport:
    """Reads every image of one split and tells what they are and which cannot be read.

    Args:
        path: what `open_data` takes.
        split: "train" or "test".

    Raises:
        FileNotFoundError or ValueError: there is nothing that could be checked.
    """
    data = open_data(path, split=split)
    report = DataReport(str(path), images=len(data))
    if isinstance(data, FileData):
        _check_files(data, report)
    else:
        _check_arrays(data, report)
    _add_notes(report)
    return report


def empty_classes(data: ImageData) -> list[str]:
    """The classes without an image: folders without a file, or labels that do not occur."""
    if isinstance(data, FileData):
        return data.source.empty_folders()
    labels = data.labels(torch.arange(len(data)))
    if labels is None or data.class_names is None:
        return []
    counts = torch.bincount(labels, minlength=len(data.class_names)).tolist()
    return [name for name, count in zip(data.class_names, counts, strict=True) if not count]


def _check_files(data: FileData, report: DataReport) -> None:
    classes = class_of_each(data.names)
    for i, name in enumerate(data.names):
        label = f"{data.source.path}/{name}"
        try:
            image = open_image(data.source.read(name), label)
        except BadImage as error:
            report.unreadable.append(str(error))
            continue
        report.sizes[f"{image.width}x{image.height}"] += 1
        report.channels[_channels(image.mode, is_grey(image))] += 1
        report.bits[str(bit_depth(image))] += 1
        if classes is not None:
            report.classes[classes[i]] += 1
    report.empty_classes = empty_classes(data)
    if classes is not None:
        report.empty_classes += sorted(set(classes) - set(report.classes))


def _channels(mode: str, grey: bool) -> str:
    name = "1" if grey else "4 (CMYK)" if mode == "CMYK" else "3"
    return f"{name} + alpha" if mode in ("RGBA", "LA", "PA", "RGBa", "La") else name


def _check_arrays(data: ImageData, report: DataReport) -> None:
    channels, height, width = data.image_shape
    report.sizes[f"{width}x{height}"] = report.images
    report.channels[str(channels)] = report.images
    for first in range(0, len(data), _CHUNK):
        indices = torch.arange(first, min(first + _CHUNK, len(data)))
        try:
            data.images(indices)
        except ValueError as error:
            report.unreadable.append(f"images {first} to {int(indices[-1])}: {error}")
        labels = data.labels(indices)
        if labels is not None and data.class_names is not None:
            report.classes.update(data.class_names[label] for label in labels.tolist())
    report.empty_classes = empty_classes(data)


def _add_notes(report: DataReport) -> None:
    if len(report.sizes) > 1:
        report.notes.append("sizes differ: training needs --image-size")
    elif report.sizes and len(set(next(iter(report.sizes)).split("x"))) > 1:
        report.notes.append("images are not square: --image-size crops the middle")
    if len(report.channels) > 1:
        report.notes.append("grey and colour images are mixed: all are read as colour")
    if any("alpha" in name for name in report.channels):
        report.notes.append("alpha channels are dropped; the colour below them shows")
    if not report.classes:
        report.notes.append("no classes found: --class-cond would be refused")

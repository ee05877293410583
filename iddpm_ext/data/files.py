"""Folders, archives and databases of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iddpm_ext.sizes import ImageSize, height_and_width

from .classes import Labelled, of_names
from .containers import Container
from .image import (
    ALPHA,
    BadImage,
    Reading,
    UnclearImage,
    deep_values,
    is_deep,
    is_grey,
    look_at,
    open_image,
    to_array,
)
from .label_file import find_label_file, read_label_file
from .lmdb_file import Lmdb
from .names import (
    CLASSES,
    EXTENSIONS,
    class_of_each,
    empty_class_folders,
    images_among,
    in_split,
    printable,
)
from .shards import LABEL_SUFFIXES, Shards
from .values import Range, choose_range

BAD_IMAGES = ("skip", "stop")
_PROBED = 64


class Listing(NamedTuple):
    """The images of a source.

    names: sorted. classes: of each image, or None. empty: folders of classes without a file. notes: messages
    on what a user may not expect.
    """

    names: list[str]
    classes: Labelled | None
    empty: list[str]
    notes: list[str]


def list_images(source: Container, split: str, classes: str) -> Listing:
    """The images of a split with their classes, by names alone, without opening them.

    Raises ValueError if there are none, or if it is ambiguous which they are.
    """
    if classes not in CLASSES:
        raise ValueError(f"open_data: classes must be one of {', '.join(CLASSES)}, got {classes!r}")
    survey = source.survey()
    bare = isinstance(source, Lmdb)
    files = survey.files
    if isinstance(source, Shards):
        files = [name for name in files if not name.endswith(LABEL_SUFFIXES)]
    images, notes = (files, []) if bare else images_among(files)
    if not images:
        raise ValueError(
            f"open_data: path must hold image files ({', '.join(EXTENSIONS)}), "
            f"got {printable(str(source.path))}"
        )
    names, more = in_split(images, split)
    notes = [*survey.notes, *notes, *more]
    if isinstance(source, Shards):
        source.require_one_image_a_key(names)
    if classes == "none":
        return Listing(names, None, [], notes)
    found: Labelled | None = None
    empty: list[str] = []
    label_file = (
        find_label_file(survey.files, names) if classes in ("auto", "file", "ids") else None
    )
    if label_file is not None:
        data = source.read(label_file)
        found, more = read_label_file(data, label_file, names, ids=classes == "ids")
        notes += more
    if found is None and isinstance(source, Shards) and classes in ("auto", "file", "ids"):
        found, more = source.labels(names, ids=classes == "ids")
        notes += more
    if found is None and classes in ("file", "ids"):
        raise ValueError(
            f"open_data: classes must be other than {classes!r} for images without a dataset.json (in a "
            f"tar, .cls or .json files) that labels them, got {printable(str(source.path))}"
        )
    if found is None and classes == "auto" and isinstance(source, Shards) and source.prefixed:
        notes.append("names occur in several shards: folders in them are taken for no classes")
    elif found is None:
        each, more = class_of_each(names, classes)
        notes += more
        if each is not None:
            found = of_names(each)
            empty = empty_class_folders(survey.folders, survey.files, names)
    return Listing(names, found, empty, notes)


class FileData:
    """Images in files, decoded on request.

    Args:
        source: a `Folder`, a `Zip`, `Shards` or an `Lmdb`.
        split: "train" or "test"; if the top folders have such names, only the one of this name is read. With
            "all" such folders are not splits.
        image_size: side, or (height, width), that each image is resized to; None requires equal sizes: those
            of 64 images spread over the data are compared, and images of other sizes count as unreadable.
        channels: 1 or 3; None takes 1 if all of the first images are grey.
        bad_images: "skip" replaces an unreadable image by the next readable one and names it;
            "stop" raises BadImage.
        classes: "auto": those of a dataset.json, else the first folders below the split, or else the file
            names up to the first "_" (the original's rule), if that gives at least two classes with two
            images each on average. "folders", "names", "file" (dataset.json), "ids" (arbitrary numbers in
            dataset.json) and "none" select a source.
        value_range: the values of black and white in files of more than 8 bits, or of masks; None: 0 and
            65535 for 16 bits, if that is unambiguous.
        alpha: "refuse" images with transparent pixels; or "drop" the transparency, or composite images over
            "black" or "white".

    notes: one line for everything in the files that is skipped or changed.

    Raises:
        ValueError: no images, no readable ones among those 64, different sizes without image_size, or
        ambiguous values.
    """

    def __init__(
        self,
        source: Container,
        *,
        split: str = "train",
        image_size: ImageSize | None = None,
        channels: int | None = None,
        bad_images: str = "skip",
        classes: str = "auto",
        value_range: Range | None = None,
        alpha: str = "refuse",
    ):
        if bad_images not in BAD_IMAGES:
            raise ValueError(
                f"open_data: bad_images must be one of {', '.join(BAD_IMAGES)}, got {bad_images!r}"
            )
        if alpha not in ALPHA:
            raise ValueError(f"open_data: alpha must be one of {', '.join(ALPHA)}, got {alpha!r}")
        listing = list_images(source, split, classes)
        self.source, self._stop = source, bad_images == "stop"
        self.names, self.empty_classes = listing.names, listing.empty
        self.class_names = None if listing.classes is None else listing.classes.names
        self._labels = None if listing.classes is None else listing.classes.labels
        self._size = None if image_size is None else height_and_width(image_size)
        self._reading = Reading(value_range, alpha)
        self.notes = listing.notes
        self.image_shape = self._probe(channels)

    def __len__(self) -> int:
        return len(self.names)

    def images(
        self, indices: Tensor, crops: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[str]]:
        """The images of these indices.

        Args:
            indices: int64 [N].
            crops: of each image three numbers in [0, 1), [N, 3], for a random crop in place of the middle;
                only where an image_size was given.

        Returns:
            float32 [N, C, H, W] in [-1, 1]; their indices, which differ from the requested ones where an
            image was unreadable; and a line for every unreadable one.

        Raises:
            BadImage: an unreadable image with bad_images="stop", or too many in a row.
        """
        complaints: list[str] = []
        chosen = [None] * len(indices) if crops is None else crops.tolist()
        found = [
            self._nearest(index, complaints, crop)
            for index, crop in zip(indices.tolist(), chosen, strict=True)
        ]
        stacked = np.stack([array for array, _ in found]).transpose(0, 3, 1, 2)
        used = torch.tensor([index for _, index in found], dtype=torch.int64, device="cpu")
        return torch.from_numpy(np.ascontiguousarray(stacked)), used, complaints

    def labels(self, indices: Tensor) -> Tensor | None:
        """indices: int64 [N]. Returns int64 [N], or None where the data has no classes."""
        return None if self._labels is None else self._labels[indices]

    def label(self, index: int) -> str:
        """The name of an image in messages."""
        return f"{printable(str(self.source.path))}/{printable(self.names[index])}"

    def _nearest(
        self, index: int, complaints: list[str], crop: Sequence[float] | None
    ) -> tuple[np.ndarray, int]:
        for offset in range(min(len(self), 1000)):
            candidate = (index + offset) % len(self)
            try:
                return self._decode(candidate, crop), candidate
            except BadImage as error:
                if self._stop:
                    raise
                complaints.append(str(error))
        raise BadImage(
            f"{printable(str(self.source.path))}: must hold readable images, got {complaints[-1]}"
        )

    def _decode(self, index: int, crop: Sequence[float] | None) -> np.ndarray:
        label = self.label(index)
        channels, *size = self.image_shape
        image = open_image(self.source.read(self.names[index]), label)
        array = to_array(image, channels, self._size, self._reading, label, crop)
        if list(array.shape[:2]) != size:
            raise BadImage(
                f"{label}: must be {size[1]}x{size[0]} like the others, or image_size given, "
                f"got {array.shape[1]}x{array.shape[0]}"
            )
        return array

    def _probe(self, channels: int | None) -> tuple[int, int, int]:
        """(C, H, W), from images spread over the data; raises what is ambiguous in one of them."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(len(self), _PROBED)).astype(int))
        problem = ""
        sizes: Counter[tuple[int, int]] = Counter()
        traits: Counter[str] = Counter()
        ranges = Extremes()
        grey = True
        for index in chosen.tolist():
            label = self.label(index)
            try:
                image, found = look_at(self.source.read(self.names[index]), label)
                to_array(image, 1, None, self._reading, label)
            except UnclearImage as error:
                raise ValueError(f"open_data: {error}") from None
            except BadImage as error:
                if self._stop:
                    raise
                problem = str(error)
                continue
            ranges.add(image)
            own = (image.height, image.width)
            if self._size is None and sizes and own not in sizes:
                first = next(iter(sizes))
                raise ValueError(
                    "open_data: image_size must be given where sizes differ, got "
                    f"{first[1]}x{first[0]} and {own[1]}x{own[0]} in {label}"
                )
            sizes[own] += 1
            traits.update(found)
            grey = grey and is_grey(image)
        if not sizes:
            raise BadImage(f"open_data: path must hold readable images, got {problem}")
        ranges.check(f"open_data: {printable(str(self.source.path))}", self._reading.value_range)
        self.notes = [
            *self.notes,
            *(f"{n} of {len(chosen)} images: {t}" for t, n in traits.items()),
        ]
        if self._size is None:
            height, width = next(iter(sizes))
        else:
            height, width = self._size
            self.notes += resizing_note(sizes, self._size)
        return (1 if grey else 3) if channels is None else channels, height, width


class Extremes:
    """The smallest and largest values of 8-bit images and of deeper ones, by which they are interpreted."""

    def __init__(self) -> None:
        self.found: dict[np.dtype, Range] = {}

    def add(self, image: Image.Image) -> None:
        """Adds an opened image; indices of palettes do not count."""
        values = deep_values(image) if is_deep(image) else np.asarray(image)
        if image.mode in ("1", "P", "PA"):
            return
        low, high = self.found.get(values.dtype, (np.inf, -np.inf))
        least, most = float(values.min()), float(values.max())
        self.found[values.dtype] = (min(low, least), max(high, most))

    def check(self, who: str, given: Range | None) -> None:
        """ValueError if it is ambiguous which values are black and white."""
        for dtype, found in self.found.items():
            choose_range(f"{who}: images", dtype, found, given)


def resizing_note(sizes: Counter[tuple[int, int]], size: tuple[int, int]) -> list[str]:
    """The message on sizes (H, W) that are not `size`."""
    others = [f"{w}x{h}" for (h, w), _ in sizes.most_common() if (h, w) != size]
    if not others:
        return []
    more = f" and {len(others) - 3} other sizes" if len(others) > 3 else ""
    return [
        f"images of {', '.join(others[:3])}{more} are resized and cropped to {size[1]}x{size[0]}"
    ]

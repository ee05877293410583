"""Folders and zip archives of images."""

from __future__ import annotations

import os
import zipfile
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from .image import BadImage, is_grey, open_image, to_array

EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
BAD_IMAGES = ("skip", "stop")
_SPLITS = {"train": ("train", "training"), "test": ("test", "val", "validation", "valid")}
# A member that claims to be larger is refused unread.
_MAX_FILE_BYTES = 1 << 29
_PROBED = 64


class Folder:
    """The files below a directory, by their path relative to it."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        """Relative POSIX paths of all files, sorted."""
        found = [p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()]
        return sorted(found)

    def empty_folders(self) -> list[str]:
        """Relative paths of the sub-folders without any file, sorted."""
        folders = [p for p in self.path.rglob("*") if p.is_dir()]
        empty = [p for p in folders if not any(q.is_file() for q in p.rglob("*"))]
        return sorted(p.relative_to(self.path).as_posix() for p in empty)

    def read(self, name: str) -> bytes:
        """The bytes of one file; BadImage when it cannot be read."""
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise BadImage(f"{self.path / name}: must be readable, got {error}") from error


class Zip:
    """The members of a zip archive. Nothing is extracted; every process opens the archive for itself."""

    def __init__(self, path: Path):
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        self._archive()

    def names(self) -> list[str]:
        """Names of all file members, sorted."""
        return sorted(i.filename for i in self._archive().infolist() if not i.is_dir())

    def empty_folders(self) -> list[str]:
        """Names of the directory members under which no file is, sorted."""
        files = self.names()
        folders = [i.filename for i in self._archive().infolist() if i.is_dir()]
        empty = []
        for folder in folders:
            first = bisect_left(files, folder)  # what is in the folder comes from there on
            if not any(name.startswith(folder) for name in files[first : first + 1]):
                empty.append(folder.rstrip("/"))
        return sorted(empty)

    def read(self, name: str) -> bytes:
        """The bytes of one member; BadImage when it is damaged, encrypted or claims to be huge."""
        try:
            size = self._archive().getinfo(name).file_size
            if size > _MAX_FILE_BYTES:
                raise BadImage(
                    f"{self.path}:{name}: must unpack to at most {_MAX_FILE_BYTES} bytes, got {size}"
                )
            return self._archive().read(name)
        except BadImage:
            raise
        except Exception as error:  # zlib.error, BadZipFile, RuntimeError for a password, OSError
            raise BadImage(f"{self.path}:{name}: must be readable, got {error}") from error

    def _archive(self) -> zipfile.ZipFile:
        # A file position shared between forked workers would mix their reads.
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = (os.getpid(), zipfile.ZipFile(self.path))
            except (zipfile.BadZipFile, OSError) as error:
                raise ValueError(
                    f"open_data: path must be a complete zip archive, got {self.path}: {error}"
                ) from error
        return self._opened[1]

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_opened": None}


class FileData:
    """Images in files, decoded when asked for.

    Args:
        source: a `Folder` or a `Zip`.
        split: "train" or "test"; where the top folders bear such names, only its own is read.
        image_size: side of the square that each image is brought to; None demands that all have one size:
            an image of another counts as unreadable, and where 64 spread over the data differ, none is given.
        channels: 1 or 3; None takes 1 where every one of the first images is grey.
        bad_images: "skip" replaces an unreadable image by the next readable one and names it;
            "stop" raises BadImage.

    Classes are the first folders below the split, or else the file names up to the first "_" (the
    original's rule), when that gives at least two classes with two images each on average.

    Raises:
        ValueError: no images, or no readable ones among those 64.
    """

    def __init__(
        self,
        source: Folder | Zip,
        *,
        split: str = "train",
        image_size: int | None = None,
        channels: int | None = None,
        bad_images: str = "skip",
    ):
        if bad_images not in BAD_IMAGES:
            raise ValueError(
                f"open_data: bad_images must be one of {', '.join(BAD_IMAGES)}, got {bad_images!r}"
            )
        self.source, self._stop = source, bad_images == "stop"
        images = [name for name in source.names() if _is_image(name)]
        self.names = in_split(images, split)
        if not self.names:
            raise ValueError(
                f"open_data: path must hold image files ({', '.join(EXTENSIONS)}), got {source.path}"
            )
        classes = class_of_each(self.names)
        self.class_names = None if classes is None else tuple(sorted(set(classes)))
        self._labels: Tensor | None = None
        if classes is not None and self.class_names is not None:
            number = {name: i for i, name in enumerate(self.class_names)}
            self._labels = torch.tensor([number[name] for name in classes])
        self._size = image_size
        self._differing: str | None = None
        self.image_shape = self._probe(channels)

    def __len__(self) -> int:
        return len(self.names)

    def images(self, indices: Tensor) -> tuple[Tensor, Tensor, list[str]]:
        """The images of these indices.

        Args:
            indices: int64 [N].

        Returns:
            float32 [N, C, H, W] in [-1, 1]; the indices of the images that these are, which differ from
            those asked for where an image was unreadable; and a line for every unreadable one.

        Raises:
            BadImage: an unreadable image with bad_images="stop", or a whole run of them.
            ValueError: sizes differ, with no image_size given.
        """
        if self._differing is not None:
            raise ValueError(
                f"open_data: image_size must be given where sizes differ, got {self._differing}"
            )
        complaints: list[str] = []
        found = [self._nearest(int(index), complaints) for index in indices]
        stacked = np.stack([array for array, _ in found]).transpose(0, 3, 1, 2)
        used = torch.tensor([index for _, index in found], dtype=torch.int64)
        return torch.from_numpy(np.ascontiguousarray(stacked)), used, complaints

    def labels(self, indices: Tensor) -> Tensor | None:
        """indices: int64 [N]. Returns int64 [N], or None where the data has no classes."""
        return None if self._labels is None else self._labels[indices]

    def _nearest(self, index: int, complaints: list[str]) -> tuple[np.ndarray, int]:
        for offset in range(min(len(self), 1000)):
            candidate = (index + offset) % len(self)
            try:
                return self._decode(candidate), candidate
            except BadImage as error:
                if self._stop:
                    raise
                complaints.append(str(error))
        raise BadImage(f"{self.source.path}: must hold readable images, got {complaints[-1]}")

    def _decode(self, index: int) -> np.ndarray:
        name = self.names[index]
        label = f"{self.source.path}/{name}"
        channels, *size = self.image_shape
        array = to_array(open_image(self.source.read(name), label), channels, self._size)
        if list(array.shape[:2]) != size:
            raise BadImage(
                f"{label}: must be {size[1]}x{size[0]} like the others, or image_size given, "
                f"got {array.shape[1]}x{array.shape[0]}"
            )
        return array

    def _probe(self, channels: int | None) -> tuple[int, int, int]:
        """(C, H, W), from images spread over the data."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(len(self), _PROBED)).astype(int))
        problem = ""
        size, grey = None, True
        for index in chosen:
            name = self.names[index]
            try:
                image = open_image(self.source.read(name), f"{self.source.path}/{name}")
            except BadImage as error:
                if self._stop:
                    raise
                problem = str(error)
                continue
            own = (image.height, image.width)
            size = own if size is None else size
            if self._size is None and own != size:
                self._differing = f"{size[1]}x{size[0]} and {own[1]}x{own[0]} in {name}"
            grey = grey and is_grey(image)
        if size is None:
            raise BadImage(f"open_data: path must hold readable images, got {problem}")
        height, width = size if self._size is None else (self._size, self._size)
        return (1 if grey else 3) if channels is None else channels, height, width


def in_split(names: Sequence[str], split: str) -> list[str]:
    """The names of one split, where the top folders are named after splits; else all of them."""
    depth = len(_common_folder(names).parts)
    below = {name: PurePosixPath(name).parts[depth:] for name in names}
    folders = {parts[0].lower() for parts in below.values() if len(parts) > 1}
    if not folders & {*_SPLITS["train"], *_SPLITS["test"]}:
        return list(names)
    return [
        n for n, parts in below.items() if len(parts) > 1 and parts[0].lower() in _SPLITS[split]
    ]


def class_of_each(names: Sequence[str]) -> list[str] | None:
    """Each file's class: its folder below the common one, else its name up to the first "_"; or None."""
    depth = len(_common_folder(names).parts)
    relative = [PurePosixPath(*PurePosixPath(name).parts[depth:]) for name in names]
    if all(len(path.parts) > 1 for path in relative):
        classes = [path.parts[0] for path in relative]
    elif all(len(path.parts) == 1 and "_" in path.name for path in relative):
        classes = [path.name.split("_")[0] for path in relative]
    else:
        return None
    return classes if 2 <= len(set(classes)) <= len(names) // 2 else None


def _common_folder(names: Sequence[str]) -> PurePosixPath:
    parents = [str(PurePosixPath("/", name).parent) for name in names]
    return PurePosixPath(os.path.commonpath(parents) if names else "/").relative_to("/")


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return not hidden and path.suffix.lower() in EXTENSIONS

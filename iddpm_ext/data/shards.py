"""Tar archives of images, one or many, in the convention of WebDataset, read at any place.

The samples of a shard are files with one key, the name up to the first dot: `0001.jpg` and its class
`0001.cls` or `0001.json`. The headers are walked through once; then an image is one read at its offset, so
that order, resuming and the share of every process are those of any other data, over all shards.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from .classes import Labelled, of_names, of_numbers, shown
from .containers import MAX_FILE_BYTES, Survey
from .image import BadImage
from .names import EXTENSIONS, printable

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
LABEL_SUFFIXES = (".cls", ".json")


class _Place(NamedTuple):
    shard: int
    offset: int
    size: int


def is_shards(path: str | Path) -> bool:
    """Whether `path` is a .tar, a pattern of them, or a folder of them with no folders or images beside."""
    if str(path).endswith(".tar"):
        return True
    folder = Path(path)
    if not folder.is_dir():
        return False
    tars = False
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() or PurePosixPath(entry.name).suffix.lower() in EXTENSIONS:
                return False
            tars = tars or entry.name.endswith(".tar")
    return tars


class Shards:
    """The members of tar archives. Nothing is extracted; every process opens the archives for itself.

    path: a .tar file, a folder of them, or a name with braces, train-{0000..0099}.tar or {a,b}.tar.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._files = _shards_of(path)
        self._opened: tuple[int, dict[int, int]] | None = None
        found: list[tuple[str, _Place]] = []
        self._notes: list[str] = []
        for number, file in enumerate(self._files):
            found += [(name, place._replace(shard=number)) for name, place in self._index(file)]
        counts = Counter(name for name, _ in found)
        #: Whether names are told apart by their shards, as some occur in several.
        self.prefixed = len(counts) < len(found)
        self._members: dict[str, _Place] = {}
        for name, place in found:
            whole = f"{self._files[place.shard].name}/{name}" if self.prefixed else name
            if whole in self._members:
                raise ValueError(
                    f"open_data: {printable(str(self._files[place.shard]))} must hold every name once, "
                    f"got {printable(name)} twice"
                )
            self._members[whole] = place

    def survey(self) -> Survey:
        """All that is there."""
        return Survey(sorted(self._members), [], list(self._notes))

    def read(self, name: str) -> bytes:
        """The bytes of one member; BadImage when it cannot be read."""
        place = self._members[name]
        label = f"{printable(str(self._files[place.shard]))}:{printable(name)}"
        if place.size > MAX_FILE_BYTES:
            raise BadImage(f"{label}: must have at most {MAX_FILE_BYTES} bytes, got {place.size}")
        try:
            data = os.pread(self._descriptor(place.shard), place.size, place.offset)
        except OSError as error:
            raise BadImage(f"{label}: must be readable, got {error.strerror}") from error
        if len(data) != place.size:
            raise BadImage(f"{label}: must have {place.size} bytes, got {len(data)}")
        return data

    def require_one_image_a_key(self, images: Sequence[str]) -> None:
        """ValueError where a sample has several images, such as one and its mask."""
        keys: dict[str, list[str]] = {}
        for name in images:
            keys.setdefault(_key(name), []).append(name)
        several = next((names for names in keys.values() if len(names) > 1), None)
        if several is not None:
            raise ValueError(
                "open_data: a sample must have one image, got "
                f"{shown(list(map(printable, several)))}: which one is meant, nothing says"
            )

    def labels(self, images: Sequence[str], *, ids: bool) -> tuple[Labelled | None, list[str]]:
        """The classes of images by the .cls or .json of their keys, None where there are none; and notes.

        Raises ValueError where some images have one and others none, or it says no class.
        """
        for suffix in LABEL_SUFFIXES:
            having = [f"{_key(name)}{suffix}" in self._members for name in images]
            if not any(having):
                continue
            if not all(having):
                raise ValueError(
                    f"open_data: every sample must have a {suffix} file where some have, got none for "
                    f"{printable(images[having.index(False)])}: classes='none' does without"
                )
            values = [self._label(f"{_key(name)}{suffix}") for name in images]
            if suffix == ".json" and all(value is None for value in values):
                return None, ["no .json of a sample has a label"]
            return _labelled(values, suffix, ids), [f"classes are those of the {suffix} files"]
        return None, []

    def _label(self, name: str) -> int | str | None:
        text = self.read(name).decode(errors="replace").strip()
        if name.endswith(".cls"):
            return int(text) if text.isdigit() else text
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"open_data: {printable(name)} must be JSON, got {error}") from error
        return content.get("label") if isinstance(content, dict) else None

    def _index(self, file: Path) -> list[tuple[str, _Place]]:
        """Names and places of one shard's files."""
        size, found = file.stat().st_size, []
        left: Counter[str] = Counter()
        try:
            with tarfile.open(file, "r:") as archive:
                for member in archive:
                    if member.isdir():
                        continue
                    if not member.isreg() or member.issparse():
                        left["links and special files"] += 1
                        continue
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError("it ends within a member")
                    name = member.name.removeprefix("./")
                    found.append((name, _Place(0, member.offset_data, member.size)))
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"open_data: {printable(str(file))} must be a sound, uncompressed tar archive, got {error}"
            ) from error
        self._notes += [
            f"left out of {printable(file.name)}: {n} {what}" for what, n in left.items()
        ]
        return found

    def _descriptor(self, shard: int) -> int:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), {})
        kept = self._opened[1]
        if shard not in kept:
            kept[shard] = os.open(self._files[shard], os.O_RDONLY)
        return kept[shard]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}


def _labelled(values: list[int | str | None], suffix: str, ids: bool) -> Labelled:
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        numbers = np.array(values, dtype=np.int64)
        return of_numbers("open_data", numbers, ids=ids)
    if all(isinstance(value, str) and value for value in values):
        return of_names([printable(str(value)) for value in values])
    wrong = next(v for v in values if not (isinstance(v, str) and v))
    raise ValueError(
        f"open_data: every {suffix} file must hold a class, all numbers or all names, got {wrong!r}: "
        "classes='none' does without"
    )


def _key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    stem = base.split(".", 1)[0]
    return f"{folder}/{stem}" if folder else stem


def _shards_of(path: str | Path) -> list[Path]:
    if Path(path).is_dir():
        return sorted(Path(path).glob("*.tar"))
    files = [Path(name) for name in _expanded(str(path))]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"open_data: every shard must exist, got {len(missing)} of {len(files)} that do not, such as "
            f"{printable(str(missing[0]))}"
        )
    return files


def _expanded(pattern: str) -> list[str]:
    """The names that braces stand for, {00..11} and {a,b}, in this order."""
    pieces = []
    for i, part in enumerate(_BRACES.split(pattern)):
        bounds = _RANGE.fullmatch(part) if i % 2 else None
        if bounds is not None:
            width = len(bounds[1])
            numbers = range(int(bounds[1]), int(bounds[2]) + 1)
            pieces.append([f"{number:0{width}d}" for number in numbers])
        else:
            pieces.append(part.split(",") if i % 2 else [part])
    return ["".join(chosen) for chosen in itertools.product(*pieces)]

"""Derives from the names of files which are images, of which split, and of which class."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from .classes import shown

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".avif", ".heic", ".heif",
)  # fmt: skip
CLASSES = ("auto", "folders", "names", "file", "ids", "none")
#: The file of labels that StyleGAN's and EDM's tools write beside images.
LABEL_FILE = "dataset.json"
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "val", "validation", "valid"),
}
# Files that operating systems create: thumbnails, rubbish bins, settings of folders.
_SYSTEM = (
    "__macosx", ".ds_store", ".thumbnails", "@eadir", "@__thumb", ".@__thumb", "#recycle", "@recycle",
    "$recycle.bin", ".trash", "lost+found", "system volume information", "thumbs.db", "ehthumbs.db",
    "desktop.ini",
)  # fmt: skip
# Folders that all have such names, 00000, 00001, ..., are shards of a large set.
_SHARD = re.compile(r"\d{5,}")
_MAY_HOLD_LABELS = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".xml", ".yaml", ".parquet", ".mat")


def printable(name: str) -> str:
    """The name with control and unprintable characters as \\x.. or \\u....

    Bytes that are not UTF-8, which Python represents by lone surrogates, are shown as bytes: \\xe9.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in name)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def is_system(name: str) -> bool:
    """Whether a path is a file of the operating system, or below a folder of it."""
    return _system_part(name) is not None


def _system_part(name: str) -> str | None:
    for part in PurePosixPath(name).parts:
        if part.lower() in _SYSTEM or part.startswith("._"):
            return part
    return None


def is_hidden(name: str) -> bool:
    """Whether a part of the path begins with a dot, including "..", which would leave the source."""
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def images_among(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names of images, and notes on the others."""
    images: list[str] = []
    system: Counter[str] = Counter()
    hidden: list[str] = []
    others: Counter[str] = Counter()
    for name in names:
        path = PurePosixPath(name)
        part = _system_part(name)
        if part is not None:
            system["._*" if part.startswith("._") else part] += 1
        elif is_hidden(name):
            hidden.append(name)
        elif path.suffix.lower() in EXTENSIONS:
            images.append(name)
        elif path.name != LABEL_FILE:
            others[path.suffix.lower() or "without a suffix"] += 1
    notes = []
    if system:
        found = [f"{printable(part)} ({count})" for part, count in system.most_common()]
        notes.append(f"left out, as systems make them: {shown(found)}")
    if hidden:
        notes.append(f"left out, as their names are hidden: {shown(list(map(printable, hidden)))}")
    if others:
        found = [f"{printable(suffix)} ({count})" for suffix, count in others.most_common()]
        note = f"left out, as their suffix is none of an image: {shown(found)}"
        if any(suffix in _MAY_HOLD_LABELS for suffix in others):
            note += "; labels in such files are not read"
        notes.append(note)
    return images, notes


def in_split(names: Sequence[str], split: str) -> tuple[list[str], list[str]]:
    """The names of one split if the top folders are named like splits, else all; and notes.

    split: "train", "test", or "all" for all of them whatever the folders are called.
    Raises ValueError if it is ambiguous whether the folders are splits, or if the split is missing.
    """
    if split == "all":
        return list(names), []
    paths = {name: PurePosixPath(name).parts for name in names}
    depth = _first_choice(list(paths.values()))
    folders = Counter(parts[depth] for parts in paths.values() if len(parts) > depth + 1)
    kinds = {
        folder: next((kind for kind, of in _SPLITS.items() if folder.lower() in of), None)
        for folder in folders
    }
    splits = [folder for folder, kind in kinds.items() if kind]
    others = [printable(folder) for folder, kind in kinds.items() if kind is None]
    loose = sum(len(parts) == depth + 1 for parts in paths.values())
    if not splits:
        return list(names), []
    if others or loose:
        nested = any(len(p) > depth + 2 for p in paths.values() if p[depth] in splits)
        beside = shown(others) if others else f"{loose} images"
        if loose or nested or len({kinds[folder] for folder in splits}) > 1:
            raise ValueError(
                f"open_data: split must be 'all' to take the folders {shown(sorted(splits))} for no "
                f"splits, or nothing else may be beside them, got {split!r} and {beside}"
            )
        note = f"the folder {splits[0]} is taken for a class, as others are beside it: {beside}"
        return list(names), [note]
    wanted = [of for of in _SPLITS[split] if any(folder.lower() == of for folder in splits)]
    if not wanted:
        raise ValueError(
            f"open_data: split must be one of those in the folders {shown(sorted(splits))}, or 'all', "
            f"got {split!r}"
        )
    chosen = {folder for folder in splits if folder.lower() == wanted[0]}
    left = [f"{folder} ({folders[folder]})" for folder in sorted(set(splits) - chosen)]
    notes = [f"the split {wanted[0]} is read; left out: {shown(left)}"] if left else []
    return [name for name, parts in paths.items() if parts[depth] in chosen], notes


def _first_choice(paths: Sequence[tuple[str, ...]]) -> int:
    """How many leading folders all paths share, before the first one that could be a split."""
    named = {*_SPLITS["train"], *_SPLITS["test"]}
    for depth in range(min((len(parts) for parts in paths), default=1)):
        tops = {parts[depth] for parts in paths}
        if len(tops) > 1 or tops.pop().lower() in named:
            return depth
    return 0


def class_of_each(
    names: Sequence[str], classes: str = "auto"
) -> tuple[list[str] | None, list[str]]:
    """Each file's class by its name, or None if there are no classes; and notes.

    classes: "auto" takes the first folder that not all have in common, else the name up to the first "_"
    (the original's rule), if that gives at least two classes of two images each on average; "folders" and
    "names" require one or the other.
    """
    depth = len(_common_folder(names).parts)
    relative = [PurePosixPath(*PurePosixPath(name).parts[depth:]) for name in names]
    if classes == "folders":
        return _folders(names), []
    if classes == "names":
        without = [path.name for path in relative if "_" not in path.name]
        if without:
            raise ValueError(
                "open_data: classes must be other than 'names' for names without a '_', "
                f"got {printable(without[0])}"
            )
        return [printable(path.name.split("_")[0]) for path in relative], []
    if all(len(path.parts) > 1 for path in relative):
        return _auto_folders([path.parts[0] for path in relative])
    if any(len(path.parts) > 1 for path in relative):
        return None, ["images are in folders and beside them: no classes"]
    if all("_" in path.name for path in relative):
        found = [printable(path.name.split("_")[0]) for path in relative]
        if _plausible(found):
            note = f"classes are the names up to the first '_': {shown(sorted(set(found)))}"
            return found, [note]
    return None, []


def _auto_folders(folders: list[str]) -> tuple[list[str] | None, list[str]]:
    distinct = sorted(set(folders))
    found = shown(list(map(printable, distinct)))
    if all(_SHARD.fullmatch(folder) for folder in distinct):
        return None, [
            f"the folders {found} are taken for parts of one set and not for classes, unless classes "
            "is 'folders'"
        ]
    if not _plausible(folders):
        return None, [
            f"{len(distinct)} folders of {len(folders)} images are not taken for classes, unless "
            f"classes is 'folders': {found}"
        ]
    return list(map(printable, folders)), []


def _folders(names: Sequence[str]) -> list[str]:
    paths = [PurePosixPath(name).parts for name in names]
    loose = [parts[-1] for parts in paths if len(parts) < 2]
    if loose:
        raise ValueError(
            "open_data: classes must be other than 'folders' for images that are in none, "
            f"got {printable(loose[0])}"
        )
    depth = 0
    while len({parts[depth] for parts in paths}) == 1 and all(len(p) > depth + 2 for p in paths):
        depth += 1
    return [printable(parts[depth]) for parts in paths]


def _plausible(classes: Sequence[str]) -> bool:
    return 2 <= len(set(classes)) <= len(classes) // 2


def _common_folder(names: Sequence[str]) -> PurePosixPath:
    parents = [str(PurePosixPath("/", name).parent) for name in names]
    return PurePosixPath(os.path.commonpath(parents) if names else "/").relative_to("/")


def empty_class_folders(
    folders: Sequence[str], files: Sequence[str], images: Sequence[str]
) -> list[str]:
    """Folders without any file beside those of the classes, sorted."""
    root = _common_folder(images)
    filled = {PurePosixPath(n).parts[: len(root.parts) + 1] for n in files if not is_system(n)}
    beside = [
        path for folder in folders
        if (path := PurePosixPath(folder)).parent == root
        and not is_system(folder) and not is_hidden(folder)
    ]  # fmt: skip
    return sorted(printable(path.name) for path in beside if path.parts not in filled)

"""Labels in a file beside the images: the dataset.json of StyleGAN's and EDM's tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from .classes import Labelled, of_names, of_numbers
from .names import LABEL_FILE, printable

_WAYS = "classes='folders', 'names' or 'none' does without it"


def find_label_file(files: Sequence[str], images: Sequence[str]) -> str | None:
    """The outermost dataset.json in a folder that holds all of the images, or None."""
    found = [name for name in files if PurePosixPath(name).name == LABEL_FILE]
    above = [
        name for name in found
        if all(PurePosixPath(image).is_relative_to(PurePosixPath(name).parent) for image in images)
    ]  # fmt: skip
    return min(above, key=len, default=None)


def read_label_file(
    data: bytes, name: str, images: Sequence[str], *, ids: bool
) -> tuple[Labelled | None, list[str]]:
    """The labels of these images, None where the file has none; and notes.

    name: of the file, for messages; names of images in it are relative to its folder. The file holds
    {"labels": [["00000/img00000000.png", 6], ...]}, with whole numbers or names; null means no labels.
    ids: as in `of_numbers`.

    Raises ValueError if it holds anything else, or lacks an image.
    """
    where = f"open_data: {printable(name)}"
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be JSON, got {error}: {_WAYS}") from error
    entries = content.get("labels") if isinstance(content, dict) else None
    if entries is None:
        return None, [f"{printable(name)} holds no labels"]
    if isinstance(entries, dict):
        entries = list(entries.items())
    if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
        raise ValueError(
            f'{where} must hold "labels" as a list of [name, whole number or class], got others: '
            f"{_WAYS}"
        )
    folder = PurePosixPath(name).parent
    labels = {(folder / entry[0]).as_posix(): entry[1] for entry in entries}
    missing = [image for image in images if image not in labels]
    if missing:
        raise ValueError(
            f"{where} must label every image, got none for {len(missing)} of {len(images)}, such as "
            f"{printable(missing[0])}: {_WAYS}"
        )
    known = set(images)
    absent = [image for image in labels if image not in known]
    notes = [f"classes are those of {printable(name)}"]
    if absent:
        notes.append(
            f"{printable(name)} labels {len(absent)} images that are not read, such as "
            f"{printable(absent[0])}"
        )
    values = [labels[image] for image in images]
    if all(isinstance(value, str) for value in values):
        return of_names([printable(value) for value in values]), notes
    if any(isinstance(value, str) for value in values) or max(map(abs, values)) >= 1 << 63:
        raise ValueError(
            f"{where} must hold either numbers of 64 bits or names, got others: {_WAYS}"
        )
    return of_numbers("open_data", np.array(values, dtype=np.int64), ids=ids), notes


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, (list, tuple))
        and len(entry) == 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], (int, str))
        and not isinstance(entry[1], bool)
    )

"""Names of classes: of the data's labels, and which class of a network each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Labels up to this number, or up to the number of images, are accepted as class numbers.
_MOST_CLASSES = 10_000
_SHOWN = 10


class Labelled(NamedTuple):
    """labels: int64 [N] on the CPU, indices of names. names: one per class."""

    labels: Tensor
    names: tuple[str, ...]


def of_names(names: Sequence[str]) -> Labelled:
    """The classes of images that are labelled by a name each; sorted names are numbered from 0."""
    distinct = tuple(sorted(set(names)))
    number = {name: i for i, name in enumerate(distinct)}
    labels = [number[name] for name in names]
    return Labelled(torch.tensor(labels, dtype=torch.int64, device="cpu"), distinct)


def of_numbers(
    who: str, labels: np.ndarray, class_names: Sequence[str] | None = None, *, ids: bool = False
) -> Labelled:
    """The classes of images that are labelled by a whole number each.

    A label is the number of its class, and the names are the numbers unless given. With `ids` the distinct
    labels, which may be any numbers, are the classes in ascending order.

    Raises ValueError or TypeError for other labels.
    """
    if labels.dtype.kind not in "iu":
        raise TypeError(f"{who}: labels must be integers, got {labels.dtype}")
    if ids:
        values, places = np.unique(labels, return_inverse=True)
        return Labelled(_tensor(places), tuple(str(value) for value in values.tolist()))
    low, high = int(labels.min()), int(labels.max())
    if class_names is None and 0 <= low and high >= max(_MOST_CLASSES, len(labels)):
        raise ValueError(
            f"{who}: labels must be class numbers from 0, got {high} for {len(labels)} images: "
            "classes='ids' makes a class of each different number, classes='none' leaves them out"
        )
    count = high + 1 if class_names is None else len(class_names)
    if low < 0 or high >= count:
        raise ValueError(f"{who}: labels must lie in [0, {count - 1}], got {low} .. {high}")
    names = map(str, range(count)) if class_names is None else class_names
    return Labelled(_tensor(labels), tuple(names))


def _tensor(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))


def match_classes(
    who: str,
    names: Sequence[str],
    used: Sequence[int],
    network_names: Sequence[str] | None,
    network_classes: int,
) -> Tensor:
    """The network's class for each class of the data, int64 [len(names)]; -1 for unused ones.

    Classes are matched by name. If the data's names are numbers and the network's are not, or it has none,
    they are the network's class numbers. Other names fit a network without names only if there are as many as
    its classes: both are then taken for sorted names.

    Args:
        who: the function that errors name.
        names: the data's, one per class. used: which of them occur.
        network_names: the checkpoint's, one per class, or None. network_classes: how many it has.

    Raises:
        ValueError: naming the difference.
    """
    found = torch.full((len(names),), -1, dtype=torch.int64, device="cpu")
    known = {name: i for i, name in enumerate(network_names or ())}
    own = [names[i] for i in used]
    if known and all(name in known for name in own):
        chosen = [known[name] for name in own]
    elif all(map(_is_number, own)) and not any(map(_is_number, known)):
        chosen = [int(name) for name in own]
    elif not known and len(names) == network_classes:
        chosen = list(used)
    else:
        foreign = [name for name in own if name not in known] if known else own
        classes = shown(list(known)) if known else f"{network_classes} without names"
        raise ValueError(
            f"{who}: data must have classes of the network ({classes}), got {shown(foreign)}: rename "
            "them, or give labels"
        )
    if chosen and max(chosen) >= network_classes:
        raise ValueError(
            f"{who}: data must have classes below the network's {network_classes}, got {max(chosen)}"
        )
    found[list(used)] = torch.tensor(chosen, dtype=torch.int64, device="cpu")
    return found


def difference(now: Sequence[str], before: Sequence[str]) -> str:
    """How two lists of classes differ, in words."""
    new = [name for name in now if name not in before]
    gone = [name for name in before if name not in now]
    parts = [f"new: {shown(new)}"] if new else []
    parts += [f"gone: {shown(gone)}"] if gone else []
    return "; ".join(parts) or f"another order: {shown(now)}"


def shown(names: Sequence[str]) -> str:
    """The names, or the first of them."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and (name == "0" or name[0] != "0")

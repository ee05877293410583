"""NumPy's numbers are numbers: every public function that takes a number takes them too."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def plain(value: T) -> T:
    """The value with NumPy's scalars, alone or inside tuples, lists and dicts, as Python's own.

    Arrays and tensors stay what they are. A public function calls it before it looks at its numbers, so
    that all that comes after (checks, JSON, operators' schemas) meets ints and floats only.
    """
    if isinstance(value, np.generic):
        return value.item()
    kind: Any = type(value)
    inside: Any = value
    if kind in (tuple, list):
        inside = kind(map(plain, inside))
    elif kind is dict:
        inside = {plain(key): plain(entry) for key, entry in inside.items()}
    return inside


def make_fields_plain(instance: Any) -> None:
    """`plain` of every field of a dataclass, frozen or not; the first line of its `__post_init__`."""
    for field in fields(instance):
        object.__setattr__(instance, field.name, plain(getattr(instance, field.name)))

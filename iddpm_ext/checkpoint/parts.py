"""Finds the weights of a network in files of other programs: under prefixes, beside other objects."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from iddpm_ext.text import printable

from .torch_file import tensors_of

# Every network of these codes has this tensor; what precedes its name is a wrapper's prefix.
_FIRST = "input_blocks.0.0.weight"
_AVERAGE = re.compile(r"(?<![a-z])ema(?![a-z])|average", re.IGNORECASE)
_DEPTH = 3
_SHOWN = 4


class Part(NamedTuple):
    """Weights inside a file. name: the keys and prefixes that lead to them, joined by dots."""

    name: str
    holder: Mapping[object, object]
    prefix: str


def weights_of(
    path: Path, content: object, part: str | None, *, average: bool
) -> dict[str, Tensor]:
    """The tensors of the only network in `content`, or of the one named `part`, by their names.

    Removes prefixes (`module.` of DataParallel, `_orig_mod.` of `torch.compile`, `model.` of Lightning) and
    searches nested mappings ({"model": ..., "ema": ...}).

    part: the name of the weights if there are several; None for the only ones, or else for the averaged ones
        (`average`) or for those that are not averaged.
    Raises ValueError if the choice is ambiguous, or the weights are not tensors by name. Warns of weights and
    tensors that are not used.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"load: {path} must hold tensors by name, got {type(content).__name__}")
    parts = {part.name: part for part in _parts(content, (), set())}
    if not parts:
        if part is not None:
            raise ValueError(f"load: part must be None for {path}, got {part!r}")
        return tensors_of(path, content)
    chosen = parts[_choose(path, list(parts), part, average)]
    others = [p.prefix for p in parts.values() if p.holder is chosen.holder and p is not chosen]
    own: dict[object, object] = {}
    left: list[str] = []
    for key, value in chosen.holder.items():
        name = key if isinstance(key, str) else ""
        if any(name.startswith(prefix) and len(prefix) > len(chosen.prefix) for prefix in others):
            continue
        if name.startswith(chosen.prefix):
            own[name.removeprefix(chosen.prefix) if isinstance(key, str) else key] = value
        elif isinstance(value, Tensor) and not any(map(name.startswith, others)):
            left.append(name)
    if left:
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        shown = ", ".join(printable(name) for name in left[:_SHOWN])
        warnings.warn(f"load: {path} has tensors outside of the network, left: {shown}{more}",
                      stacklevel=5)  # fmt: skip
    return tensors_of(path, own)


def _choose(path: Path, names: list[str], part: str | None, average: bool) -> str:
    shown = ", ".join(repr(printable(name)) for name in names)
    if part is not None:
        if part not in names:
            raise ValueError(f"load: part must be one of {shown} for {path}, got {part!r}")
        return part
    if len(names) == 1:
        return names[0]
    for averaged in (
        [name for name in names if _AVERAGE.search(name.rpartition(".")[2])],
        [name for name in names if _AVERAGE.search(name)],
    ):
        wanted = averaged if average else [name for name in names if name not in averaged]
        if averaged and len(wanted) == 1:
            warnings.warn(
                f"load: {path} holds weights several times, {shown}: {printable(wanted[0])!r} is "
                "taken, part= takes another",
                stacklevel=6,
            )
            return wanted[0]
    raise ValueError(
        f"load: part must name the weights of {path} that are meant: {shown}, got None"
    )


def _parts(
    content: Mapping[object, object], trail: tuple[str, ...], seen: set[int]
) -> Iterator[Part]:
    if id(content) in seen or len(trail) > _DEPTH:
        return
    seen.add(id(content))  # a small file can refer to one mapping a million times
    for key, value in content.items():
        if not isinstance(key, str):
            continue
        if isinstance(value, Mapping):
            yield from _parts(value, (*trail, key), seen)
        elif key.endswith(_FIRST) and isinstance(value, Tensor):
            prefix = key.removesuffix(_FIRST)
            if not prefix or prefix.endswith("."):
                names = (*trail, prefix[:-1]) if prefix else trail
                yield Part(".".join(names), content, prefix)

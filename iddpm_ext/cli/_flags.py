"""How flags are read: a function's arguments by their types, tuples as `1,2`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

_ITEMS = (int, float, str)


def parse_and_call(
    function: Callable[..., int | None], arguments: Sequence[str], *, prog: str, description: str
) -> int | None:
    """Calls `function` with the parsed `arguments`; exits with status 2 if they are wrong."""
    registry = ConstructorRegistry()
    registry.primitive_rule(_comma_separated)
    return tyro.cli(
        function,
        args=list(arguments),
        prog=prog,
        description=description,
        registry=registry,
    )


def _comma_separated(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """tuple[T, ...] of ints, floats or strings, given as one word: 1,2,3."""
    item = (get_args(info.type) or (None,))[0]
    if (
        get_origin(info.type) is not tuple
        or get_args(info.type)[1:] != (...,)
        or item not in _ITEMS
    ):
        return None

    def parse(words: list[str]) -> tuple[Any, ...]:
        return tuple(item(part.strip()) for part in words[0].split(",") if part.strip())

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{item.__name__.upper()},...",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )

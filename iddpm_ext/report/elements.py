"""What a part of the page is made of. Plain data: the template knows how each is shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar


class Missing(Exception):
    """A part cannot be made, for the reason that the page then gives in its place."""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Command:
    """What to type to make the numbers or pictures above it again."""

    kind: ClassVar[str] = "command"
    text: str


@dataclass(frozen=True)
class Picture:
    """An image. source: a data: address. width: on the screen, in CSS pixels."""

    kind: ClassVar[str] = "picture"
    source: str
    alt: str
    width: int


@dataclass(frozen=True)
class Chart:
    """A drawing. svg: an element of its own, its colours of text those around it."""

    kind: ClassVar[str] = "chart"
    svg: str
    alt: str


Cell = str | Picture


@dataclass(frozen=True)
class Table:
    """head: one per column. rows: the first cell of each names the row."""

    kind: ClassVar[str] = "table"
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Film:
    """Frames that are played one after the other.

    sources: data: addresses of one picture each, in which the frames stand below one another; they are
    shown side by side under their `names`. width, height: of a frame, in pixels. captions: one per frame.
    """

    kind: ClassVar[str] = "film"
    sources: tuple[str, ...]
    names: tuple[str, ...]
    width: int
    height: int
    captions: tuple[str, ...]
    alt: str


Element = Text | Command | Picture | Chart | Table | Film


@dataclass(frozen=True)
class Body:
    """What a part says of one model. facts: what stands in the table at the top of the page."""

    elements: tuple[Element, ...]
    facts: dict[str, str] = field(default_factory=dict)

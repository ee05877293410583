"""The elements of the page's parts: plain data, which the template renders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar


class Missing(Exception):
    """A part cannot be made; the page shows the message instead."""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Command:
    """The command that reproduces the numbers or pictures above it."""

    kind: ClassVar[str] = "command"
    text: str


@dataclass(frozen=True)
class Picture:
    """An image. source: a data: URL. width: on the screen, in CSS pixels."""

    kind: ClassVar[str] = "picture"
    source: str
    alt: str
    width: int


@dataclass(frozen=True)
class Chart:
    """A chart. svg: an <svg> element in the page's text colour."""

    kind: ClassVar[str] = "chart"
    svg: str
    alt: str


Cell = str | Picture


@dataclass(frozen=True)
class Table:
    """A table. head: one per column. rows: the first cell of each is the row's name."""

    kind: ClassVar[str] = "table"
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Film:
    """Frames that are played one after the other.

    sources: data: URLs of pictures that contain all frames, one below the other; they are shown side by side
    under their `names`. width, height: of a frame, in pixels. captions: one per frame.
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
    """The content of a part for one model. facts: entries of the table at the top of the page."""

    elements: tuple[Element, ...]
    facts: dict[str, str] = field(default_factory=dict)

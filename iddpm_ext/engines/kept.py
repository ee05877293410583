"""What is kept with a model between calls: compiled programs, and which warnings were given.

Programs never change while a call uses them, so calls in several threads share them. A lock is held while
they are looked up and built, never while a network is evaluated.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any, Protocol

from torch import nn

from iddpm_ext.engines.locks import Lock
from iddpm_ext.engines.structure import Structure, why_more
from iddpm_ext.networks.unet import UNet

_PROGRAMS = 2


class Program(Protocol):
    """A network in an engine's form: its weights in that layout, and what to do with them."""

    def engine(self) -> Any:
        """An engine for one call, with memory of its own."""

    def renew(self, model: UNet, /) -> bool:
        """Takes over the model's present weights; False where that is impossible, or the program in use."""


class Kept:
    """The programs and given warnings of one model and its shallow copies; not copied with deep copies."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._structure: Structure | None = None
        self._programs: dict[tuple[Hashable, Hashable], Program] = {}
        self._said: set[str] = set()

    def __deepcopy__(self, memo: object) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return (Kept, ())

    def structure(self, model: UNet) -> Structure | str:
        """The network's present modules and parameters; or why it is not a plain `UNet`."""
        with self._lock:
            known = self._structure
            if known is not None and known.holds(model):
                return known
            reason = why_more(model)
            self._structure = None if reason is not None else Structure(model)
            return reason or self._structure  # type: ignore[return-value]

    def engine(
        self,
        model: UNet,
        kind: Hashable,
        content: Callable[[], Hashable],
        build: Callable[[], Program],
    ) -> Any:
        """An engine for one call, of a kept program or one that is renewed or built for it.

        kind: the engine's settings. content: returns what identifies the present content of the weights.
        """
        now = content()
        with self._lock:
            program = self._programs.pop((kind, now), None)
            if program is None:
                program = self._renewed(model, kind) or build()
                if content() != now:  # weights were written meanwhile: a mixture, which is not kept
                    return program.engine()
            self._programs[kind, now] = program
            while len(self._programs) > _PROGRAMS:
                del self._programs[next(iter(self._programs))]
            return program.engine()

    def _renewed(self, model: UNet, kind: Hashable) -> Program | None:
        for key in [key for key in self._programs if key[0] == kind]:
            if self._programs[key].renew(model):
                return self._programs.pop(key)
        return None

    def say(self, text: str) -> None:
        """Warns, once per model and text."""
        with self._lock:
            new = text not in self._said
            self._said.add(text)
        if new:
            warnings.warn(text, RuntimeWarning, stacklevel=2)


_ATTRIBUTE = "_iddpm_kept"


def kept_of(model: nn.Module) -> Kept:
    """What is kept of this model."""
    return model.__dict__.get(_ATTRIBUTE) or model.__dict__.setdefault(_ATTRIBUTE, Kept())

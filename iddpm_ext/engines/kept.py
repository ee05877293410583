"""What is kept of a model between calls: programs, which take long to build, and what was said.

Programs never change while a call uses them, so calls of many threads share them. A lock is held
where they are looked up and built, never where a network is evaluated.
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
    """Weights in an engine's form, and what it does with them."""

    def engine(self) -> Any:
        """For one call, with memory of its own."""

    def renew(self, model: UNet, /) -> bool:
        """Takes the model's weights as they are now; False where it cannot, or is in use."""


class Kept:
    """Of one model, and its shallow copies. No deep copy of the model, and no pickle, takes it along."""

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
        """The network's modules and parameters as they are now, or what makes it more than a `UNet`."""
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
        """For one call, by the program of these settings and weights, built or renewed if need be.

        content: what tells the weights apart as they are now.
        """
        now = content()
        with self._lock:
            program = self._programs.pop((kind, now), None)
            if program is None:
                program = self._renewed(model, kind) or build()
                if content() != now:  # someone wrote meanwhile: this is a program of neither
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
        """Warns, once a model."""
        with self._lock:
            new = text not in self._said
            self._said.add(text)
        if new:
            warnings.warn(text, RuntimeWarning, stacklevel=2)


_ATTRIBUTE = "_iddpm_kept"


def kept_of(model: nn.Module) -> Kept:
    """What is kept of this model."""
    return model.__dict__.get(_ATTRIBUTE) or model.__dict__.setdefault(_ATTRIBUTE, Kept())

"""What several verbs do alike: flags that they share, and how they say what they did.

No verb imports torch before it runs: its help, and a wrong call of it, are there at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Manner:
    """How a verb speaks. json: its result is a line of JSON. quiet: no progress."""

    json: bool = False
    quiet: bool = False


_PLAIN = Manner()
_manner: ContextVar[Manner] = ContextVar("manner", default=_PLAIN)


@contextlib.contextmanager
def speaking(manner: Manner) -> Iterator[None]:
    """Verbs that run inside speak so."""
    token = _manner.set(manner)
    try:
        yield
    finally:
        _manner.reset(token)


def quiet() -> bool:
    """Whether progress is not to be shown."""
    return _manner.get().quiet


def starting(verb: str, what: str) -> None:
    """Says on a terminal that the verb has begun, before the seconds that importing torch takes."""
    if not quiet() and sys.stderr.isatty():
        print(f"iddpm {verb}: {what} ...", file=sys.stderr, flush=True)


def result(text: str, facts: dict[str, Any]) -> None:
    """Prints what came out on stdout: the text, or with --json the facts as one line."""
    print(json.dumps(facts, default=str) if _manner.get().json else text)


# torchrun takes "--n" for an abbreviation of its own flags, wherever it stands; "-n" it passes on.
Count = Annotated[int, tyro.conf.arg(aliases=("-n",))]
MaybeCount = Annotated[int | None, tyro.conf.arg(aliases=("-n",))]


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" is the process's GPU where there is one."""
    import torch

    if name != "auto":
        return torch.device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def target_of(checkpoint: str, out: Path | None) -> Path:
    """The file that a verb writes a checkpoint to that it completes: `out`, or the checkpoint itself."""
    from iddpm_ext.checkpoint import bundled

    target = Path(checkpoint) if out is None else out
    if out is None and (checkpoint in bundled() or target.suffix != ".safetensors"):
        raise ValueError(
            f"out must be given where the checkpoint is not a .safetensors file of yours, got {checkpoint}"
        )
    return target


def read_steps(text: str | None) -> int | str | None:
    """What `--steps` says: a number, or a specification that the chain reads."""
    return int(text) if text is not None and text.isdigit() else text

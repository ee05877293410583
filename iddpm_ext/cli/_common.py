"""Shared by several verbs: common flags, and the output of results.

No verb imports torch before it runs, so that its help, and errors in a call, come at once.
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
    """The style of output. json: the result is a line of JSON. quiet: no progress."""

    json: bool = False
    quiet: bool = False


_PLAIN = Manner()
_manner: ContextVar[Manner] = ContextVar("manner", default=_PLAIN)


@contextlib.contextmanager
def speaking(manner: Manner) -> Iterator[None]:
    """A context in which verbs use this style of output."""
    token = _manner.set(manner)
    try:
        yield
    finally:
        _manner.reset(token)


def quiet() -> bool:
    """Whether progress is hidden."""
    return _manner.get().quiet


def starting(verb: str, what: str) -> None:
    """Prints on a terminal that the verb has begun, before the seconds that importing torch takes."""
    if not quiet() and sys.stderr.isatty():
        print(f"iddpm {verb}: {what} ...", file=sys.stderr, flush=True)


def result(text: str, facts: dict[str, Any]) -> None:
    """Prints the result on stdout: the text, or with --json the facts as one line."""
    print(json.dumps(facts, default=str) if _manner.get().json else text)


# torchrun takes "--n" for an abbreviation of one of its own flags, but passes "-n" on.
Count = Annotated[int, tyro.conf.arg(aliases=("-n",))]
MaybeCount = Annotated[int | None, tyro.conf.arg(aliases=("-n",))]


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" is the process's GPU if there is one."""
    import torch

    if name != "auto":
        return torch.device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def pick_dtype(name: str | None) -> torch.dtype | None:
    """PyTorch's dtype of this name."""
    import torch

    dtype: torch.dtype | None = None if name is None else getattr(torch, name)
    return dtype


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
    """The value of `--steps`: a number, or a text that `Diffusion.respace` or a checkpoint resolves."""
    return int(text) if text is not None and text.isdigit() else text

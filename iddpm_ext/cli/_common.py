"""Flags that several verbs read alike."""

from __future__ import annotations

import os
from typing import Annotated

import torch
import tyro

# torchrun takes "--n" for an abbreviation of its own flags, wherever it stands; "-n" it passes on.
Count = Annotated[int, tyro.conf.arg(aliases=("-n",))]
MaybeCount = Annotated[int | None, tyro.conf.arg(aliases=("-n",))]


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" is the process's GPU where there is one."""
    if name != "auto":
        return torch.device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def read_steps(text: str | None) -> int | str | None:
    """What `--steps` says: a number, or a specification that the chain reads."""
    return int(text) if text is not None and text.isdigit() else text

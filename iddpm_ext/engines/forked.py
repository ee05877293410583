"""What a forked process has to do without: the threads of OpenMP, which do not survive a fork."""

from __future__ import annotations

import os
import warnings

import torch

_forked = False


def _note() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note)


def go_on_after_fork(who: str) -> None:
    """In a forked process computes with one thread, and says so: PyTorch would wait for lost ones forever."""
    if _forked and torch.get_num_threads() > 1:
        warnings.warn(
            f"{who}: this process was forked, so PyTorch computes with one thread from here on: those "
            "that OpenMP started before the fork are lost (start processes by 'spawn' for more)",
            RuntimeWarning,
            stacklevel=3,
        )
        torch.set_num_threads(1)

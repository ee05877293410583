"""Forked processes, in which OpenMP's threads are missing."""

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
    """Sets PyTorch to one thread in a forked process, and warns: it would wait for the lost ones forever."""
    if _forked and torch.get_num_threads() > 1:
        warnings.warn(
            f"{who}: this process was forked, so PyTorch computes with one thread from here on: the "
            "threads that OpenMP started before the fork are lost (start processes by 'spawn' for more)",
            RuntimeWarning,
            stacklevel=3,
        )
        torch.set_num_threads(1)

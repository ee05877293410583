"""Keeps the allocator from returning freed memory to the system in every training step."""

from __future__ import annotations

import ctypes
import platform

# Constants of <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = -1
_LARGEST = 32 << 20  # the largest mmap threshold that glibc accepts


def keep_freed_memory() -> bool:
    """Makes glibc's malloc keep freed memory, for the rest of the process; False without glibc.

    PyTorch allocates CPU tensors by malloc, which returns large blocks to the system at once. Then all
    activations of a training step are in fresh pages, which the kernel has to clear: an eighth of the time of
    a small network's step.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(
        libc.mallopt(option, value) == 1
        for option, value in ((_TRIM_THRESHOLD, _NEVER), (_MMAP_THRESHOLD, _LARGEST))
    )

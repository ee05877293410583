"""Keeps the allocator from giving memory back to the system between the tensors of two steps."""

from __future__ import annotations

import ctypes
import platform

# Of <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = -1
_LARGEST = 32 << 20  # the most that glibc takes as a threshold of its mappings


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep what is freed, for this process and for good; False elsewhere.

    PyTorch allocates CPU tensors by malloc, which returns large blocks to the system as soon as they are
    free. A training step then takes every activation from fresh pages, which the kernel has to clear: an
    eighth of a small network's step.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(
        libc.mallopt(option, value) == 1
        for option, value in ((_TRIM_THRESHOLD, _NEVER), (_MMAP_THRESHOLD, _LARGEST))
    )

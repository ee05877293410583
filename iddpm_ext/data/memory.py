"""Limits the memory that reading a file takes to its actual content, whatever its header says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

_STEP = 1 << 22


class Stream(Protocol):
    """A stream of bytes to read."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""


def read_at_most(file: Stream, size: int) -> bytearray:
    """Up to `size` bytes of a stream; memory grows with the bytes that are read, not with `size`."""
    found = bytearray()
    while len(found) < size:
        part = file.read(min(_STEP, size - len(found)))
        if not part:
            break
        found += part
    return found


def free_memory() -> int | None:
    """Bytes of memory that are available without swapping; None if unknown."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def require_memory(what: str, needed: int) -> None:
    """Raises ValueError when `needed` bytes are more than the machine has free."""
    available = free_memory()
    if available is not None and needed > available:
        raise ValueError(
            f"{what} must unpack to at most the {available} bytes of free memory, got {needed}"
        )

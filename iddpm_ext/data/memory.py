"""How much memory a file may take: what it holds decides, never what it claims."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

_STEP = 1 << 22


class Stream(Protocol):
    """What bytes are read from, one after the other."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""


def read_at_most(file: Stream, size: int) -> bytearray:
    """Up to `size` bytes of a stream; memory grows with what comes, not with what was announced."""
    found = bytearray()
    while len(found) < size:
        part = file.read(min(_STEP, size - len(found)))
        if not part:
            break
        found += part
    return found


def free_memory() -> int | None:
    """Bytes that the system can give without swapping; None where it does not tell."""
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

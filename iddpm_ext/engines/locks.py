"""Locks that a forked process may go on with, and the garbage collector may come upon."""

from __future__ import annotations

import os
import threading
import weakref


class Lock:
    """A `threading.RLock` that is free in a forked process, whichever thread of the parent held it.

    The thread that holds it may take it again: what it allocates may have the collector end an engine,
    which gives its memory back under the same lock.
    """

    def __init__(self) -> None:
        self.renew()
        _everyone.add(self)

    def renew(self) -> None:
        """Nobody holds it."""
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def _renew() -> None:
    for lock in list(_everyone):
        lock.renew()


_everyone: weakref.WeakSet[Lock] = weakref.WeakSet()
os.register_at_fork(after_in_child=_renew)

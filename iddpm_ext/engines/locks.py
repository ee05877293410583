"""Locks that are safe across forks, and in code that the garbage collector runs."""

from __future__ import annotations

import os
import threading
import weakref


class Lock:
    """A `threading.RLock` that is free in a forked process, whichever thread of the parent held it.

    Reentrant, because an allocation under the lock can make the garbage collector finalise an engine, which
    returns its memory under the same lock.
    """

    def __init__(self) -> None:
        self.renew()
        _everyone.add(self)

    def renew(self) -> None:
        """Makes it a new, free lock."""
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

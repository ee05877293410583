"""The process group of a launch, which may begin and end many times in one process."""

from __future__ import annotations

import atexit
import itertools
import time
from datetime import timedelta

import torch.distributed as dist

_DEFAULT = timedelta(minutes=30)  # torch's own, of gloo
_numbers = itertools.count()
# Where the processes find each other, open for the life of this one; rank; size.
_meeting: tuple[dist.Store, int, int] | None = None
# Gloo's threads let go of an exchange's tensors a moment after it is done. That takes the interpreter's
# lock, and where the interpreter has begun to end, the process dies of it ("terminate called").
_PARTING = 0.05  # seconds


def begin(backend: str, timeout: timedelta = _DEFAULT) -> None:
    """Starts the default group of the processes that torchrun, or variables like its, describe.

    `torch.distributed.destroy_process_group` ends it, and another may begin at once. torch's own
    rendezvous cannot do that, since it opens the store anew for each group. Where the first process
    serves the store, a faster one meets the last group's server while that closes, and both fail; where
    torchrun serves it, a faster process takes the last group's addresses for those of the new one.

    Args:
        backend: "gloo" or "nccl".
        timeout: of the meeting and of every exchange after it.
    """
    global _meeting
    if _meeting is None:
        _meeting = next(dist.rendezvous("env://", timeout=timeout))
        atexit.register(time.sleep, _PARTING)  # sleeping leaves them the lock
    store, rank, size = _meeting
    store.set_timeout(timeout)
    # Every process begins the same groups in the same order, so the numbers agree.
    own = dist.PrefixStore(f"iddpm_ext/{next(_numbers)}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=timeout)

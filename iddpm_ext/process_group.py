"""The process group of a launch, which may begin and end many times in one process."""

from __future__ import annotations

import itertools
import time
from datetime import timedelta

import torch.distributed as dist

_DEFAULT = timedelta(minutes=30)  # torch's own, of gloo
_numbers = itertools.count()
# Where the processes find each other, open for the life of this one; rank; size.
_meeting: tuple[dist.Store, int, int] | None = None
_PARTING = 0.05  # seconds


def begin(backend: str, timeout: timedelta = _DEFAULT) -> None:
    """Starts the default group of the processes that torchrun, or variables like its, describe.

    `end` ends it, and another may begin at once. torch's own
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
    store, rank, size = _meeting
    store.set_timeout(timeout)
    # Every process begins the same groups in the same order, so the numbers agree.
    own = dist.PrefixStore(f"iddpm_ext/{next(_numbers)}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=timeout)


def end() -> None:
    """Ends the default group.

    Gloo's threads let go of an exchange's tensors a moment after it is done, for which they need the
    interpreter's lock. Whoever destroys the group holds that while joining them: both would wait for
    ever. And where the interpreter ends meanwhile, the process dies of it ("terminate called").
    """
    time.sleep(_PARTING)  # leaves them the lock
    dist.destroy_process_group()

"""The process group of a launch, which may begin and end many times in one process."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_DEFAULT = timedelta(minutes=30)  # torch's own, of gloo
_numbers = itertools.count()
# Where the processes find each other, open for the life of this one; rank; size.
_meeting: tuple[dist.Store, int, int] | None = None
_PARTING = 1.0  # seconds that the end of a group waits for Gloo's threads at most
_POLL = 0.001


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
    """Ends the default group, once Gloo's threads hold nothing of its exchanges any more.

    They let go of an exchange's tensors a moment after it is done, for which they need the
    interpreter's lock. Whoever destroys the group holds that while joining them: both would wait for
    ever. And where the interpreter ends meanwhile, the process dies of it ("terminate called").
    """
    if dist.get_backend() == "gloo":
        _wait_for_threads(_PARTING)
    dist.destroy_process_group()


def _wait_for_threads(limit: float) -> bool:
    """Until every thread of Gloo has let go of the exchanges so far; False after `limit` seconds.

    A thread takes the next exchange only when it has let go of the last. So each of them is given
    another, of a dtype that Gloo refuses: it ends at once and asks nothing of other processes. Which
    thread took it is seen when its tensor goes, since the callback of the weak reference runs in the
    thread that held the tensor last. That may be this one; then there is one more.
    """
    group = dist.distributed_c10d._get_default_group()
    backend: Any = group._get_backend(torch.device("cpu"))
    backend = getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL wraps it
    this = threading.get_ident()
    seen: set[int] = set()
    deadline = time.monotonic() + limit
    while len(seen - {this}) < backend.options._threads:
        refused = torch.ones(1, dtype=torch.complex64, device="cpu")
        held = weakref.ref(refused, lambda _: seen.add(threading.get_ident()))
        backend.allreduce([refused])
        del refused
        while held() is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL)  # leaves them the lock
    return True

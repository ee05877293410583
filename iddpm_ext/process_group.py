"""The default process group, which can be started and ended several times in one process."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_DEFAULT = timedelta(minutes=30)  # PyTorch's for gloo
_numbers = itertools.count()
# The store of the rendezvous, open as long as this process lives; rank; size.
_meeting: tuple[dist.Store, int, int] | None = None
_PARTING = 1.0  # most seconds that `end` waits for Gloo's threads
_POLL = 0.001


def begin(backend: str, timeout: timedelta = _DEFAULT) -> None:
    """Starts the default group of the processes that torchrun's environment variables describe.

    `end` ends it, after which another may begin at once. With PyTorch's env:// rendezvous that is a race,
    since it opens a new store for each group: if the first process is the store's server, a faster one can
    connect to the last group's server while that closes, and both fail; if torchrun is, a faster process can
    read the last group's addresses.

    Args:
        backend: "gloo" or "nccl".
        timeout: of the rendezvous and of every later exchange.
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
    """Ends the default group, after Gloo's threads have released the tensors of its exchanges.

    They release the tensors of an exchange shortly after it is done, for which they need the GIL. Destroying
    the group joins these threads while holding the GIL, which would deadlock; and if the interpreter exits
    meanwhile, the process aborts ("terminate called").
    """
    if dist.get_backend() == "gloo":
        _wait_for_threads(_PARTING)
    dist.destroy_process_group()


def _wait_for_threads(limit: float) -> bool:
    """Waits until every thread of Gloo has released all exchanges so far; False after `limit` seconds.

    A thread takes the next exchange only when it has released the last one. So each of them is given one
    more, of a dtype that Gloo refuses: it ends at once without other processes. A weak reference to its
    tensor tells which thread took it, as the callback runs in the thread that released the tensor last. If
    that is this thread, another exchange is made.
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
            time.sleep(_POLL)  # releases the GIL
    return True

"""The few calls of the CUDA runtime that engine and trainer make: warm up, capture, replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_WARM_UPS = 2


class CaptureFailed(RuntimeError):
    """The work runs, but not as a CUDA graph; the message says why."""


class Written:
    """That what the current stream has been given to write is there for other streams."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._event = device, None
        if device.type == "cuda":
            self._event = torch.cuda.current_stream(device).record_event()

    def wait(self) -> None:
        """Makes the current stream wait for it."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)


class Graphs:
    """CUDA graphs on one device that share their memory.

    They may, as nothing in it outlives a replay: what goes in and out lies in tensors that were
    allocated outside. Replays must not overlap, so each use begins with `follow`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._last: torch.cuda.Stream | None = None

    def follow(self) -> None:
        """Makes the current stream wait for the use before, where that was on another stream."""
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """A function that does `work` again, on the stream that is current when it is called.

        work: launches kernels, always the same ones on the same memory. It runs on a side stream
        first, so that whatever libraries load, choose and allocate happens then; that run must leave
        nothing behind that matters.
        Raises CaptureFailed; errors of the work itself as they are.
        """
        with torch.cuda.device(self._device):
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    work()
            here.wait_stream(side)
            _let_go_of_workspaces()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads, such as those that load data, may allocate meanwhile.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=side, capture_error_mode="thread_local"
                ):
                    work()
            except RuntimeError as error:
                torch.cuda.set_stream(
                    here
                )  # PyTorch leaves the other one when ending a capture fails
                # The end of a capture complains of what went wrong within it.
                reason = str(error.__context__ or error)
                raise CaptureFailed(reason.splitlines()[0]) from error
            finally:
                _let_go_of_workspaces()
        return graph.replay


def _let_go_of_workspaces() -> None:
    """Makes cuBLAS ask for its scratch memory anew.

    PyTorch keeps one block a stream until somebody clears them all, as torch.compile does when it captures
    graphs of its own. A graph that was captured with a block from before its capture would then be replayed
    on memory that is somebody else's, or unmapped. With none at hand, a capture takes its block from the
    graphs' own pool, which lives as long as they do; and nobody else may find that one afterwards.
    """
    let_go = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # builds with CUDA have it
    if let_go is not None:
        let_go()

"""CUDA graphs for engine and trainer: warm up, capture, replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_WARM_UPS = 2


class CaptureFailed(RuntimeError):
    """The work cannot be captured as a CUDA graph, though it can be run; the message says why."""


class Written:
    """An event after what the current stream has been given to write, for other streams to wait for."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._event = device, None
        if device.type == "cuda":
            self._event = torch.cuda.current_stream(device).record_event()

    def wait(self) -> None:
        """Makes the current stream wait for the event."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)


class Graphs:
    """CUDA graphs on one device that share their memory.

    They can share it because nothing in it outlives a replay: inputs and outputs are tensors that were
    allocated outside. Replays must not overlap, so each use begins with `follow`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._last: torch.cuda.Stream | None = None

    def follow(self) -> None:
        """Makes the current stream wait for the previous use, if that was on another stream."""
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """A function that repeats `work` as a graph, on the stream that is current when it is called.

        work: launches kernels, always the same ones on the same memory. It first runs on a side stream,
        so that libraries load, choose algorithms and allocate before the capture; its results there must
        not matter.
        Raises CaptureFailed; errors of the work itself pass through.
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
                )  # where ending a capture fails, PyTorch does not restore the stream
                # What went wrong is the context of the error that ending the capture raises.
                reason = str(error.__context__ or error)
                raise CaptureFailed(reason.splitlines()[0]) from error
            finally:
                _let_go_of_workspaces()
        return graph.replay


def _let_go_of_workspaces() -> None:
    """Clears PyTorch's cuBLAS workspaces, so that the next use of cuBLAS allocates a new one.

    PyTorch keeps one workspace per stream until all are cleared, as torch.compile does when it captures
    graphs of its own. A graph that was captured with a workspace from before would then be replayed on
    memory that belongs to others or is unmapped. Cleared before a capture, the workspace is allocated in the
    graphs' own pool, which lives as long as they do; cleared after it, no later call can use that one.
    """
    let_go = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # builds with CUDA have it
    if let_go is not None:
        let_go()

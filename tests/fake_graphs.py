"""CUDA graphs without CUDA: captures are recorded on a tape and replayed on the CPU.

The tape holds every operation with the tensors that it read and wrote, so a replay does the same as a graph:
the same operations on the same memory, whatever Python has changed since. Operations that would make a
capture on a GPU fail raise `HostSync`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iddpm_ext import _native
from iddpm_ext.engines.cuda import graphs

# Operators that read a value on the host, or copy one from it.
_WAITING = (
    "_local_scalar_dense", "equal", "is_nonzero", "item", "lift_fresh", "masked_select", "nonzero",
    "_unique2", "unique_dim", "_pin_memory",
)  # fmt: skip
_METHODS = ("item", "cpu", "numpy", "tolist")


class HostSync(RuntimeError):
    """The host would have waited for the device."""


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in _WAITING:
            raise HostSync(f"{func} makes the host wait")
        return self.done(func, args, kwargs or {})

    def done(self, func, args, kwargs) -> Any:
        return func(*args, **kwargs)


@contextlib.contextmanager
def no_waiting(mode: TorchDispatchMode | None = None) -> Iterator[None]:
    """A context in which operations that would make the host wait for the device raise HostSync."""

    def refuse(name: str) -> Callable[..., None]:
        def method(*_: Any) -> None:
            raise HostSync(f"Tensor.{name} makes the host wait")

        return method

    with contextlib.ExitStack() as stack:
        for name in _METHODS:
            stack.enter_context(mock.patch.object(Tensor, name, refuse(name)))
        stack.enter_context(mode or _NoWaiting())
        yield


class _Recorder(_NoWaiting):
    def __init__(self) -> None:
        super().__init__()
        self.tape: list[Callable[[], None]] = []
        self._depth = 0

    def done(self, func, args, kwargs) -> Any:
        self._depth += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self._depth -= 1
        self.tape.append(lambda: _again(func, args, kwargs, tree_leaves(result)))
        return result

    def launcher(self, launch: Callable[..., int]) -> Callable[..., int]:
        """A kernel's launcher that records its calls, unless they are within a recorded operator."""

        def recorded(*args: Any) -> int:
            if not self._depth:
                self.tape.append(lambda: check(launch(*args)))
            return launch(*args)

        return recorded


def check(code: int) -> None:
    assert code == 0, _native.native().cuda_error(code)


def _again(func, args, kwargs, written: list[Any]) -> None:
    if "empty" in func._schema.name:
        for tensor in written:  # before a replay the graph's memory can contain anything
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
        return
    for now, then in zip(tree_leaves(func(*args, **kwargs)), written, strict=True):
        if isinstance(then, Tensor) and now.data_ptr() != then.data_ptr():
            then.copy_(now)


class Counted(graphs.Graphs):
    """Real graphs with counters; with `failure`, captures fail after the warm-up."""

    captures = replays = 0
    failure: str | None = None

    @classmethod
    def reset(cls) -> None:
        cls.captures = cls.replays = 0
        cls.failure = None

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.failure is not None:
            work()
            raise graphs.CaptureFailed(self.failure)
        once = self.recorded(work)
        type(self).captures += 1

        def replay() -> None:
            type(self).replays += 1
            once()

        return replay

    def recorded(self, work: Callable[[], None]) -> Callable[[], None]:
        return super().capture(work)


class FakeGraphs(Counted):
    """A substitute for `graphs.Graphs` on the CPU."""

    def follow(self) -> None:
        """There are no streams."""

    def recorded(self, work: Callable[[], None]) -> Callable[[], None]:
        for _ in range(2):
            work()
        recorder, module = _Recorder(), _native.native()
        launchers = {name: getattr(module, name) for name in dir(module) if name.endswith("_cuda")}
        with contextlib.ExitStack() as stack:
            for name, launch in launchers.items():
                patched = mock.patch.object(module, name, recorder.launcher(launch))
                stack.enter_context(patched)
            stack.enter_context(no_waiting(recorder))
            work()

        def replay() -> None:
            with torch.no_grad():
                for action in recorder.tape:
                    action()

        return replay


def graphs_of_others(device: str) -> None:
    """Runs graphs of torch.compile on a GPU, which clears the workspaces of cuBLAS; without one, nothing."""
    if device != "cuda":
        return
    layer = torch.nn.Linear(64, 64, device=device)
    call = torch.compile(layer, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            call(torch.ones(64, 64, device=device))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()

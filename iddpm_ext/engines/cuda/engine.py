"""Runs a `UNet` on a CUDA device as CUDA graphs of fused kernels.

The weights are copied once (`network.py`). The first call with images of a shape captures a graph; later
calls copy their input to where it reads, and replay it. Whole chains have graphs of their own
(`cuda_chain.py`). Where a capture fails, the same kernels are launched one by one.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from iddpm_ext.engines.base import (
    NotSupported,
    old_names,
    require_labels,
    undisturbed,
    with_low_res,
)
from iddpm_ext.engines.cuda import graphs
from iddpm_ext.engines.cuda.network import FusedNetwork
from iddpm_ext.engines.embedding import Projections, Schedule
from iddpm_ext.engines.locks import Lock
from iddpm_ext.networks.unet import UNet
from iddpm_ext.ops.spec import BACKENDS

__all__ = ["CUDAEngine", "NotSupported", "why_not_supported"]

if not TYPE_CHECKING:  # to a checker it would say that every name exists
    __getattr__ = old_names(__name__, NotServed="NotSupported", why_not_served="why_not_supported")

_KEPT_SCHEDULES = 4
_KEPT_GRAPHS = 4
_KEPT_MEMORIES = 4
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Task(Protocol):
    """Work that a graph can capture: it reads and writes tensors of its own, whose addresses are fixed."""

    def work(self) -> None:
        """Launches the kernels, without waiting for results; may be repeated."""


AnyTask = TypeVar("AnyTask", bound=Task)


def supports_device(device: torch.device) -> bool:
    """Whether the engine runs on this kind of device."""
    return device.type == "cuda"


def why_not_supported(model: object, dtype: torch.dtype = torch.float32) -> str | None:
    """None if the engine can run `model`, else the reason."""
    if not isinstance(model, UNet):
        return f"the CUDA engine runs an iddpm_ext.UNet, got {type(model).__name__}"
    if dtype not in _DTYPES:
        return f"the CUDA engine computes in float32, bfloat16 or float16, got {dtype}"
    device = next(model.parameters()).device
    if not supports_device(device):
        return f"the CUDA engine needs weights on a CUDA device, got {device}"
    for name, parameter in model.named_parameters():
        if parameter.device != device:
            return f"the CUDA engine needs weights on one device, and {name} is not on {device}"
    return None


class CUDAProgram:
    """A network's weights in the engine's layout, which calls in many threads share.

    The arguments are those of `CUDAEngine`, which raises as this does.
    """

    def __init__(self, model: UNet, *, dtype: torch.dtype = torch.float32, exact: bool = False):
        reason = why_not_supported(model, dtype)
        if reason is not None:
            raise NotSupported(f"CUDAEngine: {reason}")
        self.dtype, self.exact, self.config = dtype, exact, model.config
        self.device = next(model.parameters()).device
        self._lock, self._used, self._idle = Lock(), 0, [Memory(self.device)]
        with computing(self.device, exact):
            backend = model.backend if model.backend in BACKENDS else "auto"
            self.network = FusedNetwork(model, dtype, backend)
            self.project = Projections(model)
            self._written = graphs.Written(self.device)
        assert self.project.floats == self.network.floats

    def engine(self) -> CUDAEngine:
        """An engine for one call, with memory of its own."""
        return CUDAEngine.of(self)

    def renew(self, model: UNet) -> bool:
        """Copies the model's weights over its own, in place for captured graphs; False if in use."""
        with self._lock:
            if self._used:
                return False
            with computing(self.device, self.exact):
                for memory in self._idle:
                    memory.graphs.follow()
                    memory.schedules.clear()
                    memory.recent.clear()
                self.network.refresh()
                self.project = Projections(model)
                self._written = graphs.Written(self.device)
            return True

    def take(self) -> Memory:
        """A free `Memory` for an engine."""
        with self._lock:
            self._used += 1
            self._written.wait()
            memory = self._idle.pop() if self._idle else Memory(self.device)
        memory.graphs.follow()
        return memory

    def give_back(self, memory: Memory) -> None:
        """Returns what `take` gave; a few are kept for the next calls."""
        with self._lock:
            self._used -= 1
            if len(self._idle) < _KEPT_MEMORIES:
                self._idle.append(memory)


class Memory:
    """The graphs and embeddings that one call at a time uses."""

    def __init__(self, device: torch.device) -> None:
        self.graphs = graphs.Graphs(device)
        self.can_capture = True
        self.ready: dict[Hashable, tuple[Task, Callable[[], None]]] = {}
        self.schedules: dict[tuple[bytes, bytes], Schedule] = {}
        self.recent: list[tuple[_Same, Schedule]] = []


class CUDAEngine:
    """A network that is ready to be evaluated, as in evaluation mode, on images of any shape.

    model: its weights are copied; later changes of them have no effect here.
    dtype: torch.float32, bfloat16 or float16, of the features. Sums, statistics, the first and last
        convolution and the timestep path stay float32. Whether products of float32 features use
        TensorFloat32 follows PyTorch's settings: `torch.backends.cudnn.allow_tf32` (on by default) for
        convolutions, `torch.set_float32_matmul_precision` for matrix products.
    exact: never TensorFloat32.

    Raises NotSupported, saying why, where it cannot run the network. One engine runs one call at a time,
    on the current stream; several engines of one program (`CUDAEngine.of`) share the weights and may run
    at once. Only the first call with new timesteps or labels waits for the device.
    """

    name = "cuda engine"

    def __init__(self, model: UNet, *, dtype: torch.dtype = torch.float32, exact: bool = False):
        self._use(CUDAProgram(model, dtype=dtype, exact=exact))

    @classmethod
    def of(cls, program: CUDAProgram) -> CUDAEngine:
        """An engine that runs a program that is built already."""
        engine = cls.__new__(cls)
        engine._use(program)
        return engine

    def _use(self, program: CUDAProgram) -> None:
        self._memory = program.take()
        weakref.finalize(self, program.give_back, self._memory)
        self.config, self.dtype, self.exact = program.config, program.dtype, program.exact
        self.device, self.network, self.project = program.device, program.network, program.project
        self.in_channels = self.config.in_channels * (2 if self.config.super_resolution else 1)
        self.out_channels = self.config.out_channels
        self._schedule: Schedule | None = None
        self._low_res: Tensor | None = None

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """The context in which this engine launches kernels."""
        return computing(self.device, self.exact)

    def task(
        self, key: Hashable, build: Callable[[], AnyTask]
    ) -> tuple[AnyTask, Callable[[], None]]:
        """The task of `key`, built and captured the first time, and a function that does its work."""
        key = (key, *_float32_settings())  # a graph keeps the settings of its capture
        ready = self._memory.ready
        found = ready.pop(key, None)
        if found is None:
            with self.computing():
                task = build()
                found = task, self._captured(task.work)
        ready[key] = found
        while len(ready) > _KEPT_GRAPHS:
            del ready[next(iter(ready))]
        return found  # type: ignore[return-value]

    def _captured(self, work: Callable[[], None]) -> Callable[[], None]:
        if self._memory.can_capture:
            try:
                return self._memory.graphs.capture(work)
            except graphs.CaptureFailed as reason:
                self._memory.can_capture = False
                warnings.warn(
                    f"sample: kernels are launched one by one, without a CUDA graph: {reason}",
                    RuntimeWarning,
                    stacklevel=2,
                )

        device, exact = self.device, self.exact  # not self, which lives for one call

        def launch() -> None:
            with computing(device, exact):
                work()

        return launch

    def begin(
        self, timesteps: Tensor, labels: Tensor | None = None, low_res: Tensor | None = None
    ) -> None:
        """Prepares for calls by step index.

        timesteps: [S], the network's timestep input at each step. labels: int64 [N], of the images of
        the following calls, -1 for unlabelled; None for an unconditional network. low_res: [N, C, h, w],
        of the following calls, or None where x holds the upsampled image already.
        """
        memory, self._low_res = self._memory, low_res
        memory.graphs.follow()
        for seen, schedule in memory.recent:
            if seen == _Same(timesteps, labels):
                self._schedule = schedule
                return
        if timesteps.dim() != 1:
            raise ValueError(
                f"CUDAEngine.begin: timesteps must be [S], got {list(timesteps.shape)}"
            )
        require_labels("CUDAEngine.begin", self.config.num_classes, labels)
        with self.computing():
            times = timesteps.detach().to(self.device, torch.float64)
            kinds = None if labels is None else labels.detach().to(self.device, torch.int64)
            key = (
                times.cpu().numpy().tobytes(),
                b"" if kinds is None else kinds.cpu().numpy().tobytes(),
            )
            if key not in memory.schedules:
                while len(memory.schedules) >= _KEPT_SCHEDULES:
                    del memory.schedules[next(iter(memory.schedules))]
                memory.schedules[key] = Schedule(self.project, times, kinds)
        self._schedule = memory.schedules[key]
        memory.recent = [
            *memory.recent[1 - _KEPT_SCHEDULES :],
            (_Same(timesteps, labels), self._schedule),
        ]

    @property
    def schedule(self) -> Schedule:
        """The embeddings that the last `begin` prepared."""
        if self._schedule is None:
            raise RuntimeError("CUDAEngine: begin must be called before a call by step index")
        return self._schedule

    def __call__(self, x: Tensor, step_index: int) -> Tensor:
        """The network's output at a step of the schedule.

        x: float32 [n, C, H, W] on the engine's device; with super-resolution, C holds the upsampled
        low-resolution image as well. Returns a new float32 tensor [n, C_out, H, W].
        """
        self._memory.graphs.follow()
        schedule, x = self.schedule, with_low_res(x, self._low_res)
        if not 0 <= step_index < len(schedule.timesteps):
            raise ValueError(
                f"CUDAEngine: step_index must lie in [0, {len(schedule.timesteps) - 1}], "
                f"got {step_index}"
            )
        self._require_x(x)
        n = len(x)
        if schedule.labels is not None and len(schedule.labels) < n:
            raise ValueError(
                f"CUDAEngine: x must have at most the {len(schedule.labels)} samples that the "
                f"schedule has labels for, got {n}"
            )
        with self.computing():
            table, rows = schedule.rows(step_index, n)
            return self._evaluate(x, table.index_select(0, rows))

    def at(
        self,
        x: Tensor,
        timesteps: Tensor,
        labels: Tensor | None = None,
        low_res: Tensor | None = None,
    ) -> Tensor:
        """The network's output at any timesteps [n], with labels [n] as in `UNet.forward`.

        Labels are not checked, since that would wait for the device.
        """
        self._memory.graphs.follow()
        x = with_low_res(x, low_res)
        self._require_x(x)
        n = len(x)
        if timesteps.shape != (n,):
            raise ValueError(f"CUDAEngine.at: timesteps must be [{n}], got {list(timesteps.shape)}")
        if (labels is None) != (self.config.num_classes is None) or (
            labels is not None and labels.shape != (n,)
        ):
            require_labels("CUDAEngine.at", self.config.num_classes, labels, n)
        with self.computing():
            labels = None if labels is None else labels.to(self.device)
            return self._evaluate(x, self.project(timesteps.to(self.device), labels))

    def _evaluate(self, x: Tensor, embeddings: Tensor) -> Tensor:
        if not len(x):
            return x.new_empty(0, self.out_channels, *x.shape[2:])
        task, replay = self.task(("network", *x.shape), lambda: _Evaluation(self, x))
        task.x.copy_(x)
        torch.add(embeddings, self.network.embedding_bias, out=task.embeddings)
        replay()
        return task.out.clone()

    def _require_x(self, x: Tensor) -> None:
        if x.dtype != torch.float32 or x.device != self.device:
            raise TypeError(
                f"CUDAEngine: x must be float32 on {self.device}, got {x.dtype} on {x.device}"
            )
        multiple = self.config.size_multiple
        if (
            x.dim() != 4
            or x.shape[1] != self.in_channels
            or any(s < 1 or s % multiple for s in x.shape[2:])
        ):
            raise ValueError(
                f"CUDAEngine: x must be [n, {self.in_channels}, H, W] with H and W multiples of "
                f"{multiple}, got {list(x.shape)}"
            )


class _Evaluation:
    """The network on images of one shape."""

    def __init__(self, engine: CUDAEngine, x: Tensor):
        self._network = engine.network
        n, _, height, width = x.shape
        self.x = torch.zeros_like(x, memory_format=torch.contiguous_format)
        self.embeddings = x.new_zeros(n, engine.network.floats)
        self.out = x.new_empty(n, engine.out_channels, height, width)

    def work(self) -> None:
        self.out.copy_(self._network(self.x, self.embeddings))


class _Same:
    """Compares equal for the same tensors if they were not written to since; never reads their values."""

    def __init__(self, *tensors: Tensor | None):
        self._tensors = tensors
        self._versions = [0 if t is None or t.is_inference() else t._version for t in tensors]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Same)
            and all(a is b for a, b in zip(self._tensors, other._tensors, strict=True))
            and self._versions == other._versions
        )

    __hash__ = None  # type: ignore[assignment]


def _float32_settings() -> tuple[bool, str]:
    """PyTorch's settings of TensorFloat32, for convolutions and for matrix products."""
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


# Held while one thread launches under changed flags, which are the whole process's.
_FLAGS = Lock()


@contextlib.contextmanager
def computing(device: torch.device, exact: bool) -> Iterator[None]:
    """The context of launches: no gradients, no autocast, and no TensorFloat32 where `exact`."""
    with contextlib.ExitStack() as stack:
        # Inference tensors could not be written to by later calls outside inference mode.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(undisturbed(device.type))
        stack.enter_context(_FLAGS)
        if exact:
            stack.enter_context(_no_tensor_float32())
        yield


@contextlib.contextmanager
def _no_tensor_float32() -> Iterator[None]:
    cudnn, (_, precision) = torch.backends.cudnn, _float32_settings()
    with cudnn.flags(
        enabled=cudnn.enabled,
        benchmark=cudnn.benchmark,
        deterministic=cudnn.deterministic,
        allow_tf32=False,
    ):
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)

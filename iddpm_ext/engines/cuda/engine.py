"""Runs a `UNet` on a CUDA device as CUDA graphs of fused kernels.

The weights are copied once (`network.py`). The first call on images of a shape captures the
network, later ones copy their input to where the graph reads it and replay it; whole chains have a
graph of their own (`cuda_chain.py`). Where a capture fails the same kernels are launched one by one.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from iddpm_ext.engines.base import NotServed, WeightsWatch, require_labels
from iddpm_ext.engines.cuda import graphs
from iddpm_ext.engines.cuda.network import FusedNetwork
from iddpm_ext.engines.embedding import Projections, Schedule
from iddpm_ext.networks.unet import UNet
from iddpm_ext.ops.rows import no_autocast
from iddpm_ext.ops.spec import BACKENDS

__all__ = ["CUDAEngine", "NotServed", "why_not_served"]

_KEPT_SCHEDULES = 4
_KEPT_GRAPHS = 4
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Task(Protocol):
    """What a graph does, on tensors of its own that stay where they are."""

    def work(self) -> None:
        """Launches the kernels; does not look at a result. Done once more is done again."""


AnyTask = TypeVar("AnyTask", bound=Task)


def serves_device(device: torch.device) -> bool:
    """Whether the engine runs on this kind of device."""
    return device.type == "cuda"


def why_not_served(model: object, dtype: torch.dtype = torch.float32) -> str | None:
    """None if the engine can run `model`, else the reason."""
    if not isinstance(model, UNet):
        return f"the CUDA engine runs an iddpm_ext.UNet, got {type(model).__name__}"
    if dtype not in _DTYPES:
        return f"the CUDA engine computes in float32, bfloat16 or float16, got {dtype}"
    device = next(model.parameters()).device
    if not serves_device(device):
        return f"the CUDA engine needs weights on a CUDA device, got {device}"
    for name, parameter in model.named_parameters():
        if parameter.device != device:
            return f"the CUDA engine needs weights on one device, and {name} is not on {device}"
    return None


class CUDAEngine:
    """A network that is ready to be evaluated, as in evaluation mode, on images of any shape.

    model: its weights are copied; when they have changed, the next call copies them again.
    dtype: torch.float32, bfloat16 or float16, of the features. Sums, statistics, the network's two
        ends and the timestep path stay float32. Whether float32 features may be multiplied in
        TensorFloat32 is PyTorch's to say: in convolutions `torch.backends.cudnn.allow_tf32`, which is
        on from the start, in products `torch.set_float32_matmul_precision`.
    exact: never TensorFloat32.

    Raises NotServed, saying why, where it cannot run the network. One call at a time: calls share
    memory. Nothing waits for the device but the first call with new timesteps or labels.
    """

    def __init__(self, model: UNet, *, dtype: torch.dtype = torch.float32, exact: bool = False):
        reason = why_not_served(model, dtype)
        if reason is not None:
            raise NotServed(f"CUDAEngine: {reason}")
        self.model, self.dtype, self.exact = model, dtype, exact
        self.device = next(model.parameters()).device
        c = model.config
        self.in_channels = c.in_channels * (2 if c.super_resolution else 1)
        self.out_channels = c.out_channels
        self._graphs = graphs.Graphs(self.device)
        self._can_capture = True
        self._ready: dict[Hashable, tuple[Task, Callable[[], None]]] = {}
        self._watch = WeightsWatch(model)
        with self.computing():
            backend = model.backend if model.backend in BACKENDS else "auto"
            self.network = FusedNetwork(model, dtype, backend)
            self.project = Projections(model)
        assert self.project.floats == self.network.floats
        self._schedules: dict[tuple[bytes, bytes], Schedule] = {}
        self._recent: list[tuple[_Same, Schedule]] = []
        self._schedule: Schedule | None = None

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Where kernels are launched: plain tensors, dtypes as written, float32 as it was asked for."""
        with contextlib.ExitStack() as stack:
            # Tensors that are written again and again must not be inference tensors.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(no_autocast(self.device.type))
            if self.exact:
                stack.enter_context(_no_tensor_float32())
            yield

    def task(
        self, key: Hashable, build: Callable[[], AnyTask]
    ) -> tuple[AnyTask, Callable[[], None]]:
        """The task of that key, built and captured at first, and the function that does its work."""
        key = (key, *_float32_settings())  # which a graph keeps
        found = self._ready.pop(key, None)
        if found is None:
            with self.computing():
                task = build()
                found = task, self._captured(task.work)
        self._ready[key] = found
        while len(self._ready) > _KEPT_GRAPHS:
            del self._ready[next(iter(self._ready))]
        return found  # type: ignore[return-value]

    def _captured(self, work: Callable[[], None]) -> Callable[[], None]:
        if self._can_capture:
            try:
                return self._graphs.capture(work)
            except graphs.CaptureFailed as reason:
                self._can_capture = False
                warnings.warn(
                    f"sample: kernels are launched one by one, without a CUDA graph: {reason}",
                    RuntimeWarning,
                    stacklevel=2,
                )

        def launch() -> None:
            with self.computing():
                work()

        return launch

    def begin(self) -> None:
        """What every use of the engine's memory starts with: changed weights are copied again."""
        self._graphs.follow()
        if not self._watch.changed():
            return
        with self.computing():
            self.network.refresh()
            self.project = Projections(self.model)
            self._schedules.clear()
            self._recent.clear()
            if self._schedule is not None:
                self._schedule = Schedule(
                    self.project, self._schedule.timesteps, self._schedule.labels
                )

    def set_schedule(self, timesteps: Tensor, labels: Tensor | None = None) -> None:
        """Prepare for calls by step index.

        timesteps: [S], what the network is told at each step. labels: int64 [N] of the images of
        the calls to come, -1 for unlabelled; None for an unconditional network.
        """
        self.begin()
        for seen, schedule in self._recent:
            if seen == _Same(timesteps, labels):
                self._schedule = schedule
                return
        if timesteps.dim() != 1:
            raise ValueError(
                f"CUDAEngine.set_schedule: timesteps must be [S], got {list(timesteps.shape)}"
            )
        require_labels("CUDAEngine.set_schedule", self.model.config.num_classes, labels)
        with self.computing():
            times = timesteps.detach().to(self.device, torch.float64)
            kinds = None if labels is None else labels.detach().to(self.device, torch.int64)
            key = (
                times.cpu().numpy().tobytes(),
                b"" if kinds is None else kinds.cpu().numpy().tobytes(),
            )
            if key not in self._schedules:
                while len(self._schedules) >= _KEPT_SCHEDULES:
                    del self._schedules[next(iter(self._schedules))]
                self._schedules[key] = Schedule(self.project, times, kinds)
        self._schedule = self._schedules[key]
        self._recent = [
            *self._recent[1 - _KEPT_SCHEDULES :],
            (_Same(timesteps, labels), self._schedule),
        ]

    @property
    def schedule(self) -> Schedule:
        """What `set_schedule` said last."""
        if self._schedule is None:
            raise RuntimeError(
                "CUDAEngine: set_schedule must be called before a call by step index"
            )
        return self._schedule

    def __call__(self, x: Tensor, step_index: int) -> Tensor:
        """The network's output at a step of the schedule.

        x: float32 [n, C, H, W] on the engine's device; with super-resolution, C holds the upsampled
        low-resolution image as well. Returns a new float32 tensor [n, C_out, H, W].
        """
        self.begin()
        schedule = self.schedule
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

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """The network's output at any timesteps [n], with labels y [n] as in `UNet.forward`.

        Labels are not looked at, since that would wait for the device.
        """
        self.begin()
        self._require_x(x)
        n = len(x)
        if timesteps.shape != (n,):
            raise ValueError(
                f"CUDAEngine.forward: timesteps must be [{n}], got {list(timesteps.shape)}"
            )
        if (y is None) != (self.model.config.num_classes is None) or (
            y is not None and y.shape != (n,)
        ):
            require_labels("CUDAEngine.forward", self.model.config.num_classes, y, n)
        with self.computing():
            y = None if y is None else y.to(self.device)
            return self._evaluate(x, self.project(timesteps.to(self.device), y))

    def _evaluate(self, x: Tensor, embeddings: Tensor) -> Tensor:
        if not len(x):
            return torch.empty(0, self.out_channels, *x.shape[2:], device=self.device)
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
        multiple = self.model.config.size_multiple
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
        self.x = torch.zeros(x.shape, device=engine.device)
        self.embeddings = torch.zeros(n, engine.network.floats, device=engine.device)
        self.out = torch.empty(n, engine.out_channels, height, width, device=engine.device)

    def work(self) -> None:
        self.out.copy_(self._network(self.x, self.embeddings))


class _Same:
    """Equal for the same tensors, unwritten since: told without a look at their values."""

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
    """What PyTorch was told of TensorFloat32: in convolutions, and in products."""
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


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

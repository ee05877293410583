"""Runs a `UNet` on the CPU several times faster than module by module, in full float32.

The weights are transformed and packed once, the network is laid out as a plan (`program.py`), and an
evaluation is one call into `csrc/unet_engine`, without the GIL.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from iddpm_ext import _native
from iddpm_ext.engines.base import NotSupported, old_names, require_labels, with_low_res
from iddpm_ext.engines.cpu.algorithms import Algorithm
from iddpm_ext.engines.cpu.program import CPUProgram, why_not_supported
from iddpm_ext.engines.embedding import Schedule
from iddpm_ext.networks.unet import UNet

__all__ = ["CPUEngine", "NotSupported", "why_not_supported"]

if not TYPE_CHECKING:  # to a checker it would say that every name exists
    __getattr__ = old_names(__name__, NotServed="NotSupported", why_not_served="why_not_supported")


class CPUEngine:
    """A network that is ready to be evaluated, as in evaluation mode, on up to `batch_size` images.

    model: its weights are copied; later changes of them have no effect here.
    dtype: torch.float32; or torch.bfloat16, which rounds the operands of most convolutions and of
        attention's linear layers, and with AMX those of attention's products. Sums, normalisation,
        softmax, the residual stream and the timestep path stay float32. On Intel CPUs without AMX
        bfloat16 is faster for large weights and few pixels alone, and no other convolution is rounded.
    exact: only algorithms as accurate as direct convolution.
    num_threads: None takes `torch.get_num_threads()`.
    size: height and width of the images; None takes those of `model.config`.
    algorithm: for every 3x3 convolution, instead of the tables' choice; used by the tuner.

    Raises NotSupported, saying why, where it cannot run the network. One engine runs one call at a time;
    several engines of one program (`CPUEngine.of`) share the weights and may run at once.
    """

    name = "cpu engine"

    def __init__(
        self,
        model: UNet,
        batch_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        exact: bool = False,
        num_threads: int | None = None,
        size: tuple[int, int] | None = None,
        algorithm: Algorithm | None = None,
    ):
        self._use(
            CPUProgram(
                model,
                batch_size,
                dtype=dtype,
                exact=exact,
                num_threads=num_threads,
                size=size,
                algorithm=algorithm,
            )
        )

    @classmethod
    def of(cls, program: CPUProgram) -> CPUEngine:
        """An engine that runs a program that is built already."""
        engine = cls.__new__(cls)
        engine._use(program)
        return engine

    def _use(self, program: CPUProgram) -> None:
        self.program, self._memory = program, program.take()
        weakref.finalize(self, program.give_back, self._memory)
        self.batch_size, self.size, self.dtype = program.batch_size, program.size, program.dtype
        self.in_channels, self.out_channels = program.in_channels, program.out_channels
        self.convolutions, self.num_rows = program.convolutions, program.num_rows
        self._schedule: Schedule | None = None
        self._low_res: Tensor | None = None

    def begin(
        self, timesteps: Tensor, labels: Tensor | None = None, low_res: Tensor | None = None
    ) -> None:
        """Prepares for calls by step index: computes every embedding projection once.

        timesteps: [S], the network's timestep input at each step. labels: int64 [N], of the images of
        the following calls, -1 for unlabelled; None for an unconditional network. low_res: float32
        [N, C, h, w], of the following calls, or None where x holds the upsampled image already.
        """
        if timesteps.dim() != 1:
            raise ValueError(f"CPUEngine.begin: timesteps must be [S], got {list(timesteps.shape)}")
        require_labels("CPUEngine.begin", self.program.classes, labels)
        timesteps = timesteps.detach().to("cpu", torch.float64)
        labels = None if labels is None else labels.detach().to("cpu", torch.int64)
        self._schedule = self.program.schedule(timesteps, labels)
        self._low_res = low_res

    def __call__(self, x: Tensor, step_index: int, out: Tensor | None = None) -> Tensor:
        """The network's output at a step of the schedule.

        x: float32 [n, C, H, W] on the CPU, n at most `batch_size`; with super-resolution, C holds
        the upsampled low-resolution image as well. out: float32 [n, C_out, H, W], contiguous.
        Returns `out`, or a new tensor.
        """
        schedule = self._schedule
        if schedule is None:
            raise RuntimeError("CPUEngine: begin must be called before a call by step index")
        if not 0 <= step_index < len(schedule.timesteps):
            raise ValueError(
                f"CPUEngine: step_index must lie in [0, {len(schedule.timesteps) - 1}], "
                f"got {step_index}"
            )
        x = with_low_res(x, self._low_res)
        self._require_x(x)
        n = x.shape[0]
        if schedule.labels is not None and len(schedule.labels) < n:
            raise ValueError(
                f"CPUEngine: x must have at most the {len(schedule.labels)} samples that the "
                f"schedule has labels for, got {n}"
            )
        return self._run(x, out, *self._rows_of(schedule, step_index, n))

    def prepare(self, x: Tensor, out: Tensor) -> Callable[[int], None]:
        """A function of the step index that writes the network's output for the current x into out.

        For chains, which own both tensors: nothing is checked. x, out: contiguous, as in `__call__`.
        """
        self._require_x(x)
        schedule, n = self._schedule, len(x)
        assert schedule is not None and x.is_contiguous() and out.is_contiguous()

        def evaluate(step_index: int) -> None:
            self._run_rows(0, self.num_rows, x, out, *self._rows_of(schedule, step_index, n))

        return evaluate

    def at(
        self,
        x: Tensor,
        timesteps: Tensor,
        labels: Tensor | None = None,
        low_res: Tensor | None = None,
    ) -> Tensor:
        """The network's output at any timesteps [n], with labels [n] as in `UNet.forward`."""
        x = with_low_res(x, low_res)
        self._require_x(x)
        n = x.shape[0]
        if timesteps.shape != (n,):
            raise ValueError(f"CPUEngine.at: timesteps must be [{n}], got {list(timesteps.shape)}")
        require_labels("CPUEngine.at", self.program.classes, labels, n)
        table = self.program.project(timesteps, labels)
        rows = torch.arange(n, dtype=torch.int64, device="cpu")
        return self._run(x, None, table, rows * self.program.project.floats)

    def _run(self, x: Tensor, out: Tensor | None, table: Tensor, offsets: Tensor) -> Tensor:
        x = x.detach().contiguous()
        n = x.shape[0]
        shape = (n, self.out_channels, *self.size)
        if out is None:
            out = torch.empty(shape, dtype=torch.float32, device="cpu")
        elif out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous():
            raise ValueError(
                f"CPUEngine: out must be contiguous float32 {list(shape)}, "
                f"got {out.dtype} {list(out.shape)} with strides {out.stride()}"
            )
        if n:
            self._run_rows(0, self.num_rows, x, out, table, offsets)
        return out

    def prepare_rows(self, x: Tensor) -> Callable[[int], None]:
        """A function that runs one operation of the plan by its index, at the first step; for the tuner.

        It adds microseconds to the operation. x: contiguous, as in `__call__`.
        """
        assert self._schedule is not None
        shape = (len(x), self.out_channels, *self.size)
        out = torch.empty(shape, dtype=torch.float32, device="cpu")
        table, offsets = self._rows_of(self._schedule, 0, len(x))
        return lambda row: self._run_rows(row, 1, x, out, table, offsets)

    def _rows_of(self, schedule: Schedule, step_index: int, n: int) -> tuple[Tensor, Tensor]:
        """The table of embeddings, and where in it (in floats) the row of each of n samples begins."""
        table, rows = schedule.rows(step_index, n)
        return table, rows * self.program.project.floats

    def _run_rows(
        self, first: int, count: int, x: Tensor, out: Tensor, table: Tensor, offsets: Tensor
    ) -> None:
        memory = self._memory
        code = _native.native().unet_engine(
            memory.rows[first].data_ptr(),
            count,
            len(x),
            self.program.num_threads,
            x.data_ptr(),
            out.data_ptr(),
            table.data_ptr(),
            offsets.data_ptr(),
            memory.shared.data_ptr(),
            memory.shared.numel(),
            memory.scratch.data_ptr(),
            memory.scratch.shape[1],
        )
        if code < 0:
            raise RuntimeError("CPUEngine: the instruction set in use has no engine any more")
        if code:
            raise RuntimeError(f"CPUEngine: operation {first + code - 1} of the plan could not run")

    def _require_x(self, x: Tensor) -> None:
        wanted = (self.in_channels, *self.size)
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise TypeError(f"CPUEngine: x must be float32 on the CPU, got {x.dtype} on {x.device}")
        if x.dim() != 4 or x.shape[1:] != wanted or x.shape[0] > self.batch_size:
            raise ValueError(
                f"CPUEngine: x must be [at most {self.batch_size}, "
                f"{', '.join(map(str, wanted))}], got {list(x.shape)}"
            )

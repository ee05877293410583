"""Runs a `UNet` on the CPU several times faster than module by module, in full float32.

The weights are transformed and packed once, the network is laid out as a plan (`plan.py`), and
an evaluation is one call into `csrc/unet_engine`, without the GIL.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from iddpm_ext import _native
from iddpm_ext.engines.base import NotServed, WeightsWatch, require_labels
from iddpm_ext.engines.cpu.algorithms import Algorithm, ConvShape, load_chooser
from iddpm_ext.engines.cpu.plan import Plan, Planner
from iddpm_ext.engines.embedding import Projections, Schedule
from iddpm_ext.networks.unet import UNet

__all__ = ["CPUEngine", "NotServed", "why_not_served"]

_KEPT_SCHEDULES = 4


def why_not_served(model: object, dtype: torch.dtype = torch.float32) -> str | None:
    """None if the engine can run `model` on this machine, else the reason."""
    absence = _native.cpu_absence()
    if absence is not None:
        return absence
    info = _native.native().build_info()
    if info["isa"] == "base":
        return "the CPU engine needs AVX2 or AVX-512, and the instruction set in use has neither"
    if not isinstance(model, UNet):
        return f"the CPU engine runs an iddpm_ext.UNet, got {type(model).__name__}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the CPU engine computes in float32 or bfloat16, got {dtype}"
    if dtype == torch.bfloat16 and not info["bf16"] and not _native.native().has_tiles():
        return "the CPU engine needs AVX-512 with its bfloat16 products (avx512_bf16) for bfloat16"
    if not model.config.conv_resample:
        return "the CPU engine resamples by convolutions, and the network has conv_resample=False"
    if model.config.resblock_updown:
        return "the CPU engine resamples by convolutions, and the network has resblock_updown=True"
    if model.config.attention_order != "legacy":
        return "the CPU engine splits qkv in the legacy order, and the network has the new one"
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            return f"the CPU engine needs weights on the CPU, and {name} is on {parameter.device}"
        if parameter.dtype not in (torch.float32, torch.float64):
            return f"the CPU engine needs float32 weights, and {name} is {parameter.dtype}"
    return None


class CPUEngine:
    """A network that is ready to be evaluated, as in evaluation mode, on up to `batch_size` images.

    model: its weights are copied; when they have changed, the next call copies them again.
    dtype: torch.float32; or torch.bfloat16, which rounds the operands of most convolutions and of
        attention's linear layers, and with AMX those of attention's products. Sums, normalisation,
        softmax, the residual stream and the timestep path stay float32. Where rounding gains no
        speed nothing is rounded: on Intel's CPUs without AMX.
    exact: only algorithms whose rounding error is that of direct convolution.
    num_threads: None takes `torch.get_num_threads()`.
    size: height and width of the images; None takes `model.config.image_size` for both.
    algorithm: of every 3x3 convolution, instead of the tables' choice; the tuner measures by it.

    Raises NotServed, saying why, where it cannot run the network. One call at a time: calls share
    one workspace.
    """

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
        reason = why_not_served(model, dtype)
        if reason is not None:
            raise NotServed(f"CPUEngine: {reason}")
        if batch_size < 1:
            raise ValueError(f"CPUEngine: batch_size must be at least 1, got {batch_size}")
        side, multiple = model.config.image_size, model.config.size_multiple
        self.size = size or (side, side)
        if any(s < 1 or s % multiple for s in self.size):
            raise ValueError(f"CPUEngine: size must be multiples of {multiple}, got {self.size}")
        self.model, self.batch_size, self.exact = model, batch_size, exact
        self.dtype, self._forced = dtype, algorithm
        self.num_threads = num_threads or torch.get_num_threads()
        c = model.config
        self.in_channels = c.in_channels * (2 if c.super_resolution else 1)
        self.out_channels = c.out_channels
        self._watch = WeightsWatch(model)
        self._build()

    def _build(self) -> None:
        self.isa = _native.native().build_info()["isa"]
        packed: dict[tuple[int, str], Tensor] = {}

        def packer(module: nn.Module, form: str, make: Callable[[], Tensor]) -> Tensor:
            if (id(module), form) not in packed:
                packed[id(module), form] = make()
            return packed[id(module), form]

        chooser = load_chooser(tiles=_native.native().has_tiles())
        bf16 = self.dtype == torch.bfloat16

        def choose(shape: ConvShape) -> Algorithm:
            return self._forced or chooser(shape, exact=self.exact, bf16=bf16)

        def plan(base: int) -> Plan:
            return Planner(
                *(self.model, self.batch_size, self.size, self.num_threads),
                choose=choose,
                bf16=bf16 and chooser.fast_products,
                tiles=bf16 and chooser.tiles,
                packer=packer,
                base=base,
            ).plan()

        needs = plan(0)
        self._arena = torch.empty(needs.arena_floats + 16)
        base = -(-self._arena.data_ptr() // 64) * 64
        final = plan(base)
        self._rows, self._maps = torch.tensor(final.rows, dtype=torch.int64), final.maps
        self.convolutions, self.num_rows = needs.convolutions, len(needs.rows)
        self._packed = packed  # the rows hold addresses only
        self._shared = torch.empty(needs.shared_floats)
        self._scratch = torch.empty(self.num_threads, needs.scratch_floats)
        self._project = Projections(self.model)
        assert self._project.floats == needs.embedding_floats
        self._schedules: dict[tuple[bytes, bytes], Schedule] = {}
        self._schedule: Schedule | None = None

    def _follow_weights(self) -> None:
        """Pack the weights again if any was written to or replaced since."""
        if not self._watch.changed():
            return
        schedule = self._schedule
        self._build()
        if schedule is not None:
            self.set_schedule(schedule.timesteps, schedule.labels)

    def set_schedule(self, timesteps: Tensor, labels: Tensor | None = None) -> None:
        """Prepare for calls by step index: every embedding projection is computed once, here.

        timesteps: [S], what the network is told at each step. labels: int64 [N] of the images of
        the calls to come, -1 for unlabelled; None for an unconditional network.
        """
        if timesteps.dim() != 1:
            raise ValueError(
                f"CPUEngine.set_schedule: timesteps must be [S], got {list(timesteps.shape)}"
            )
        require_labels("CPUEngine.set_schedule", self.model.config.num_classes, labels)
        timesteps = timesteps.detach().to("cpu", torch.float64)
        labels = None if labels is None else labels.detach().to("cpu", torch.int64)
        self._follow_weights()
        key = (
            timesteps.numpy().tobytes(),
            b"" if labels is None else labels.numpy().tobytes(),
        )
        if key not in self._schedules:
            while len(self._schedules) >= _KEPT_SCHEDULES:
                del self._schedules[next(iter(self._schedules))]
            self._schedules[key] = Schedule(self._project, timesteps, labels)
        self._schedule = self._schedules[key]

    def __call__(self, x: Tensor, step_index: int, out: Tensor | None = None) -> Tensor:
        """The network's output at a step of the schedule.

        x: float32 [n, C, H, W] on the CPU, n at most `batch_size`; with super-resolution, C holds
        the upsampled low-resolution image as well. out: float32 [n, C_out, H, W], contiguous.
        Returns `out`, or a new tensor.
        """
        self._follow_weights()
        schedule = self._schedule
        if schedule is None:
            raise RuntimeError("CPUEngine: set_schedule must be called before a call by step index")
        if not 0 <= step_index < len(schedule.timesteps):
            raise ValueError(
                f"CPUEngine: step_index must lie in [0, {len(schedule.timesteps) - 1}], "
                f"got {step_index}"
            )
        self._require_x(x)
        n = x.shape[0]
        if schedule.labels is not None and len(schedule.labels) < n:
            raise ValueError(
                f"CPUEngine: x must have at most the {len(schedule.labels)} samples that the "
                f"schedule has labels for, got {n}"
            )
        return self._run(x, out, *self._rows_of(schedule, step_index, n))

    def prepare(self, x: Tensor, out: Tensor) -> Callable[[int], None]:
        """A function that evaluates x into out, as they then are, at a step of the schedule.

        It makes no checks: for chains, which own both tensors. x, out: as of a call, contiguous.
        """
        self._follow_weights()
        self._require_x(x)
        schedule, n = self._schedule, len(x)
        assert schedule is not None and x.is_contiguous() and out.is_contiguous()

        def evaluate(step_index: int) -> None:
            self._run_rows(0, self.num_rows, x, out, *self._rows_of(schedule, step_index, n))

        return evaluate

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """The network's output at any timesteps [n], with labels y [n] as in `UNet.forward`."""
        self._follow_weights()
        self._require_x(x)
        n = x.shape[0]
        if timesteps.shape != (n,):
            raise ValueError(
                f"CPUEngine.forward: timesteps must be [{n}], got {list(timesteps.shape)}"
            )
        require_labels("CPUEngine.forward", self.model.config.num_classes, y, n)
        table = self._project(timesteps, y)
        return self._run(x, None, table, torch.arange(n) * self._project.floats)

    def _run(self, x: Tensor, out: Tensor | None, table: Tensor, offsets: Tensor) -> Tensor:
        x = x.detach().contiguous()
        n = x.shape[0]
        shape = (n, self.out_channels, *self.size)
        if out is None:
            out = torch.empty(shape)
        elif out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous():
            raise ValueError(
                f"CPUEngine: out must be contiguous float32 {list(shape)}, "
                f"got {out.dtype} {list(out.shape)} with strides {out.stride()}"
            )
        if n:
            self._run_rows(0, self.num_rows, x, out, table, offsets)
        return out

    def prepare_rows(self, x: Tensor) -> Callable[[int], None]:
        """A function that runs one operation of the plan, at the first step, for the tuner.

        It costs microseconds beside the operation. x: as in a call by step index, contiguous.
        """
        assert self._schedule is not None
        out = torch.empty(len(x), self.out_channels, *self.size)
        table, offsets = self._rows_of(self._schedule, 0, len(x))
        return lambda row: self._run_rows(row, 1, x, out, table, offsets)

    def _rows_of(self, schedule: Schedule, step_index: int, n: int) -> tuple[Tensor, Tensor]:
        """The table, and the offset in floats of each of n samples' rows in it."""
        table, rows = schedule.rows(step_index, n)
        return table, rows * self._project.floats

    def _run_rows(
        self, first: int, count: int, x: Tensor, out: Tensor, table: Tensor, offsets: Tensor
    ) -> None:
        code = _native.native().unet_engine(
            *(self._rows[first].data_ptr(), count, len(x), self.num_threads),
            *(x.data_ptr(), out.data_ptr(), table.data_ptr(), offsets.data_ptr()),
            *(self._shared.data_ptr(), self._shared.numel()),
            *(self._scratch.data_ptr(), self._scratch.shape[1]),
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

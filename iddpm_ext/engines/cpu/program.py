"""A `UNet` compiled for the CPU engine: packed weights and a plan of operations.

A program is built once for a batch size, an image size and a number of threads. It never changes
afterwards, so engines in several threads share it; each has activation memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from iddpm_ext import _native
from iddpm_ext.engines.base import NotSupported, undisturbed
from iddpm_ext.engines.cpu.algorithms import Algorithm, ConvShape, load_chooser
from iddpm_ext.engines.cpu.plan import Plan, Planner
from iddpm_ext.engines.embedding import Projections, Schedule
from iddpm_ext.engines.locks import Lock
from iddpm_ext.networks.unet import UNet

if TYPE_CHECKING:
    from iddpm_ext.engines.cpu.engine import CPUEngine

_KEPT_SCHEDULES = 4
_KEPT_MEMORIES = 4
_CACHE_LINE = 64


def why_not_supported(model: object, dtype: torch.dtype = torch.float32) -> str | None:
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


@dataclass(frozen=True)
class Memory:
    """Activation memory of one evaluation at a time. rows: the plan, with addresses in `arena`."""

    rows: Tensor
    arena: Tensor
    shared: Tensor
    scratch: Tensor


class CPUProgram:
    """The arguments are those of `CPUEngine`, which raises as this does."""

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
        reason = why_not_supported(model, dtype)
        if reason is not None:
            raise NotSupported(f"CPUEngine: {reason}")
        if batch_size < 1:
            raise ValueError(f"CPUEngine: batch_size must be at least 1, got {batch_size}")
        multiple = model.config.size_multiple
        self.size = size or model.config.size
        if any(s < 1 or s % multiple for s in self.size):
            raise ValueError(f"CPUEngine: size must be multiples of {multiple}, got {self.size}")
        self.batch_size, self.dtype = batch_size, dtype
        self.num_threads = num_threads or torch.get_num_threads()
        c = model.config
        self.classes = c.num_classes
        self.in_channels = c.in_channels * (2 if c.super_resolution else 1)
        self.out_channels = c.out_channels
        packed: dict[tuple[nn.Module, str], Tensor] = {}

        def packer(module: nn.Module, form: str, make: Callable[[], Tensor]) -> Tensor:
            if (module, form) not in packed:
                packed[module, form] = make()
            return packed[module, form]

        chooser = load_chooser(tiles=_native.native().has_tiles())
        bf16 = dtype == torch.bfloat16
        maps: dict[object, Tensor] = {}

        def choose(shape: ConvShape) -> Algorithm:
            return algorithm or chooser(shape, exact=exact, bf16=bf16)

        def plan(base: int) -> Plan:
            return Planner(
                model,
                batch_size,
                self.size,
                self.num_threads,
                choose=choose,
                bf16=bf16 and chooser.fast_products,
                tiles=bf16 and chooser.tiles,
                packer=packer,
                maps=maps,
                base=base,
            ).plan()

        with torch.inference_mode(False), undisturbed("cpu"):
            self.project = Projections(model)
            self._plan = plan(0)
            rows = torch.tensor(self._plan.rows, dtype=torch.int64, device="cpu")
            moved = torch.tensor(plan(1).rows, dtype=torch.int64, device="cpu")
        self._held = [*packed.values(), *maps.values()]  # kept alive: the rows hold addresses only
        self._rows, self._of_arena = rows, moved - rows
        self.convolutions, self.num_rows = self._plan.convolutions, len(self._plan.rows)
        assert self.project.floats == self._plan.embedding_floats
        self._lock = Lock()
        self._idle: list[Memory] = []
        self._schedules: dict[tuple[bytes, bytes], Schedule] = {}

    def engine(self) -> CPUEngine:
        """An engine for one call, with memory of its own."""
        from iddpm_ext.engines.cpu.engine import CPUEngine

        return CPUEngine.of(self)

    def renew(self, model: UNet) -> bool:
        """Always False: packed weights cannot be replaced, so changed weights need a new program."""
        return False

    def take(self) -> Memory:
        """Free memory for an engine; allocated if none is left."""
        try:
            return self._idle.pop()
        except IndexError:
            pass
        needs, floats = self._plan, _floats
        arena = floats(needs.arena_floats + _CACHE_LINE // 4)
        base = -(-arena.data_ptr() // _CACHE_LINE) * _CACHE_LINE
        scratch = floats(self.num_threads, needs.scratch_floats)
        with torch.inference_mode(False):
            rows = self._rows + self._of_arena * base
        return Memory(rows, arena, floats(needs.shared_floats), scratch)

    def give_back(self, memory: Memory) -> None:
        """Returns what `take` gave; a few are kept for the next calls."""
        if len(self._idle) < _KEPT_MEMORIES:
            self._idle.append(memory)

    def schedule(self, timesteps: Tensor, labels: Tensor | None) -> Schedule:
        """The embeddings of timesteps float64 [S] and labels int64 [N], both on the CPU."""
        key = (
            timesteps.numpy().tobytes(),
            b"" if labels is None else labels.numpy().tobytes(),
        )
        with self._lock:
            found = self._schedules.get(key)
        if found is None:
            with torch.inference_mode(False), undisturbed("cpu"):
                labels = None if labels is None else labels.clone()
                found = Schedule(self.project, timesteps.clone(), labels)
            with self._lock:
                self._schedules[key] = found
                while len(self._schedules) > _KEPT_SCHEDULES:
                    del self._schedules[next(iter(self._schedules))]
        return found


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")

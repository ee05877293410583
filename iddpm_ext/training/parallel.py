"""Everything that differs between training in one process and in several.

Processes are started by `torchrun`; they use PyTorch's DistributedDataParallel or FSDP2.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iddpm_ext import process_group
from iddpm_ext.files import locked
from iddpm_ext.networks.classifier import Classifier
from iddpm_ext.networks.unet import UNet

# After this time a rank gives up waiting for others, which may have died.
_TIMEOUT = timedelta(seconds=float(os.environ.get("IDDPM_DIST_TIMEOUT", "600")))


class Parallel:
    """The processes of a run, and the rank of this one. A context that holds the process group.

    device: "auto", "cpu", "cuda" or "cuda:N"; under torchrun "cuda" means the local rank's.
    sharded: FSDP2 instead of DistributedDataParallel.
    """

    def __init__(self, device: str, *, sharded: bool = False):
        launched = "WORLD_SIZE" in os.environ and "RANK" in os.environ
        self.sharded = sharded
        self.device = _resolve_device(device)
        self._owns_group = launched and not dist.is_initialized()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self._owns_group:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            process_group.begin(backend, _TIMEOUT)
        active = dist.is_initialized()
        self.rank = dist.get_rank() if active else 0
        self.size = dist.get_world_size() if active else 1
        if sharded and not active:
            raise ValueError("train: fsdp must be off without torchrun, got on in a single process")

    def __enter__(self) -> Parallel:
        return self

    def __exit__(self, *_: object) -> None:
        if self._owns_group:
            process_group.end()

    def wrap(self, model: UNet | Classifier) -> nn.Module:
        """The module to call in training: `model`, wrapped to average gradients over several processes."""
        if self.size == 1 and not self.sharded:
            return model
        if self.sharded:
            return model  # its parameters have been sharded in place
        # Harmless: the strides differ only in dimensions of one element, as of 1x1 kernels.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def shard(self, model: UNet | Classifier) -> None:
        """Splits the parameters of `model` over the processes, in place, if this run is sharded."""
        if not self.sharded:
            return
        from torch.distributed.fsdp import fully_shard

        decoder = model.output_blocks if isinstance(model, UNet) else ()
        for block in (*model.input_blocks, model.middle_block, *decoder):
            fully_shard(block)
        fully_shard(model)

    @contextmanager
    def accumulating(self, module: nn.Module, last: bool) -> Iterator[None]:
        """A context in which backward exchanges gradients only for the `last` part of a step."""
        if isinstance(module, nn.parallel.DistributedDataParallel) and not last:
            with module.no_sync():
                yield
        else:
            if self.sharded:
                module.set_requires_gradient_sync(last)  # type: ignore[operator]
            with nullcontext():
                yield

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes."""
        return self.sum(values) / self.size

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def average(self, values: list[Tensor]) -> None:
        """Replaces the values by their means over the processes, in one exchange."""
        if self.size > 1:
            flat = self.mean(torch.cat([value.flatten() for value in values]))
            for value, mean in zip(values, flat.split([v.numel() for v in values]), strict=True):
                value.copy_(mean.view(value.shape))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any process; the host waits."""
        return bool(
            self.sum(torch.tensor(float(flag), dtype=torch.float32, device=self.device)) > 0
        )

    @contextmanager
    def holding(self, folder: Path) -> Iterator[None]:
        """A context that locks `folder` for this run; if another run holds it, every process raises."""
        with ExitStack() as stack:
            refusal: Exception | None = None
            if self.rank == 0:
                try:
                    stack.enter_context(locked(folder, "train"))
                except (RuntimeError, OSError) as error:
                    refusal = error
            if self.any(refusal is not None):
                raise refusal or RuntimeError(
                    f"train: out must be in use by no other run and writable, got {folder}"
                )
            yield

    def barrier(self) -> None:
        """Waits for every process."""
        if self.size > 1:
            dist.barrier()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every process; other tensors as they are."""
    full: Any = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor, without a copy; other tensors as they are."""
    part: Any = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def copy_whole(target: Tensor, source: Tensor) -> None:
    """Copies the whole tensor `source` into `target`, which may be sharded."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)


def _resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train: device must be auto, cpu or cuda, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"train: device must be auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"train: device must exist, got {name!r} where torch finds no CUDA device"
        )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device

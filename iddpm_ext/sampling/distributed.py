"""Sampling in several processes, started by torchrun: process r takes images r, r + size, ...

Noise depends on an image's index alone, so the images are those of one process with the same batches.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from iddpm_ext import process_group
from iddpm_ext.sampling.loop import batches, run
from iddpm_ext.sampling.request import Request


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The rank of this process; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


class Processes:
    """The processes that share some work, as a context that holds a process group if there are several.

    Args:
        rank, size: which process this is, of how many.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._began = False

    @classmethod
    def of_torchrun(cls) -> Processes:
        """The processes that torchrun started; without it, this one alone."""
        return cls(rank(), world_size())

    def __enter__(self) -> Processes:
        if self.size > 1 and not dist.is_initialized():
            process_group.begin("gloo")
            self._began = True
        return self

    def __exit__(self, *error: object) -> None:
        if self._began:
            process_group.end()
            self._began = False

    def gather(self, own: Any) -> list[Any]:
        """The objects `own` of all processes, in the order of their ranks; in every process."""
        if self.size == 1:
            return [own]
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, own)
        return parts

    def wait(self) -> None:
        """Waits until all processes have called this."""
        if self.size > 1:
            dist.barrier()


def run_shared(request: Request) -> Tensor | None:
    """Runs this process's share of the request, and gathers all images in the process of rank 0.

    Every process must make the same request.

    Returns:
        float32 [n, C, H, W] on the CPU in the process of rank 0, None in the others.
    """
    every, size = batches(request.n, request.batch_size), world_size()
    own = run(request, every[rank() :: size]).cpu()
    parts: list[Tensor | None] | None = [None] * size if rank() == 0 else None
    with Processes.of_torchrun():
        dist.gather_object(own, parts)
    if parts is None:
        return None
    shape = (request.n, *request.spec.image_shape)
    whole = torch.empty(shape, dtype=torch.float32, device="cpu")
    for i, part in enumerate(parts):
        assert part is not None
        mine = every[i::size]
        for batch, images in zip(mine, part.split([len(batch) for batch in mine]), strict=True):
            whole[batch.start : batch.stop] = images
    return whole

"""Sampling in several processes, started by torchrun: the batches are dealt out in turn.

Noise is named by an image's number, so the images are those of one process with the same batches.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

from iddpm_ext.sampling.loop import batches, run
from iddpm_ext.sampling.request import Request


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this is."""
    return int(os.environ.get("RANK", 0))


def run_shared(request: Request) -> Tensor | None:
    """This process's share of the request, brought together in the first one.

    Every process must make the same request.

    Returns:
        float32 [n, C, H, W] on the CPU in the process of rank 0, None in the others.
    """
    every, size = batches(request), world_size()
    own = run(request, every[rank() :: size]).cpu()
    began = not dist.is_initialized()
    if began:
        dist.init_process_group("gloo")
    try:
        parts: list[Tensor | None] | None = [None] * size if rank() == 0 else None
        dist.gather_object(own, parts)
    finally:
        if began:
            dist.destroy_process_group()
    if parts is None:
        return None
    whole = torch.empty(request.n, *request.image_shape)
    for i, part in enumerate(parts):
        assert part is not None
        mine = every[i::size]
        for batch, images in zip(mine, part.split([len(batch) for batch in mine]), strict=True):
            whole[batch.start : batch.stop] = images
    return whole

"""Batches of a run, decoded by worker processes ahead of time where that pays."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from iddpm_ext.random import STREAM_CHOICE, NoiseKey, uniform

from .order import Order
from .source import ImageData

_CROP_DRAW = 3


class Batch(NamedTuple):
    """A batch of a run.

    positions: int64 [N] in the run. images: float32 [N, C, H, W] in [-1, 1]. labels: int64 [N] or None.
    complaints: a message for every image that could not be read and was replaced.
    """

    positions: Tensor
    images: Tensor
    labels: Tensor | None
    complaints: list[str]


def batches(
    data: ImageData,
    order: Order,
    positions: Iterable[list[int]],
    workers: int = 0,
    *,
    random_crop: bool = False,
) -> Iterator[Batch]:
    """The batches at these lists of positions, in this order for any number of workers.

    workers: processes that read and decode; 0 does it in this process. They ignore SIGTERM and SIGINT,
        which are meant for the run even if sent to the whole process group: it may need more batches
        before it stops.
    random_crop: crop each image at random, determined by the order's seed and the position.
    """
    loader = DataLoader(
        _Positions(data, order, random_crop),
        batch_sampler=positions,
        num_workers=workers,
        collate_fn=_only,
        worker_init_fn=ignore_signals,
        # A separate generator, since the loader would otherwise advance the global one.
        generator=torch.Generator(device="cpu"),
    )
    # The loader draws a seed on the default device, but its generator is on the CPU.
    with torch.device("cpu"):
        return iter(loader)


class _Positions(Dataset):
    def __init__(self, data: ImageData, order: Order, random_crop: bool):
        self._data, self._order, self._random_crop = data, order, random_crop

    def __getitems__(self, positions: list[int]) -> list[Batch]:
        at = torch.tensor(positions, dtype=torch.int64, device="cpu")
        crops = None
        if self._random_crop:
            key = NoiseKey(self._order.seed, STREAM_CHOICE, at, 0, _CROP_DRAW)
            crops = uniform(key, (len(at), 3))
        images, used, complaints = self._data.images(self._order.at(at), crops)
        return [Batch(at, images, self._data.labels(used), complaints)]

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])[0]


def ignore_signals(worker: int) -> None:
    """Initialises a worker process."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _only(batch: list[Batch]) -> Batch:
    return batch[0]

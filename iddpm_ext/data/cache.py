"""Decodes images once and keeps them in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .formats import require_memory
from .loader import ignore_signals
from .source import ImageData

_CHUNK = 256
_HALF = 127.5


class CachedData:
    """All images of `data`, decoded in advance; `images` returns the same bits as that of `data`.

    workers: processes that decode; 0 decodes in this one. 8-bit images take a byte per channel, others four.

    Raises ValueError if they do not fit into memory, and whatever `data` raises.
    """

    def __init__(self, data: ImageData, workers: int = 0):
        self._data = data
        self.class_names, self.notes = data.class_names, data.notes
        shape = torch.Size((len(data), *data.image_shape))
        require_memory("the cache of images", shape.numel())
        self._images = torch.empty(shape, dtype=torch.uint8, device="cpu")
        self._used = torch.empty(len(data), dtype=torch.int64, device="cpu")
        self._complaints: dict[int, list[str]] = {}
        first = 0
        for chunk in _decoded(data, workers):
            place = slice(first, first + len(chunk.used))
            if chunk.images.is_floating_point() and not self._images.is_floating_point():
                require_memory("the cache of images", 4 * shape.numel())
                self._images = _as_floats(self._images)
            whole = self._images.is_floating_point()
            self._images[place] = _as_floats(chunk.images) if whole else chunk.images
            self._used[place] = chunk.used
            self._complaints |= {first + i: lines for i, lines in chunk.complaints.items()}
            first = place.stop

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self._data.image_shape

    def __len__(self) -> int:
        return len(self._data)

    def images(
        self, indices: Tensor, crops: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[str]]:
        """As in `ImageData`, without crops: cached images already have their size."""
        assert crops is None
        complaints = [
            line
            for i in indices.tolist()
            if self._complaints
            for line in self._complaints.get(i, [])
        ]
        return _as_floats(self._images[indices]), self._used[indices], complaints

    def labels(self, indices: Tensor) -> Tensor | None:
        """As in `ImageData`."""
        return self._data.labels(indices)


class _Chunk(NamedTuple):
    """Consecutive images, uint8 if that is exact; messages on unreadable ones, by index in the chunk."""

    images: Tensor
    used: Tensor
    complaints: dict[int, list[str]]


class _Chunks(Dataset):
    def __init__(self, data: ImageData):
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitems__(self, indices: list[int]) -> list[_Chunk]:
        at = torch.tensor(indices, dtype=torch.int64, device="cpu")
        images, used, found = self._data.images(at)
        complaints = {}
        if found:  # rare: read one by one, to attribute the messages
            each = {i: self._data.images(at[i : i + 1])[2] for i in range(len(at))}
            complaints = {i: lines for i, lines in each.items() if lines}
        levels = ((images + 1) * _HALF).round_().to(torch.uint8)
        exact = torch.equal(_as_floats(levels), images)
        return [_Chunk(levels if exact else images, used, complaints)]

    def __getitem__(self, index: int) -> _Chunk:
        return self.__getitems__([index])[0]


def _decoded(data: ImageData, workers: int) -> Iterator[_Chunk]:
    """All images in their order."""
    numbers = range(len(data))
    loader = DataLoader(
        _Chunks(data),
        batch_sampler=[list(numbers[i : i + _CHUNK]) for i in range(0, len(data), _CHUNK)],
        num_workers=workers,
        collate_fn=_first,
        worker_init_fn=ignore_signals,
        # A separate generator, since the loader would otherwise advance the global one.
        generator=torch.Generator(device="cpu"),
    )
    return iter(loader)


def _first(chunks: list[_Chunk]) -> _Chunk:
    return chunks[0]


def _as_floats(images: Tensor) -> Tensor:
    """[-1, 1], in float32 by the operations of the decoders."""
    return images if images.is_floating_point() else images.to(torch.float32) / _HALF - 1

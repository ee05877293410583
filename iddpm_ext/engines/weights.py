"""Identifies the content of a model's weights at one moment, however they were changed."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter

import torch
from torch import Tensor

from iddpm_ext import _native
from iddpm_ext.ops.arguments import check_launch, stream

# As in csrc/checksum/checksum.h.
_RANGE_KEY = 0xD6E8FEB86659FD93
_WORD_KEY = 0x9E3779B97F4A7C15


# Of every tensor in turn, without a step of the interpreter between them: half the time.
_LAYOUT = (attrgetter("dtype"), Tensor.size, Tensor.stride)


@dataclass(frozen=True)
class Content:
    """Compares equal for the same bits in the same layout: dtypes, shapes, strides and a 64-bit checksum."""

    checksum: int
    layout: tuple[tuple[object, ...], ...] = field(hash=False)


def content_of(tensors: Sequence[Tensor]) -> Content:
    """The content of tensors that are all on the CPU or on one CUDA device, in one pass over memory.

    On a CUDA device the host waits for the result once.
    """
    layout = tuple(tuple(map(of, tensors)) for of in _LAYOUT)
    dense = all(map(Tensor.is_contiguous, tensors))
    given = tensors if dense else [t if _is_dense(t) else t.contiguous() for t in tensors]
    return Content(checksum(given), layout)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def checksum(tensors: Sequence[Tensor]) -> int:
    """A 64-bit checksum of the memory of dense tensors on one device."""
    if not tensors:
        return 0
    device = tensors[0].device
    ranges = zip(map(Tensor.data_ptr, tensors), map(attrgetter("nbytes"), tensors), strict=True)
    rows = array("q", chain.from_iterable(ranges))
    table, count = rows.buffer_info()[0], len(tensors)
    if device.type == "cpu" and _native.cpu_absence() is None:
        return _native.native().checksum_cpu(count, table, 0, torch.get_num_threads())
    if device.type == "cuda" and _native.cuda_absence() is None:
        with torch.cuda.device(device):
            total = torch.zeros(1, dtype=torch.int64, device=device)
            code = _native.native().checksum_cuda(count, table, total.data_ptr(), stream(total))
        check_launch("checksum", code)
        return int(total) % (1 << 64)
    return checksum_reference(tensors)


def checksum_reference(tensors: Sequence[Tensor]) -> int:
    """`checksum` as csrc/checksum/checksum.h defines it, in PyTorch's own functions."""
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for i, tensor in enumerate(tensors):
        octets = torch.as_strided(tensor.detach(), (tensor.numel(),), (1,)).view(torch.uint8)
        padded = torch.zeros(-(-len(octets) // 8) * 8, dtype=torch.uint8, device=tensor.device)
        padded[: len(octets)] = octets
        word = padded.view(torch.int64)
        place = torch.arange(len(word), dtype=torch.int64, device=tensor.device)
        # int64 wraps modulo 2^64, as the kernels' unsigned numbers do.
        mixed = word ^ (_signed((i + 1) * _RANGE_KEY) + place * _signed(_WORD_KEY))
        total += ((mixed & 0xFFFFFFFF) * (mixed >> 32 & 0xFFFFFFFF) + word).sum()
    return int(total) % (1 << 64)


def _signed(number: int) -> int:
    """The int64 with the same 64 bits."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)

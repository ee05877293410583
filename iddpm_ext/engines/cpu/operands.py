"""Maps of the bfloat16 images that AMX tile products read (`csrc/nhwc/operand.h`).

A map says where pixels lie and which distances the taps of a product have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_TAPS = 27
_NARROW = 8  # images up to this width are kept in three copies
_SLACK = 32  # positions that the last tile reads beyond the last row

Tap = tuple[int, int, int]  # rows down, columns right, and which phase


@dataclass(frozen=True)
class Layout:
    """How the images of a batch lie: size, channels, and whether zeros surround them."""

    size: tuple[int, int]
    channels: int
    batch: int
    halo: bool = True
    phases: int = 1

    @property
    def copied(self) -> bool:
        """Whether neighbours to the left and right lie in copies of their own."""
        return self.halo and self.phases == 1 and self.size[1] <= _NARROW

    @property
    def row(self) -> int:
        """Positions between two rows."""
        return self.size[1] + (self.halo and not self.copied)

    @property
    def sample(self) -> int:
        """Positions between two samples."""
        return (self.size[0] + self.halo) * self.row

    @property
    def pitch(self) -> int:
        """Halves between two positions: not a power of two, or tiles would share cache sets."""
        padded = -(-self.channels // 32) * 32
        return padded + 32 if padded >= 128 and padded % 64 == 0 else padded

    @property
    def lead(self) -> int:
        """Positions of zeros before the first."""
        return self.row + (not self.copied) if self.halo else 0

    @property
    def image(self) -> int:
        """Halves of one phase or copy."""
        return (self.lead + self.batch * self.sample + _SLACK) * self.pitch

    @property
    def floats(self) -> int:
        """Memory of all of it."""
        return self.image * (3 if self.copied else self.phases) // 2

    @property
    def first(self) -> int:
        """Halves before position 0 of the copy that is not displaced, or of the first phase."""
        return self.lead * self.pitch + (self.image if self.copied else 0)

    def distance(self, tap: Tap) -> int:
        """Halves from a position to its tap."""
        down, right, phase = tap
        across = right * (self.image if self.copied else self.pitch)
        return down * self.row * self.pitch + across + phase * self.image

    def map(
        self, taps: Sequence[Tap] = ((0, 0, 0),), out: tuple[int, int, int] | None = None
    ) -> Tensor:
        """The int64 words of an OperandMap.

        out: pixels of a product's output between neighbours, rows and samples; None: the image's.
        """
        height, width = self.size
        out = out or (1, width, height * width)
        distances = [self.distance(tap) for tap in taps]
        words = [height, width, self.row, self.sample, self.pitch, self.copied * self.image]
        words += [*out, len(taps), *distances, *[0] * (_MOST_TAPS - len(taps))]
        return torch.tensor(words, dtype=torch.int64, device="cpu")


CONVOLUTION: tuple[Tap, ...] = tuple((y, x, 0) for y in (-1, 0, 1) for x in (-1, 0, 1))
# Of stride 2: row -1 is the odd row before, row 1 the odd row of the same index.
_HALVED = {-1: (-1, 1), 0: (0, 0), 1: (0, 1)}
STRIDED: tuple[Tap, ...] = tuple(
    (_HALVED[y][0], _HALVED[x][0], 2 * _HALVED[y][1] + _HALVED[x][1])
    for y in (-1, 0, 1)
    for x in (-1, 0, 1)
)


def doubled_taps(phase: int) -> tuple[Tap, ...]:
    """Taps of a convolution of a doubled image, for its even and odd rows and columns in turn."""
    down, right = phase // 2, phase % 2
    return tuple((y + down - 1, x + right - 1, 0) for y in (0, 1) for x in (0, 1))


def doubled_filter(weight: Tensor, phase: int) -> Tensor:
    """weight [K, C, 3, 3] -> [K, C, 4], for `doubled_taps`: taps on one pixel are added up."""

    def fold(w: Tensor, odd: int, dim: int) -> Tensor:
        first, middle, last = w.double().unbind(dim)
        pair = (first + middle, last) if odd else (first, middle + last)
        return torch.stack(pair, dim)

    return fold(fold(weight.detach(), phase // 2, 2), phase % 2, 3).flatten(2)

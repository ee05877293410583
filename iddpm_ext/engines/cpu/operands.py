"""Memory layouts of the bfloat16 images that AMX tile products read (`csrc/nhwc/operand.h`).

A position is a place of `pitch` bfloat16 elements: the channels of one pixel, or zeros around the image.
A tap is an input pixel of a convolution relative to its output pixel. A phase is one of the four images
of even or odd rows and columns, which a convolution of stride 2 reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_TAPS = 27
_NARROW = 8  # images up to this width are kept in three copies
_SLACK = 32  # positions that the last tile reads beyond the last row

Tap = tuple[int, int, int]  # rows down, columns right, number of the phase


@dataclass(frozen=True)
class Layout:
    """How the images of a batch lie in memory. halo: zeros surround each image, as padding."""

    size: tuple[int, int]
    channels: int
    batch: int
    halo: bool = True
    phases: int = 1

    @property
    def copied(self) -> bool:
        """Whether the left and right neighbours of the pixels lie in two displaced copies of the image."""
        return self.halo and self.phases == 1 and self.size[1] <= _NARROW

    @property
    def row(self) -> int:
        """Positions from one row to the next."""
        return self.size[1] + (self.halo and not self.copied)

    @property
    def sample(self) -> int:
        """Positions from one sample to the next."""
        return (self.size[0] + self.halo) * self.row

    @property
    def pitch(self) -> int:
        """Elements from one position to the next: no power of two, or tiles would share cache sets."""
        padded = -(-self.channels // 32) * 32
        return padded + 32 if padded >= 128 and padded % 64 == 0 else padded

    @property
    def lead(self) -> int:
        """Positions of zeros before the first pixel."""
        return self.row + (not self.copied) if self.halo else 0

    @property
    def image(self) -> int:
        """Elements of one phase or copy."""
        return (self.lead + self.batch * self.sample + _SLACK) * self.pitch

    @property
    def floats(self) -> int:
        """Size of all phases or copies, in floats."""
        return self.image * (3 if self.copied else self.phases) // 2

    @property
    def first(self) -> int:
        """Index of the first pixel's first element, in the copy that is not displaced or the first phase."""
        return self.lead * self.pitch + (self.image if self.copied else 0)

    def distance(self, tap: Tap) -> int:
        """Elements from a pixel to its tap."""
        down, right, phase = tap
        across = right * (self.image if self.copied else self.pitch)
        return down * self.row * self.pitch + across + phase * self.image

    def map(
        self, taps: Sequence[Tap] = ((0, 0, 0),), out: tuple[int, int, int] | None = None
    ) -> Tensor:
        """The int64 words of an OperandMap.

        out: the product's output has pixels, rows and samples this many pixels apart; None: as the image.
        """
        height, width = self.size
        out = out or (1, width, height * width)
        distances = [self.distance(tap) for tap in taps]
        words = [height, width, self.row, self.sample, self.pitch, self.copied * self.image]
        words += [*out, len(taps), *distances, *[0] * (_MOST_TAPS - len(taps))]
        return torch.tensor(words, dtype=torch.int64, device="cpu")


CONVOLUTION: tuple[Tap, ...] = tuple((y, x, 0) for y in (-1, 0, 1) for x in (-1, 0, 1))
# For stride 2, a tap's row offset -> (row offset within a phase, whether it is the phase of odd rows):
# input row 2i - 1 is odd row i - 1, row 2i is even row i, row 2i + 1 is odd row i.
_HALVED = {-1: (-1, 1), 0: (0, 0), 1: (0, 1)}
STRIDED: tuple[Tap, ...] = tuple(
    (_HALVED[y][0], _HALVED[x][0], 2 * _HALVED[y][1] + _HALVED[x][1])
    for y in (-1, 0, 1)
    for x in (-1, 0, 1)
)


def doubled_taps(phase: int) -> tuple[Tap, ...]:
    """The four taps on an image that replace the nine of a 3x3 convolution after nearest-neighbour doubling.

    phase: 0 to 3, output pixels at (even row, even column), (even, odd), (odd, even), (odd, odd).
    """
    down, right = phase // 2, phase % 2
    return tuple((y + down - 1, x + right - 1, 0) for y in (0, 1) for x in (0, 1))


def doubled_filter(weight: Tensor, phase: int) -> Tensor:
    """weight [K, C, 3, 3] -> [K, C, 4], for `doubled_taps`: the sums of weights that meet the same pixel."""

    def fold(w: Tensor, odd: int, dim: int) -> Tensor:
        first, middle, last = w.double().unbind(dim)
        pair = (first + middle, last) if odd else (first, middle + last)
        return torch.stack(pair, dim)

    return fold(fold(weight.detach(), phase // 2, 2), phase % 2, 3).flatten(2)

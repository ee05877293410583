"""Which Winograd tile a convolution takes: a function of its shape and of the CPU, never of a timing.

So the same shape on the same machine always takes the same path, and a run repeats itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class ConvShape:
    """A 3x3 convolution with stride 1: size of its output, channels in and out, samples."""

    height: int
    width: int
    channels: int
    columns: int
    batch: int
    upscale: bool = False


def choose_tile(shape: ConvShape, family: str, exact: bool) -> int:
    """4 for F(4x4, 3x3), 2 for F(2x2, 3x3); `exact` keeps to 2, whose error is direct convolution's."""
    if exact:
        return 2
    tiles = shape.batch * -(-shape.height // 4) * -(-shape.width // 4)
    return 4 if tiles > 4 else 2


def choose_block(shape: ConvShape, family: str, tile: int) -> int:
    """How many tiles are transformed at a time, so that they stay in the second cache level."""
    per_tile = (tile + 2) ** 2 * (shape.channels + 48)
    return max(12, 96 * 1024 // per_tile // 12 * 12)


@lru_cache(maxsize=1)
def cpu_family() -> str:
    """Vendor, family and model of this CPU as the tables name it, such as "AuthenticAMD-25-17"."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown"
    fields = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    }
    return "-".join(fields.get(k, "?") for k in ("vendor_id", "cpu family", "model"))

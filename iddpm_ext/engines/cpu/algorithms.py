"""Which algorithm computes a 3x3 convolution: looked up by its shape and the CPU, never timed at run time.

So the same shape on the same machine always takes the same path, and a run can be repeated exactly. The
tables, one per CPU family, were measured within whole networks (`tune.py`): those in `tables/` come with
the package, and `iddpm tune` stores the user's own, which has priority.
"""

from __future__ import annotations

import json
import math
import platform
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from iddpm_ext.files import cache_folder

Table = dict[str, dict[str, str]]  # {"float32": {shape's key: algorithm's name}, "bfloat16": ...}
_SHIPPED = Path(__file__).with_name("tables")
_LARGE_WEIGHTS = 1 << 20  # bytes of F(2x2)'s transformed weights in float32
_FEW_PIXELS = 256  # of all samples


@dataclass(frozen=True)
class Algorithm:
    """Winograd's F(tile x tile, 3x3) with float32 or bfloat16 operands, or direct convolution by AMX.

    AMX takes bfloat16 operands; `tile` is then 0.
    """

    tile: int
    bf16: bool = False

    @property
    def tiles(self) -> bool:
        """Whether it runs on AMX tiles."""
        return self.tile == 0

    @property
    def name(self) -> str:
        """Its name in the tables."""
        return "AMX" if self.tiles else f"F{self.tile}" + (" bf16" if self.bf16 else "")

    @property
    def in_float32(self) -> Algorithm:
        """The same algorithm with float32 operands (F(4x4) in the place of AMX)."""
        return Algorithm(self.tile or 4)


AMX = Algorithm(0, bf16=True)
# F(4x4) with bfloat16 operands is missing on purpose: its error is three times that of F(2x2).
ALGORITHMS = {a.name: a for a in (Algorithm(2), Algorithm(4), Algorithm(2, bf16=True), AMX)}
CANDIDATES = {"float32": ("F2", "F4"), "bfloat16": ("F2", "F4", "F2 bf16", "AMX")}


@dataclass(frozen=True)
class ConvShape:
    """A 3x3 convolution with stride 1: output size, input channels, output channels (columns), batch."""

    height: int
    width: int
    channels: int
    columns: int
    batch: int
    upscale: bool = False

    @property
    def reads_more_than_it_computes(self) -> bool:
        """Whether reading the weights, which no cache of a core holds, takes longer than their products."""
        weights = 4 * 16 * self.channels * self.columns
        return weights > _LARGE_WEIGHTS and self.batch * self.height * self.width <= _FEW_PIXELS

    @property
    def layer(self) -> str:
        """Its name in the tables, without the batch."""
        up = " up" if self.upscale else ""
        return f"{self.height}x{self.width} {self.channels}-{self.columns}{up}"

    @property
    def key(self) -> str:
        """Its name in the tables."""
        return f"{self.layer} x{self.batch}"


@dataclass(frozen=True)
class Chooser:
    """Chooses algorithms on one machine by its table {"float32": {layer: {batch: algorithm}}, ...}."""

    measured: dict[str, dict[str, dict[int, str]]]
    tiles: bool = False  # whether AMX can be used
    fast_products: bool = True  # whether vdpbf16ps does twice the work of a float32 multiply-add

    @property
    def rounding_pays(self) -> bool:
        """Whether bfloat16 operands are faster than float32 for all shapes.

        If not, they are for shapes whose time is that of reading the weights, half as many bytes.
        """
        return self.tiles or self.fast_products

    def __call__(self, shape: ConvShape, *, exact: bool, bf16: bool) -> Algorithm:
        """exact: only algorithms as accurate as direct convolution. bf16: bfloat16 operands are allowed."""
        if exact:
            return ALGORITHMS["F2"]
        bf16 = bf16 and (self.rounding_pays or shape.reads_more_than_it_computes)
        batches = self.measured.get("bfloat16" if bf16 else "float32", {}).get(shape.layer)
        if batches:
            nearest = min(batches, key=lambda b: (abs(math.log(b / shape.batch)), b))
            algorithm = ALGORITHMS[batches[nearest]]
            if self.tiles or not algorithm.tiles:
                return algorithm
        if bf16:
            return AMX if self.tiles else ALGORITHMS["F2 bf16"]
        tiles = shape.batch * -(-shape.height // 4) * -(-shape.width // 4)
        return ALGORITHMS["F4" if tiles > 4 else "F2"]


def load_chooser(family: str | None = None, *, tiles: bool = False) -> Chooser:
    """The chooser of this machine: the user's own table, and the package's for what that lacks.

    tiles: whether AMX can be used. Without it, Intel's cores compute no more bfloat16 products per cycle
    than float32 ones by AVX-512, while AMD's compute twice as many.

    Raises ValueError where a table cannot be read.
    """
    family = cpu_family() if family is None else family
    measured: dict[str, dict[str, dict[int, str]]] = {}
    for path in filter(None, (_SHIPPED / f"{family}.json", user_table_path(family))):
        for precision, entries in load_table(path).items():
            for key, algorithm in entries.items():
                layer, _, batch = key.rpartition(" x")
                measured.setdefault(precision, {}).setdefault(layer, {})[int(batch)] = algorithm
    return Chooser(measured, tiles, fast_products=not family.startswith("GenuineIntel"))


def user_table_path(family: str) -> Path | None:
    """Where `iddpm tune` stores what it measured; None for a user without a home."""
    cache = cache_folder()
    return None if cache is None else cache / f"cpu-{family}.json"


def load_table(path: Path) -> Table:
    """The table at `path`; ValueError if the file is no table.

    Empty where there is no file, and, with a warning, where it may not be read.
    """
    try:
        return check_table(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except PermissionError as error:
        warnings.warn(f"{path} is ignored: it cannot be read ({error.strerror})", stacklevel=2)
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} must be a table that `iddpm tune` wrote ({error}); tune again or delete it"
        ) from None


def check_table(table: Any) -> Table:
    """`table` itself; ValueError, saying what, unless it is a table of known algorithms."""
    if not isinstance(table, dict):
        raise ValueError("not an object")
    for precision, entries in table.items():
        if precision not in CANDIDATES or not isinstance(entries, dict):
            raise ValueError(f"unknown precision {precision!r}")
        for key, algorithm in entries.items():
            if algorithm not in CANDIDATES[precision]:
                raise ValueError(f"{key}: unknown algorithm {algorithm!r}")
            batch = key.rpartition(" x")[2]
            if not batch.isdecimal() or int(batch) < 1:
                raise ValueError(f"{key!r} names no shape and batch")
    return table


@lru_cache(maxsize=1)
def cpu_family() -> str:
    """Vendor, family and model of this CPU as the tables name it, such as "AuthenticAMD-25-17"."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine() or "unknown"
    fields = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    }
    return "-".join(fields.get(k, "unknown") for k in ("vendor_id", "cpu family", "model"))

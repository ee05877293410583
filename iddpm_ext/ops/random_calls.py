"""Random calls of the ops for property tests: any sizes, layouts and magnitudes.

`cases.property_inputs(draw, device, dtype)` of an op makes one call from a `Draw`. The tests implement
`Draw` by hypothesis, so that the package does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from iddpm_ext.ops import synthetic
from iddpm_ext.random import NoiseKey

Option = TypeVar("Option")

_INFINITY, _NAN = float("inf"), float("nan")


class Draw(Protocol):
    """Where choices come from."""

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        ...

    def choice(self, options: Sequence[Option]) -> Option:
        """One of the options; the first is the simplest."""
        ...


def _expanded(x: Tensor) -> Tensor:
    """The first sample, expanded over the batch: all samples share its memory."""
    return x[:1].expand(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    **synthetic.LAYOUTS,
    "expanded": _expanded,
}


def image_shape(draw: Draw) -> tuple[int, int, int, int]:
    """N in 0..5, C in 1..8, odd and even H and W."""
    n, c = draw.integer(0, 5), draw.integer(1, 8)
    return n, c, draw.integer(1, 9), draw.integer(1, 9)


def relayout(draw: Draw, x: Tensor, *, expand: bool = True) -> Tensor:
    """The same values in a random memory layout; if expanded, those of the first sample for all."""
    names = [name for name in LAYOUTS if expand or name != "expanded"]
    return LAYOUTS[draw.choice(names)](x)


def plant(draw: Draw, x: Tensor) -> Tensor:
    """x, in rare cases with an infinity or a NaN in one place."""
    value = draw.choice((None, None, None, None, None, None, _INFINITY, -_INFINITY, _NAN))
    if value is not None and x.numel():
        x.view(-1)[draw.integer(0, x.numel() - 1)] = value
    return x


def values(
    draw: Draw,
    shape: Sequence[int],
    device: str,
    dtype: torch.dtype,
    *,
    means: Sequence[float] = (0.0, 1.0, -1000.0),
    deviations: Sequence[float] = (1.0, 1e-3, 1000.0),
) -> Tensor:
    """Contiguous normal numbers of a random magnitude, in rare cases with one that is not finite."""
    seeded = synthetic.Tensors(draw.integer(0, 2**20), device, dtype)
    return plant(draw, seeded.normal(shape, draw.choice(means), draw.choice(deviations)))


def images(
    draw: Draw, shape: tuple[int, int, int, int], device: str, dtype: torch.dtype, **change: Any
) -> Tensor:
    """`values` [N, C, H, W] in any layout."""
    return relayout(draw, values(draw, shape, device, dtype, **change))


def timesteps(draw: Draw, n: int, device: str) -> Tensor:
    """Steps of `synthetic.table`'s chain; often its first or its last."""
    last = synthetic.NUM_TIMESTEPS - 1
    ends = (None, 0, last)
    drawn = [draw.choice(ends) for _ in range(n)]
    t = [draw.integer(0, last) if step is None else step for step in drawn]
    return torch.tensor(t, dtype=torch.int64, device=device)


def noise(
    draw: Draw, shape: tuple[int, int, int, int], device: str, dtype: torch.dtype
) -> Tensor | NoiseKey:
    """Noise as a tensor, or a `NoiseKey` by which the kernel draws it."""
    if draw.choice((True, False)):
        return images(draw, shape, device, dtype, means=(0.0,), deviations=(1.0,))
    samples = torch.arange(shape[0], device=device, dtype=torch.int64) + draw.integer(0, 2**30)
    return NoiseKey(draw.integer(0, 2**64 - 1), draw.integer(0, 4), samples, draw.integer(0, 4000))


def bound_call(
    draw: Draw, device: str, dtype: torch.dtype, *, learned: bool | None = None
) -> dict[str, Any]:
    """Arguments of `vlb_terms` as `synthetic.bound_call` makes them, of random quality, steps and layout."""
    shape = image_shape(draw)
    if learned is None:
        learned = draw.choice((True, False))
    spread = draw.choice((1.0, 0.01, 30.0))
    call = synthetic.bound_call(shape, device, dtype, learned=learned, spread=spread)
    call["t"] = timesteps(draw, shape[0], device)
    for name in ("model_output", "x_0", "x_t"):
        call[name] = relayout(draw, plant(draw, call[name]))
    return call

"""The typical error of a PyTorch computation, by Monte Carlo arithmetic.

A single run is one sample of its rounding errors: a sum of a few terms is sometimes exact, and a difference
that is 0 in theory comes out as 0 or as a rounding error. So the computation runs several times, each time
with every intermediate result changed at random by one unit in the last place, up, down or not at all
(Parker, *Monte Carlo Arithmetic*); the spread is the accuracy of the formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

# Operators that copy, select or create numbers, without rounding.
_EXACT = frozenset(
    "arange cat clamp clamp_max clamp_min clone copy_ empty empty_like empty_strided expand fill_ full "
    "full_like index index_put_ index_select lift_fresh masked_fill neg new_empty new_zeros ones ones_like "
    "rand scalar_tensor select_backward slice_backward stack where _to_copy zero_ zeros zeros_like".split()
)


class RoundingNoise(TorchDispatchMode):
    """Moves the results of arithmetic."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func._schema.name.split("::")[1]
        result = func(*args, **(kwargs or {}))
        if name in _EXACT:
            return result
        if name.endswith("_"):
            return result.copy_(self._moved(result)) if isinstance(result, Tensor) else result
        if any(returned.alias_info is not None for returned in func._schema.returns):
            return result  # a view
        if isinstance(result, (tuple, list)):
            return type(result)(self._moved(x) for x in result)
        return self._moved(result)

    def _moved(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype not in _BITS:
            return x
        bits = x.view(_BITS[x.dtype])
        step = torch.randint(-1, 2, x.shape, generator=self._generator, dtype=bits.dtype)
        return (bits + step * (x.isfinite() & (x != 0))).view(x.dtype)

"""Checks of feature arrays."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Features = Tensor | np.ndarray


def features(function: str, name: str, value: Features, least: int = 1) -> Tensor:
    """float64 [N, D] of a floating array of at least `least` finite rows, on its device."""
    x = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: {name} must be an array [N, D], got {type(value).__name__}")
    if x.dim() != 2 or not x.is_floating_point() or x.shape[1] == 0:
        raise ValueError(
            f"{function}: {name} must be floating [N, D], got {x.dtype} {list(x.shape)}"
        )
    if len(x) < least:
        raise ValueError(f"{function}: {name} must have at least {least} rows, got {len(x)}")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{function}: {name} must be finite, got NaN or infinity")
    return x.detach().double()


def pair(function: str, **named: Tensor) -> None:
    """ValueError unless both have the same number of columns."""
    (a_name, a), (b_name, b) = named.items()
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"{function}: {a_name} and {b_name} must have equally many features, "
            f"got {a.shape[-1]} and {b.shape[-1]}"
        )


def positive(function: str, name: str, value: int, least: int = 1) -> None:
    """ValueError unless an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{function}: {name} must be an int of at least {least}, got {value!r}")

"""What the engines of every device share: their exception, PyTorch's modes while they run, checks."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm_ext.ops.rows import no_autocast


class NotSupported(ValueError):
    """The engine cannot run this network here; the message says why."""


def old_names(module: str, **names: str) -> Callable[[str], Any]:
    """A module's `__getattr__` for renamed names (old=new): the old ones warn and give the new objects."""

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = names[name]
        warnings.warn(f"{module}.{name} is called {new} now", DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[module], new)

    return get


if not TYPE_CHECKING:  # a type checker would take every name for an existing one
    __getattr__ = old_names(__name__, NotServed="NotSupported")


@contextlib.contextmanager
def undisturbed(device_type: str) -> Iterator[None]:
    """A context without gradients and without autocast, whatever the caller has switched on."""
    with torch.no_grad(), no_autocast(device_type):
        yield


def with_low_res(x: Tensor, low_res: Tensor | None) -> Tensor:
    """x [N, C, H, W], with the upsampled low-resolution image as more channels where there is one."""
    return x if low_res is None else torch.cat([x, upsampled(low_res, x)], dim=1)


def upsampled(low_res: Tensor, x: Tensor) -> Tensor:
    """low_res [N, C, h, w] upsampled to the size of x and in its dtype, as the network takes it."""
    return F.interpolate(low_res.to(x.dtype), x.shape[2:], mode="bilinear")


def require_labels(
    where: str, classes: int | None, labels: Tensor | None, n: int | None = None
) -> None:
    """The labels [n], or [N] of any length where n is None; ValueError unless in [-1, classes - 1].

    An unconditional network (classes None) takes None alone.
    """
    if (labels is None) != (classes is None):
        rule = "None" if classes is None else f"given, as the network has {classes} classes"
        got = "None" if labels is None else list(labels.shape)
        raise ValueError(f"{where}: labels must be {rule}, got {got}")
    if labels is None or classes is None:
        return
    if labels.dim() != 1 or (n is not None and len(labels) != n):
        raise ValueError(
            f"{where}: labels must be [{'N' if n is None else n}], got {list(labels.shape)}"
        )
    if len(labels) and not (-1 <= int(labels.min()) and int(labels.max()) < classes):
        raise ValueError(
            f"{where}: labels must lie in [-1, {classes - 1}], "
            f"got {int(labels.min())} .. {int(labels.max())}"
        )

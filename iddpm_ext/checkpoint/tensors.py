"""Tensors of a file, and whether they are those of a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .torch_file import is_torch_file, read_torch_file

_SHOWN = 6


def read_file(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata, empty in a file of PyTorch's own format, and tensors. Raises ValueError."""
    if is_torch_file(path):
        return {}, read_torch_file(path)
    return read_safetensors(path)


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file. Raises ValueError where it is not a whole one."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            return metadata, {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"load: {path} must be a whole safetensors file, got: {error}") from error


def require_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The floating-point type, float32 for None."""
    if dtype is None:
        return torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"load: dtype must be a floating-point torch.dtype, got {dtype!r}")
    return dtype


def fill(
    path: Path,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    stated_by: str,
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Gives a network on the meta device copies of its tensors.

    stated_by: where the network's configuration is from. Raises ValueError with every difference in
    names, shapes and kinds.
    """
    found = differences(model.state_dict(), tensors)
    if found:
        raise ValueError(f"load: {path} contradicts {stated_by}: {'; '.join(found)}")
    model.load_state_dict(
        {name: value.to(device, dtype, copy=True) for name, value in tensors.items()}, assign=True
    )


def differences(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """In what names, shapes and kinds a file's tensors differ from a network's; a line a kind."""
    return [
        *_listed("missing", sorted(set(expected) - set(tensors))),
        *_listed("unexpected", sorted(set(tensors) - set(expected))),
        *_listed(
            "wrong shape",
            [
                f"{name} {list(tensors[name].shape)} instead of {list(value.shape)}"
                for name, value in expected.items()
                if name in tensors and tensors[name].shape != value.shape
            ],
        ),
        *_listed(
            "not floating point",
            [f"{name} {t.dtype}" for name, t in tensors.items() if not t.is_floating_point()],
        ),
    ]


def _listed(what: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    more = f", and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return [f"{what}: {', '.join(entries[:_SHOWN])}{more}"]

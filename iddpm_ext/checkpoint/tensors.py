"""Reads the tensors of a file, and compares them with those of a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from iddpm_ext.text import printable

from .parts import weights_of
from .torch_file import is_torch_file, read_plain

_SHOWN = 6
# Keys in the metadata of this package's files.
OURS = ("unet", "classifier")


def read_file(
    path: Path, part: str | None = None, *, average: bool = True
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata (empty for a file of PyTorch's own format) and tensors of the network.

    part, average: which weights to take from files of other programs, as in `weights_of`.
    Raises ValueError.
    """
    if is_torch_file(path):
        return {}, weights_of(path, read_plain(path), part, average=average)
    metadata, tensors = read_safetensors(path)
    if not any(name in metadata for name in OURS):
        return metadata, weights_of(path, tensors, part, average=average)
    if part is not None:
        raise ValueError(
            f"load: part must be None for {path}, which holds one network, got {part!r}"
        )
    return metadata, tensors


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file. Raises ValueError if it is damaged."""
    try:
        with (
            open(path, "rb") as opened,
            safe_open(
                # The library takes UTF-8 names only; the path of a descriptor works for any file.
                path if _is_utf8(path) else f"/dev/fd/{opened.fileno()}",
                framework="pt",
                device="cpu",
            ) as file,
        ):
            metadata = file.metadata() or {}
            return metadata, {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        words = printable(str(error))
        raise ValueError(f"load: {path} must be a whole safetensors file, got: {words}") from None


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


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

    stated_by: sources of the network's configuration. Raises ValueError with all differences in names,
    shapes and dtypes.
    """
    found = differences(model.state_dict(), tensors)
    if found:
        raise ValueError(f"load: {path} contradicts {stated_by}: {'; '.join(found)}")
    model.load_state_dict(
        {name: value.to(device, dtype, copy=True) for name, value in tensors.items()}, assign=True
    )


def differences(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """The differences in names, shapes and dtypes of a file's tensors from a network's; a line for each."""
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
    return [f"{what}: {', '.join(map(printable, entries[:_SHOWN]))}{more}"]

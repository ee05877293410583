"""Reading tensors from a file that `torch.save` wrote, without running anything that is in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

SUFFIXES = (".pt", ".pth")
_ZIP = b"PK\x03\x04"


def is_torch_file(path: Path) -> bool:
    """Whether `path` is to be read as PyTorch's own format: by its suffix, or as a zip archive."""
    if path.suffix.lower() in SUFFIXES:
        return True
    with open(path, "rb") as file:
        return file.read(len(_ZIP)) == _ZIP


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict by name, in the file's order; archives are mapped, not read.

    Raises ValueError where the file is damaged or holds anything but named, dense tensors.
    """
    content = read_plain(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"load: {path} must hold tensors by name, got {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"load: {path} must hold tensors by name, got {name!r}: {kind}")
        require_dense(path, name, value)
    return {name: value.detach() for name, value in content.items()}


def read_plain(path: Path) -> object:
    """What `torch.load` allows with weights_only=True: containers of numbers, text and tensors."""
    with open(path, "rb") as file:
        archive = file.read(len(_ZIP)) == _ZIP
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    # A damaged file fails anywhere inside the reader, with whatever error that part of it has.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"load: {os.fspath(path)} must be a whole PyTorch file of nothing but tensors, "
            f"got: {reason}"
        ) from error


def require_dense(path: Path, name: str, value: Tensor) -> None:
    """Refuses tensors that are sparse, quantised or elsewhere, or that claim more than is stored."""
    if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
        raise ValueError(f"load: {path} must hold dense tensors, got {name}: {value.layout}")
    # A few bytes can describe terabytes, by strides of zero.
    stored = value.untyped_storage().nbytes()
    if value.numel() * value.element_size() > stored:
        raise ValueError(
            f"load: {path} must store every element, got {name} {list(value.shape)} in {stored} bytes"
        )

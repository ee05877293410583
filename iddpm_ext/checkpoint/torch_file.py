"""Reads files of `torch.save` without running any code in them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from iddpm_ext.text import printable

SUFFIXES = (".pt", ".pth")
_ZIP = b"PK\x03\x04"
_WANTED = re.compile(r"GLOBAL (\S+) was not an allowed global")


def is_torch_file(path: Path) -> bool:
    """Whether `path` is a file of `torch.save`: by its content, else by its suffix."""
    with open(path, "rb") as file:
        head = file.read(9)
    if head.startswith(_ZIP):
        return True
    # A safetensors file begins with the length of its header, eight bytes, and the header, a JSON object.
    return head[8:] != b"{" and path.suffix.lower() in SUFFIXES


def read_plain(path: Path) -> object:
    """The content of the file, by `torch.load` with weights_only=True: numbers, text and tensors.

    Raises ValueError if there is anything else in the file, or it is damaged.
    """
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            # Memory mapping needs the path, but by some suffixes torch would take a file for safetensors.
            mapped = file.read(len(_ZIP)) == _ZIP and path.suffix.lower() in SUFFIXES
            file.seek(0)
            source = path if mapped else file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    # Damaged files fail anywhere inside the reader, with any error. Its text is not passed on, since for
    # files that contain code it recommends running it.
    except Exception as error:
        wanted = _WANTED.search(str(error))
    if wanted is not None:
        got = (
            f"an object of {printable(wanted[1])!r}, which is left alone: nothing in a file is run. "
            "Where the file was made, save the weights by themselves, "
            "torch.save(model.state_dict(), path)"
        )
    else:
        got = "one that is damaged, cut short, or of another program"
    raise ValueError(f"load: {path} must be a whole PyTorch file of nothing but tensors, got {got}")


def require_dense(path: Path, name: str, value: Tensor) -> None:
    """Refuses tensors that are sparse, quantised or not on the CPU, or larger than their storage."""
    name = printable(name)
    if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
        raise ValueError(f"load: {path} must hold dense tensors, got {name}: {value.layout}")
    # With strides of zero a few bytes can describe terabytes.
    stored = value.untyped_storage().nbytes()
    if value.numel() * value.element_size() > stored:
        raise ValueError(
            f"load: {path} must store every element, got {name} {list(value.shape)} in {stored} bytes"
        )


def tensors_of(path: Path, content: Mapping[object, object]) -> dict[str, Tensor]:
    """The tensors of a state dict by name. Raises ValueError for anything but dense tensors."""
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            shown = printable(repr(name))
            raise ValueError(
                f"load: {path} must hold tensors by name, got {shown}: {type(value).__name__}"
            )
        require_dense(path, name, value)
        tensors[name] = value.detach()
    return tensors

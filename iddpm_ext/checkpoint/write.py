"""Saving a network: complete under its name, or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes

from iddpm_ext.files import write_whole
from iddpm_ext.networks.classifier import Classifier
from iddpm_ext.networks.foreign import unwrapped
from iddpm_ext.networks.unet import UNet
from iddpm_ext.scalars import plain

FORMAT_VERSION = 1
STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def save(
    model: UNet | Classifier,
    path: str | os.PathLike[str],
    extra: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the network with its configuration and diffusion process to one safetensors file.

    The file appears under its name when it is whole and on disk; until then, and after any failure,
    a file that was there before stays as it was.

    model: a UNet or a Classifier, whose `diffusion`, where set, travels along. Either may be wrapped by
        `torch.compile`, DataParallel or DistributedDataParallel: the network inside is saved.
    path: in an existing folder, of any name: `load` goes by the content.
    extra: JSON-ready facts (None: `model.extra`).
    dtype: of the stored weights: float32, bfloat16, float16 or float64 (None: as they are).
    Raises TypeError or ValueError for a wrong argument, OSError if the file cannot be written.
    """
    model = unwrapped(model)
    if not isinstance(model, (UNet, Classifier)):
        raise TypeError(f"save: model must be a UNet or a Classifier, got {type(model).__name__}")
    if dtype is not None and dtype not in STORED_DTYPES:
        names = ", ".join(str(d) for d in STORED_DTYPES)
        raise ValueError(f"save: dtype must be one of {names}, got {dtype}")
    metadata = metadata_of(model, extra)
    target = _require_target(path)
    tensors = {
        name: value.detach().to("cpu", dtype or value.dtype).contiguous()
        for name, value in model.state_dict().items()
    }
    write_whole(target, to_bytes(tensors, metadata))


def metadata_of(model: UNet | Classifier, extra: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What a checkpoint says of its network, each value JSON text. extra: None for `model.extra`."""
    extra = model.extra if extra is None else extra
    extra = plain(extra)
    if not isinstance(extra, Mapping):
        raise TypeError(f"save: extra must be a mapping, got {type(extra).__name__}")
    kind = "unet" if isinstance(model, UNet) else "classifier"
    metadata = {
        "format_version": str(FORMAT_VERSION),
        kind: json.dumps(model.config.to_dict()),
    }
    if model.diffusion is not None:
        metadata["diffusion"] = json.dumps(model.diffusion.to_dict())
    try:
        metadata["extra"] = json.dumps(dict(extra), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"save: extra must be JSON-ready, got {error}") from error
    return metadata


def _require_target(path: str | os.PathLike[str]) -> Path:
    # Resolved, so that a symbolic link keeps pointing at what is written.
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"save: path must be in an existing folder, got {str(path)!r}")
    if target.is_dir():
        raise IsADirectoryError(f"save: path must name a file, got the folder {str(path)!r}")
    if target.exists() and not target.is_file():
        raise ValueError(f"save: path must name a regular file, got {str(path)!r}")
    return target

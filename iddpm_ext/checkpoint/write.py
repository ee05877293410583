"""Saves a network, atomically."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from iddpm_ext.engines.structure import why_more
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

    The file appears under its name when it is complete and on disk; until then, and after any failure, a
    previous file of that name is unchanged.

    model: a UNet or a Classifier, including its `diffusion` if set. If it is wrapped by `torch.compile`,
        DataParallel or DistributedDataParallel, the network inside is saved.
    path: in an existing folder, with any suffix: `load` recognises the content.
    extra: JSON-ready facts (None: `model.extra`).
    dtype: of the stored weights: float32, bfloat16, float16 or float64 (None: as they are).
    Raises TypeError or ValueError for a wrong argument, or for a network with other tensors than its
    configuration says, OSError if the file cannot be written. What no file holds (hooks, say, or a
    `forward` of its own) is named by a RuntimeWarning.
    """
    model = unwrapped(model)
    if not isinstance(model, (UNet, Classifier)):
        raise TypeError(f"save: model must be a UNet or a Classifier, got {type(model).__name__}")
    if dtype is not None and dtype not in STORED_DTYPES:
        names = ", ".join(str(d) for d in STORED_DTYPES)
        raise ValueError(f"save: dtype must be one of {names}, got {dtype}")
    metadata = metadata_of(model, extra)
    target = _require_target(path)
    _require_loadable(model)
    tensors: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, value in model.state_dict().items():
        tensor = value.detach().to("cpu", dtype or value.dtype).contiguous()
        # A format without shared memory: parameters that are tied are stored once each.
        tensors[name] = tensor.clone() if tensor.data_ptr() in places else tensor
        places.add(tensor.data_ptr())
    write_whole(target, to_bytes(tensors, metadata))


def _require_loadable(model: UNet | Classifier) -> None:
    """ValueError unless the tensors are those of the configuration; a warning of what no file holds."""
    with torch.device("meta"):
        built = UNet(model.config) if isinstance(model, UNet) else Classifier(model.config)
    expected = {name: list(value.shape) for name, value in built.state_dict().items()}
    # What quantised layers store are no tensors.
    got = {name: list(getattr(value, "shape", ())) for name, value in model.state_dict().items()}
    differences = [
        *(f"no {name}" for name in expected if name not in got),
        *(f"{name} besides" for name in got if name not in expected),
        *(
            f"{name} {got[name]}"
            for name in expected
            if got.get(name, expected[name]) != expected[name]
        ),
    ]
    if differences:
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise ValueError(
            "save: model must have the tensors that its configuration says, without parametrizations, "
            f"adapters, buffers or compiled parts inside it, got {', '.join(differences[:4])}{more}"
        )
    beyond = why_more(model) if isinstance(model, UNet) else None
    if beyond is not None:
        warnings.warn(
            f"save: the file holds weights and configuration, and {beyond}, which is not in it",
            RuntimeWarning,
            stacklevel=3,
        )


def metadata_of(model: UNet | Classifier, extra: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The metadata of a network's checkpoint, each value JSON text. extra: None for `model.extra`."""
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

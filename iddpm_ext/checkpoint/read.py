"""Loading a network: by the name of a bundled model, or from a safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from iddpm_ext.diffusion import Diffusion
from iddpm_ext.unet import UNet
from iddpm_ext.unet_config import UNetConfig

from .write import FORMAT_VERSION

WEIGHTS = Path(__file__).parent.parent / "weights"
_SHOWN = 6


def bundled() -> list[str]:
    """Names of the models inside the package, sorted."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


def load(
    name_or_path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> UNet:
    """The network of a checkpoint, in evaluation mode, with its `diffusion` and `extra` set.

    name_or_path: a bundled model's name, or a .safetensors file that `save` wrote. A name goes
        before a file of the same name; "./name" is always a file.
    device: where the weights go. dtype: of the weights in memory, floating (None: float32).
    Raises ValueError when the file is truncated, foreign, or contradicts its own configuration
    (saying what differs), FileNotFoundError when there is none. No code in a file is ever run.
    """
    if dtype is None:
        dtype = torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"load: dtype must be a floating-point torch.dtype, got {dtype!r}")
    path = _locate(name_or_path)
    metadata, tensors = _read_safetensors(path)
    config, diffusion, extra = _parse_metadata(path, metadata)
    model = _empty_unet(path, config, tensors)
    model.load_state_dict(
        {name: value.to(device, dtype, copy=True) for name, value in tensors.items()}, assign=True
    )
    try:
        model.diffusion = diffusion
    except ValueError as error:
        raise ValueError(f"load: {path} contradicts itself: {error}") from error
    model.extra = extra
    return model.eval()


def _locate(name_or_path: str | os.PathLike[str]) -> Path:
    if not isinstance(name_or_path, (str, os.PathLike)):
        kind = type(name_or_path).__name__
        raise TypeError(f"load: name_or_path must be a string or a path, got {kind}")
    if name_or_path in bundled():
        return WEIGHTS / f"{name_or_path}.safetensors"
    path = Path(name_or_path)
    if path.is_dir():
        raise ValueError(f"load: name_or_path must name a file, got the folder {str(path)!r}")
    if not path.exists():
        names = ", ".join(bundled()) or "none in this installation"
        raise FileNotFoundError(
            f"load: name_or_path must be an existing file or a bundled model ({names}), "
            f"got {str(name_or_path)!r}"
        )
    return path


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            return metadata, {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"load: {path} must be a whole safetensors file, got: {error}") from error


def _parse_metadata(
    path: Path, metadata: Mapping[str, str]
) -> tuple[UNetConfig, Diffusion | None, dict[str, Any]]:
    if "unet" not in metadata:
        raise ValueError(
            f"load: {path} must carry the configuration of its network in the metadata, "
            f"got the keys {sorted(metadata)}"
        )
    version = metadata.get("format_version", str(FORMAT_VERSION))
    if version != str(FORMAT_VERSION):
        raise ValueError(
            f"load: {path} must have format_version {FORMAT_VERSION}, got {version!r}; "
            f"a newer iddpm_ext may read it"
        )
    try:
        config = UNetConfig.from_dict(json.loads(metadata["unet"]))
        described = json.loads(metadata.get("diffusion", "null"))
        diffusion = None if described is None else Diffusion.from_dict(described)
        extra = json.loads(metadata.get("extra", "{}"))
        if not isinstance(extra, dict):
            raise ValueError(f"extra must be an object, got {type(extra).__name__}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"load: {path} must hold valid metadata, got: {error}") from error
    return config, diffusion, extra


def _empty_unet(path: Path, config: UNetConfig, tensors: Mapping[str, Tensor]) -> UNet:
    """The network on the meta device, once names, shapes and types agree with `config`."""
    # A network has several tensors a block; this keeps a wild configuration from being built.
    if config.num_res_blocks * len(config.channel_mult) > len(tensors):
        raise ValueError(
            f"load: {path} contradicts its configuration: {len(config.channel_mult)} levels of "
            f"{config.num_res_blocks} blocks cannot have {len(tensors)} tensors"
        )
    with torch.device("meta"):
        model = UNet(config)
    expected = model.state_dict()
    differences = [
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
    if differences:
        raise ValueError(f"load: {path} contradicts its configuration: {'; '.join(differences)}")
    return model


def _listed(what: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    more = f", and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return [f"{what}: {', '.join(entries[:_SHOWN])}{more}"]

"""Reads and writes folders of diffusers: a network, or a pipeline around one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from iddpm_ext.engines.structure import weights_alone
from iddpm_ext.files import replacing
from iddpm_ext.interop import mapping
from iddpm_ext.interop.process import diffusion_of
from iddpm_ext.interop.tensors import tensors_from_diffusers
from iddpm_ext.networks.unet import UNet

_WEIGHTS = "diffusion_pytorch_model.safetensors"


def read_folder(path: str | os.PathLike[str]) -> UNet:
    """The network of a folder of diffusers as a `UNet`, with its process if there is a scheduler.

    Only JSON and safetensors files are read; diffusers itself need not be installed.

    Args:
        path: a folder with config.json and diffusion_pytorch_model.safetensors (or its shards), or
            one of a pipeline with model_index.json and the folders unet and scheduler.

    Raises:
        ValueError: a file is missing or broken, or no UNet computes the same, with the reasons.
    """
    folder = Path(path)
    network, diffusion = folder, None
    if (folder / "model_index.json").is_file():
        network = folder / "unet"
        scheduler = folder / "scheduler" / "scheduler_config.json"
        if scheduler.is_file():
            diffusion = diffusion_of(_json(scheduler))
    config = mapping.config_of_unet2d(_json(network / "config.json"))
    tensors = tensors_from_diffusers(_tensors(network), config)
    with torch.device("meta"):
        model = UNet(config)
    try:
        model.load_state_dict(tensors, assign=True)
        model.diffusion = diffusion
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"read_folder: {folder} contradicts itself: {error}") from error
    return model.float().eval().requires_grad_(True)


def write_folder(model: UNet, path: str | os.PathLike[str], *, stock: bool | None = None) -> Path:
    """Writes the network as a folder of diffusers, atomically.

    With a diffusion process it is a pipeline, for `DDPMPipeline.from_pretrained` if the network is a stock
    `UNet2DModel`, else for `iddpm_ext.IDDPMPipeline.from_pretrained`; without one, the network's folder
    alone.

    Args:
        model: a UNet, as of `to_diffusers`.
        path: a name that does not exist, or an empty folder.
        stock: as in `to_diffusers`.

    Raises:
        ValueError, OSError: the network has no such form, or the folder cannot be written.
    """
    from iddpm_ext.interop.convert import to_diffusers
    from iddpm_ext.interop.diffusers_api import DDPMPipeline, UNet2DModel
    from iddpm_ext.interop.pipeline import IDDPMPipeline
    from iddpm_ext.interop.scheduler import IDDPMScheduler

    model = weights_alone("write_folder", model)
    target = Path(path).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"write_folder: path must be new or an empty folder, got {str(path)!r}")
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"write_folder: path must be in an existing folder, got {str(path)!r}"
        )
    unet = to_diffusers(model, stock=stock)
    saved: Any = unet
    if model.diffusion is not None:
        pipeline = DDPMPipeline if type(unet) is UNet2DModel else IDDPMPipeline
        saved = pipeline(unet, IDDPMScheduler.from_diffusion(model.diffusion))
    with replacing(target) as temporary:
        saved.save_pretrained(temporary, safe_serialization=True)
    return target


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"read_folder: {path.parent} must hold {path.name}, got none") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"read_folder: {path} must be JSON, got: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"read_folder: {path} must be a JSON object, got {type(value).__name__}")
    return value


def _tensors(folder: Path) -> dict[str, Tensor]:
    names = [_WEIGHTS]
    index = folder / f"{_WEIGHTS}.index.json"
    if index.is_file():
        # Reduced to names within the folder, since an index could contain any path.
        names = sorted({Path(str(n)).name for n in dict(_json(index)["weight_map"]).values()})
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(
                f"read_folder: {folder} must hold {name} (weights in safetensors form), got none"
            )
        try:
            with safe_open(folder / name, framework="pt", device="cpu") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"read_folder: {folder / name} must be a whole safetensors file, got: {error}"
            ) from error
    return tensors

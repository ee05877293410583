"""Loading a network: a bundled one, a file of this or another package, a run, or a folder of diffusers."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from iddpm_ext.diffusion import Diffusion
from iddpm_ext.networks.config import UNetConfig
from iddpm_ext.networks.unet import UNet

from . import hub
from .flags import Flags
from .openai import Described, describe
from .runs import is_run, weights_of_run
from .tensors import fill, read_file, require_dtype
from .torch_file import is_torch_file
from .write import FORMAT_VERSION

WEIGHTS = Path(__file__).parent.parent / "weights"
_OF_DIFFUSERS = ("model_index.json", "config.json")
_FOLDERS = (*_OF_DIFFUSERS, hub.WEIGHTS)
# What the package iddpm-ext-models has, whose source is the folder models beside this package.
COMPANION = ("cifar10-medium", "cifar10-small")
_COMPANION_PACKAGE = "iddpm_ext_models"


def bundled() -> list[str]:
    """Names of the models inside the package, and inside iddpm-ext-models where that is there, sorted."""
    return sorted(_bundled_files())


def _bundled_files() -> dict[str, Path]:
    """Name -> file of every model that comes with the installation or lies in the source tree."""
    folders = [WEIGHTS.parent.parent / "models" / _COMPANION_PACKAGE, WEIGHTS]
    installed = importlib.util.find_spec(_COMPANION_PACKAGE)
    if installed is not None:
        folders += map(Path, installed.submodule_search_locations or ())
    return {path.stem: path for folder in folders for path in folder.glob("*.safetensors")}


def load(
    name_or_path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    flags: Flags | None = None,
    part: str | None = None,
) -> UNet:
    """The network of a checkpoint, in evaluation mode, with its `diffusion` and `extra` set.

    A .pt file that OpenAI released for improved-diffusion or guided-diffusion is recognised by its tensors:
    "cifar10_uncond_50M_500K.pt" needs nothing else, and `extra["openai"]` names what was recognised. A .pt of
    another run needs the flags that do not follow from the tensors; the error lists them.

    Weights are also found in other programs' files: under `module.`, `_orig_mod.` or Lightning's prefix, in
    {"model": ..., "ema": ...} and the like.

    name_or_path: a bundled model's name, a file that `save` wrote, an OpenAI .pt, the folder of a run of
        `iddpm train` (the first average of its newest valid checkpoint), a folder of `save_pretrained` or
        of diffusers, or "hf://org/name" and "hf://org/name@revision" on the Hugging Face hub. A bundled name
        has priority over a file of that name; "./name" is always a file. The kind of file is recognised by
        its content, not by its suffix.
    device: of the weights. dtype: of the weights in memory, floating (None: float32).
    flags: for an OpenAI file, names and values or a command line, {"num_heads": 4} or
        "--num_heads 4", with the original's names (image_size, noise_schedule, diffusion_steps, ...) or
        this package's. They override those of a released file, and must agree with the tensors.
    part: which weights of a file that holds several, by its own names, such as "model"; None takes the
        averaged ones if they can be identified, with a warning.
    Raises ValueError if the file is truncated, foreign, or contradicts its own configuration (naming the
    differences), or if flags are missing or wrong; FileNotFoundError if there is no file. Warns if a file of
    another name has the tensors of a released one. No code in a file is ever run.
    """
    dtype = require_dtype(dtype)
    path, (config, diffusion, extra, stated_by), tensors = read_network(name_or_path, flags, part)
    model = _empty_unet(path, config, len(tensors), stated_by)
    fill(path, model, tensors, stated_by, device, dtype)
    try:
        model.diffusion = diffusion
    except ValueError as error:
        raise ValueError(f"load: {path} contradicts itself: {error}") from error
    model.extra = extra
    return model.eval()


class Read(NamedTuple):
    """A network as it is stored. path: of its file, or of a folder of diffusers."""

    path: Path
    described: Described
    tensors: dict[str, Tensor]


def read_network(
    name_or_path: str | os.PathLike[str],
    flags: Flags | None = None,
    part: str | None = None,
    *,
    average: bool = True,
    otherwise: Flags | None = None,
) -> Read:
    """The parts of a network for `load`, whose tensors are not compared with the configuration yet.

    average: False for the trained weights instead of their average, if there are both.
    otherwise: defaults for flags of an OpenAI file that nothing else determines.
    Other arguments and errors as in `load`.
    """
    path = _locate(name_or_path)
    if path.is_dir():
        if is_run(path):
            path = weights_of_run(path, average=average)
        elif (path / hub.WEIGHTS).is_file():
            path = path / hub.WEIGHTS
        else:
            return _read_folder(path, flags, part)
    metadata, tensors = read_file(path, part, average=average)
    if "unet" not in metadata and (flags is not None or is_torch_file(path)):
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        return Read(path, describe(path, shapes, flags, otherwise), tensors)
    if flags is not None:
        raise ValueError(f"load: flags must be None for {path}, which has its own, got {flags!r}")
    return Read(path, parse_metadata(path, metadata), tensors)


def _locate(name_or_path: str | os.PathLike[str]) -> Path:
    if not isinstance(name_or_path, (str, os.PathLike)):
        kind = type(name_or_path).__name__
        raise TypeError(f"load: name_or_path must be a string or a path, got {kind}")
    files = _bundled_files()
    if isinstance(name_or_path, str) and name_or_path in files:
        return files[name_or_path]
    if hub.is_on_hub(name_or_path):
        return hub.fetch(*hub.HubName.parse(str(name_or_path)))
    path = Path(name_or_path)
    if not path.exists() and name_or_path in COMPANION:
        raise FileNotFoundError(
            f"load: {name_or_path} must be installed: it is in the package iddpm-ext-models, the folder "
            "models of iddpm_ext's source tree (pip install ./models)"
        )
    if not path.exists():
        names = ", ".join(files) or "none in this installation"
        raise FileNotFoundError(
            f"load: name_or_path must be an existing file or folder, a bundled model ({names}) or "
            f"{hub.SCHEME}org/name on the Hugging Face hub, got {str(name_or_path)!r}"
        )
    return path


def is_model_folder(folder: Path) -> bool:
    """Whether `load` takes this folder: of a run, of `save_pretrained` or of diffusers."""
    return is_run(folder) or any((folder / name).is_file() for name in _FOLDERS)


def _read_folder(folder: Path, flags: Flags | None, part: str | None) -> Read:
    """The network of a folder of diffusers."""
    if not is_model_folder(folder):
        raise ValueError(
            "load: name_or_path must be a file, the folder of a run (with ckpt in it), of save_pretrained "
            f"(with {hub.WEIGHTS}) or of diffusers (with model_index.json or config.json), got the folder "
            f"{str(folder)!r}"
        )
    for name, given in (("flags", flags), ("part", part)):
        if given is not None:
            raise ValueError(f"load: {name} must be None for a folder of diffusers, got {given!r}")
    from iddpm_ext.interop.folder import read_folder

    model = read_folder(folder)
    described = Described(model.config, model.diffusion, model.extra, "its configuration")
    return Read(folder, described, model.state_dict())


def parse_metadata(path: Path, metadata: Mapping[str, str]) -> Described:
    """The description of a `UNet` in the metadata of a file of this package. Raises ValueError."""
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
    return Described(config, diffusion, extra, "its configuration")


def _empty_unet(path: Path, config: UNetConfig, tensors: int, stated_by: str) -> UNet:
    """The network on the meta device."""
    # A block has several tensors, so this refuses absurd configurations before the network is built.
    if config.num_res_blocks * len(config.channel_mult) > tensors:
        raise ValueError(
            f"load: {path} contradicts {stated_by}: {len(config.channel_mult)} levels of "
            f"{config.num_res_blocks} blocks cannot have {tensors} tensors"
        )
    with torch.device("meta"):
        return UNet(config)

"""Loading a classifier of noisy images."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iddpm_ext.diffusion import Diffusion
from iddpm_ext.networks.classifier import Classifier, ClassifierConfig

from .flags import Flags, read_flags
from .released import CHANNEL_MULT, RELEASED_CLASSIFIERS, flags_of
from .runs import is_run, weights_of_run
from .shapes import Shapes
from .tensors import fill, read_file, require_dtype
from .torch_file import is_torch_file

_NEEDED = {
    "image_size": "image_size",
    "num_res_blocks": "classifier_depth",
    "attention_resolutions": "classifier_attention_resolutions",
    "use_scale_shift_norm": "classifier_use_scale_shift_norm",
    "resblock_updown": "classifier_resblock_updown",
    "pool": "classifier_pool",
}


def load_classifier(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    flags: Flags | None = None,
    part: str | None = None,
) -> Classifier:
    """The classifier of a checkpoint, in evaluation mode, with its `diffusion` and `extra` set.

    path: a .safetensors file that `save` wrote, the folder of a run of `iddpm train --classifier`, or a
        .pt of guided-diffusion; the four that OpenAI released ("64x64_classifier.pt") need nothing else.
    device, dtype: as in `load`.
    part: as in `load`.
    flags: for another .pt, as in `load`: image_size, classifier_depth and the other classifier_ flags.
    Raises as `load`. No code in a file is ever run.
    """
    dtype = require_dtype(dtype)
    path, (config, diffusion, extra, stated_by), tensors = read_classifier(path, flags, part)
    # A block has several tensors, so this refuses absurd configurations before the network is built.
    if config.num_res_blocks * len(config.channel_mult) > len(tensors):
        raise ValueError(
            f"load_classifier: {path} contradicts {stated_by}: it has {len(tensors)} tensors"
        )
    with torch.device("meta"):
        model = Classifier(config)
    fill(path, model, tensors, stated_by, device, dtype)
    model.diffusion, model.extra = diffusion, extra
    return model.eval()


class DescribedClassifier(NamedTuple):
    """All that `load_classifier` needs besides the tensors, as `openai.Described`."""

    config: ClassifierConfig
    diffusion: Diffusion | None
    extra: dict[str, Any]
    stated_by: str


class ReadClassifier(NamedTuple):
    """A classifier as it is stored. path: of its file."""

    path: Path
    described: DescribedClassifier
    tensors: dict[str, Tensor]


def read_classifier(
    path: str | os.PathLike[str],
    flags: Flags | None = None,
    part: str | None = None,
    *,
    average: bool = True,
    otherwise: Flags | None = None,
) -> ReadClassifier:
    """The parts of a classifier for `load_classifier`, as `read.read_network`."""
    path = Path(path)
    if path.is_dir() and is_run(path):
        path = weights_of_run(path, average=average)
    if not path.is_file():
        raise FileNotFoundError(
            f"load_classifier: path must be an existing file or the folder of a run, got {str(path)!r}"
        )
    metadata, tensors = read_file(path, part, average=average)
    if is_torch_file(path):
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        config = _describe(path, shapes, flags, otherwise)
        extra: dict[str, Any] = {"openai": {"file": path.name}}
        described = DescribedClassifier(config, None, extra, "its flags")
    elif flags is not None:
        raise ValueError(f"load_classifier: flags must be None for {path}, got {flags!r}")
    else:
        described = parse_classifier(path, metadata)
    return ReadClassifier(path, described, tensors)


def released_classifier(name: str) -> ClassifierConfig:
    """The configuration of a released classifier."""
    return ClassifierConfig(**flags_of(name))


def _describe(
    path: Path, shapes: Shapes, flags: Flags | None, otherwise: Flags | None
) -> ClassifierConfig:
    if flags is not None:
        return _config_of_flags(path, shapes, read_flags(flags))
    named = [path.name] if path.name in RELEASED_CLASSIFIERS else list(RELEASED_CLASSIFIERS)
    for name in named:
        config = released_classifier(name)
        with torch.device("meta"):
            expected = Classifier(config).state_dict()
        # Under a released file's own name the caller compares all tensors, and reports differences.
        if named == [name] or {k: tuple(v.shape) for k, v in expected.items()} == shapes:
            return config
    if otherwise is not None:
        return _config_of_flags(path, shapes, read_flags(otherwise))
    raise ValueError(
        f"load_classifier: flags must be given for {path}, which is none of "
        f"{', '.join(RELEASED_CLASSIFIERS)}: {', '.join(_NEEDED.values())}"
    )


def _config_of_flags(path: Path, shapes: Shapes, values: dict[str, Any]) -> ClassifierConfig:
    missing = [_NEEDED[name] for name in _NEEDED if name not in values]
    if missing:
        raise ValueError(
            f"load_classifier: flags must give what the tensors of {path} cannot tell: "
            f"{', '.join(missing)}"
        )
    last = [shape for name, shape in shapes.items() if name.startswith("out.")][-1:]
    first = shapes.get("time_embed.0.weight", ())
    if not last or len(first) != 2:
        raise ValueError(f"load_classifier: {path} must hold a classifier of guided-diffusion")
    seen: dict[str, Any] = {"num_classes": last[0][0], "model_channels": first[1]}
    if values["image_size"] in CHANNEL_MULT:
        seen["channel_mult"] = CHANNEL_MULT[values["image_size"]]
    try:
        return ClassifierConfig(**{**seen, **values})
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_classifier: flags must fit {path}, got: {error}") from error


def parse_classifier(path: Path, metadata: Mapping[str, str]) -> DescribedClassifier:
    """The description of a classifier in the metadata of a file of this package. Raises ValueError."""
    if "classifier" not in metadata:
        raise ValueError(
            f"load_classifier: {path} must carry the configuration of a classifier in the metadata, "
            f"got the keys {sorted(metadata)}"
        )
    try:
        config = ClassifierConfig.from_dict(json.loads(metadata["classifier"]))
        described = json.loads(metadata.get("diffusion", "null"))
        diffusion = None if described is None else Diffusion.from_dict(described)
        extra = json.loads(metadata.get("extra", "{}"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"load_classifier: {path} must hold valid metadata, got: {error}"
        ) from error
    extra = extra if isinstance(extra, dict) else {}
    return DescribedClassifier(config, diffusion, extra, "its configuration")

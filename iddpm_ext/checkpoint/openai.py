"""The configuration of a checkpoint of OpenAI's code, from its tensors and from flags."""

from __future__ import annotations

import re
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from iddpm_ext.diffusion import Diffusion
from iddpm_ext.networks.config import UNetConfig

from .flags import Flags, read_flags
from .released import RELEASED, flags_of
from .shapes import Shapes, Structure, Unlike, infer

# The names of files that the original's training writes. Their flags are unknown, whatever the shapes.
_OF_A_RUN = re.compile(r"(model|ema_[0-9.]+_)\d+\.pt")
_STRUCTURAL = {f.name for f in fields(Structure)} - {"attention_levels"}
_UNSEEN = (
    "attention_resolutions", "num_heads", "num_heads_upsample", "num_head_channels",
    "attention_order", "dropout",
)  # fmt: skip
_WANTED = ("image_size", "schedule", "num_timesteps", "rescale_timesteps")
_NEEDED = {
    "image_size": "image_size (large_size of an upsampler)",
    "heads": "num_heads or num_head_channels",
    "schedule": "noise_schedule",
    "num_timesteps": "diffusion_steps",
    "rescale_timesteps": "rescale_timesteps",
    "attention_order": "use_new_attention_order",
}


class Described(NamedTuple):
    """All that `load` needs besides the tensors. stated_by: sources of the configuration."""

    config: UNetConfig
    diffusion: Diffusion | None
    extra: dict[str, Any]
    stated_by: str


def describe(
    path: Path, shapes: Shapes, flags: Flags | None, otherwise: Flags | None = None
) -> Described:
    """The configuration of the U-Net with these tensors.

    path: its name distinguishes the files that OpenAI released from those of other runs.
    flags: override those of a released file; None for none.
    otherwise: defaults for missing flags of other files.
    Raises ValueError if flags contradict the tensors or one another, or are missing.
    """
    given = {} if flags is None else read_flags(flags)
    try:
        structure = infer(shapes)
    except Unlike as error:
        if path.name not in RELEASED:
            raise ValueError(
                f"load: {path} must hold a U-Net of improved-diffusion or guided-diffusion, "
                f"but {error}"
            ) from None
        structure = None
    names = [] if _OF_A_RUN.fullmatch(path.name) else _recognised(structure)
    if path.name in RELEASED and path.name not in names and not given:
        # Under a released file's own name the caller compares all tensors, and reports differences.
        return _described(path, Structure.of_config(released_config(path.name)), [path.name], {})
    if structure is None:
        raise ValueError(f"load: {path} must hold the tensors of the released {path.name}")
    if names and path.name not in names and not set(_WANTED) <= given.keys():
        warnings.warn(
            f"load: {path} has the tensors of OpenAI's {' and '.join(names)}: flags that are not "
            f"given are taken from there. A network of another run needs its own flags",
            stacklevel=4,
        )
    if not names and otherwise is not None:
        given = {**read_flags(otherwise), **given}
    return _described(path, structure, names, given)


def released_config(name: str) -> UNetConfig:
    """The network of a released file."""
    return _config(flags_of(name))


def _recognised(structure: Structure | None) -> list[str]:
    """The released files with this structure."""
    return [n for n in RELEASED if Structure.of_config(released_config(n)) == structure]


def _described(
    path: Path, structure: Structure, names: list[str], given: dict[str, Any]
) -> Described:
    published = flags_of(path.name if path.name in names else names[0]) if names else {}
    values = {**published, **given}
    if "num_head_channels" in given or "num_heads" in given:
        # Given heads replace the released file's, of either kind.
        for name in {"num_head_channels", "num_heads"} - given.keys():
            values.pop(name, None)
    _require_known(path, structure, values)
    _require_agreement(path, structure, values)
    try:
        config = structure.config(
            values["image_size"],
            **{k: values[k] for k in _UNSEEN if values.get(k) is not None},
        )
        diffusion = _diffusion(structure, values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"load: flags must fit {path}, got: {error}") from error
    extra: dict[str, Any] = {"file": path.name, "flags": {k: values[k] for k in sorted(values)}}
    if names:
        extra["recognised"] = names
    stated_by = f"the released {' and '.join(names)}" if names else "its configuration"
    return Described(config, diffusion, {"openai": extra}, stated_by)


def _require_known(path: Path, structure: Structure, values: dict[str, Any]) -> None:
    missing = [name for name in _WANTED if name not in values]
    if not values.get("num_heads") and not values.get("num_head_channels"):
        missing.append("heads")
    guided = structure.resblock_updown or values.get("num_head_channels")
    if guided and "attention_order" not in values:
        missing.append("attention_order")
    if missing:
        raise ValueError(
            f"load: flags must give what the tensors of {path} cannot tell: "
            f"{', '.join(_NEEDED[name] for name in missing)}; for example "
            f'flags="--image_size 64 --num_heads 4 --noise_schedule cosine --diffusion_steps 4000 '
            f'--rescale_timesteps True"'
        )


def _require_agreement(path: Path, structure: Structure, values: dict[str, Any]) -> None:
    seen = {name: getattr(structure, name) for name in _STRUCTURAL}
    seen["class_cond"] = structure.num_classes is not None
    seen["learn_sigma"] = structure.out_channels == 2 * structure.in_channels
    differences = [
        f"{name} {seen[name]!r}, not {values[name]!r}"
        for name in sorted(seen.keys() & values.keys())
        if seen[name] != values[name]
    ]
    size, sides = values["image_size"], values.get("attention_resolutions")
    if sides is not None:
        levels = range(len(structure.channel_mult))
        attended = tuple(level for level in levels if size // 2**level in sides)
        if attended != structure.attention_levels:
            there = [size // 2**level for level in structure.attention_levels]
            differences.append(f"attention_resolutions {there}, not {list(sides)}")
    if differences:
        raise ValueError(
            f"load: flags must agree with the tensors of {path}, which have {'; '.join(differences)}"
        )


def _diffusion(structure: Structure, values: dict[str, Any]) -> Diffusion:
    if structure.out_channels == 2 * structure.in_channels:
        variance = "learned_range"
    else:
        variance = "fixed_small" if values.get("sigma_small") else "fixed_large"
    return Diffusion(
        values["schedule"],
        values["num_timesteps"],
        values.get("variance", variance),
        values.get("prediction", "epsilon"),
        values["rescale_timesteps"],
    )


def _config(values: dict[str, Any]) -> UNetConfig:
    """The configuration that flags alone describe, for three-channel images and ImageNet's classes."""
    names = {f.name for f in fields(UNetConfig)} & values.keys()
    chosen = {name: values[name] for name in names if values[name] is not None}
    classes = 1000 if values["class_cond"] else None
    return UNetConfig(**chosen, out_channels=6 if values["learn_sigma"] else 3, num_classes=classes)

"""Train a network on images; a folder that holds a run is resumed.

Example: iddpm train --data DIR --out runs/mine --steps 2000 --batch-size 16 --lr 5e-4 --class-cond
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import shlex
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from iddpm_ext.cli._common import quiet, result, starting
from iddpm_ext.training.config import TrainConfig

# The first setting of each group of flags -> its name and what it is about.
_GROUPS = {
    "data": ("run", "What is trained on, where to, and for how long."),
    "image_size": ("image", "How the data is read: docs/data.md."),
    "class_cond": ("task", "What the network is for, besides drawing images like those."),
    "model_channels": ("network", "Its shape."),
    "schedule": ("process", "How noise is added, and what is predicted."),
    "objective": ("loss", "What is minimised."),
    "lr": ("optimiser", "AdamW, and the averages that are sampled from."),
    "dtype": ("speed", "How it is computed."),
    "noise_scale": ("output", "What the run writes, and when."),
    "seed": ("start", "What it begins with."),
}


def _flags_of(defaults: TrainConfig) -> type:
    """A dataclass of the groups of flags, with these defaults."""
    types = typing.get_type_hints(TrainConfig)
    # The settings' own texts are the flags'.
    doc = inspect.cleandoc(TrainConfig.__doc__ or "")
    texts = doc[doc.index("Attributes:") :]
    members: dict[str, list[Any]] = {}
    words: dict[str, str] = {}
    for setting in dataclasses.fields(TrainConfig):
        if setting.name in _GROUPS:
            group, words[group] = _GROUPS[setting.name]
            members[group] = []
        default = dataclasses.field(default=getattr(defaults, setting.name))
        members[group].append((setting.name, types[setting.name], default))
    groups = []
    for group, fields in members.items():
        kind: Any = dataclasses.make_dataclass(
            group, fields, frozen=True, namespace={"__doc__": f"{words[group]}\n\n{texts}"}
        )
        annotated = Annotated[kind, tyro.conf.OmitArgPrefixes]
        groups.append((group, annotated, dataclasses.field(default_factory=kind)))
    return dataclasses.make_dataclass("Flags", groups, frozen=True)


def _runner(defaults: TrainConfig) -> Callable[..., None]:
    """What trains as flags with these defaults say."""
    flags_of_a_run = _flags_of(defaults)

    def run(flags: Any, config_file: Path | None = None) -> None:
        """Trains as the flags say; under torchrun, on all processes together.

        Args:
            flags: the settings.
            config_file: a JSON file of these settings, such as a run's config.json. Flags override
                it.
        """
        groups = (getattr(flags, group.name) for group in dataclasses.fields(flags))
        config = TrainConfig(**{k: v for group in groups for k, v in vars(group).items()})
        starting("train", f"opening {config.data}")
        from iddpm_ext.training.loop import train

        path = train(dataclasses.replace(config, progress=config.progress and not quiet()))
        if os.environ.get("RANK", "0") == "0":
            result(f"{path}\n{next_command(config)}", {"checkpoint": str(path), "run": config.out})

    run.__annotations__["flags"] = Annotated[flags_of_a_run, tyro.conf.arg(name="")]
    return run


run = _runner(TrainConfig())


def next_command(config: TrainConfig) -> str:
    """The command that shows what the run has made."""
    out = shlex.quote(config.out)
    if config.classifier:
        return f"iddpm sample NETWORK --labels all --classifier {out} --out samples.png"
    labels = " --labels all" if config.class_cond else ""
    small = " --low-res SMALL.npz" if config.super_resolution is not None else ""
    return f"iddpm sample {out}{labels}{small} --out samples.png"


def bind(arguments: Sequence[str]) -> Callable[..., None]:
    """`run` whose flags have the defaults of the configuration file in `arguments`, if there is one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-file", "--config_file", type=Path)
    file = parser.parse_known_args(arguments)[0].config_file
    return run if file is None else _runner(TrainConfig.from_json(file))

"""Train a network on images; a folder that holds a run is resumed."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from iddpm_ext.cli._common import quiet, result, starting
from iddpm_ext.training.config import TrainConfig


def run(
    config: Annotated[TrainConfig, tyro.conf.arg(name="")], config_file: Path | None = None
) -> None:
    """Trains as the flags say; under torchrun, on all processes together.

    Args:
        config: the run.
        config_file: a JSON file of these settings, such as a run's config.json. Flags override it.
    """
    starting("train", f"opening {config.data}")
    from iddpm_ext.training.loop import train

    path = train(dataclasses.replace(config, progress=config.progress and not quiet()))
    if os.environ.get("RANK", "0") == "0":
        result(f"{path}\n{next_command(config)}", {"checkpoint": str(path), "run": config.out})


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
    return run if file is None else functools.partial(run, config=TrainConfig.from_json(file))

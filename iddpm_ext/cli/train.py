"""Train a network on images; a folder that holds a run is resumed."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import tyro

from iddpm_ext.training.config import TrainConfig


def run(
    config: Annotated[TrainConfig, tyro.conf.arg(name="")], config_file: Path | None = None
) -> None:
    """Trains as the flags say; under torchrun, on all processes together.

    Args:
        config: the run.
        config_file: a JSON file of these settings, such as a run's config.json. Flags that are not at
            their defaults go before it.
    """
    from iddpm_ext.training.loop import train

    if config_file is not None:
        given = config.to_dict()
        changed = {
            f.name: given[f.name] for f in fields(config) if getattr(config, f.name) != f.default
        }
        config = TrainConfig.from_dict({**TrainConfig.from_json(config_file).to_dict(), **changed})
    path = train(config)
    if os.environ.get("RANK", "0") == "0":
        print(path)

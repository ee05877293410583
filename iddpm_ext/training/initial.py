"""Starting a run from the files of another: weights, averages and optimiser."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iddpm_ext.checkpoint.runs import is_run, weights_of_run
from iddpm_ext.checkpoint.tensors import differences, read_file
from iddpm_ext.checkpoint.torch_file import (
    is_torch_file,
    read_plain,
    require_dense,
)
from iddpm_ext.data.classes import difference
from iddpm_ext.diffusion import Diffusion
from iddpm_ext.networks.config import UNetConfig

from .config import TrainConfig
from .optimizer import MOMENTS
from .parallel import copy_whole
from .state import TrainState

_LABELS = "label_emb.weight"
_EMA_FILE = re.compile(r"ema_([0-9.]+)_\d+\.pt")
# What may change from run to run over the same weights.
_FREE = ("dropout", "image_size", "attention_resolutions")


def start_from(state: TrainState, config: TrainConfig) -> list[str]:
    """Takes what `config.init_from`, `init_ema` and `init_optimizer` name; returns notes for the user.

    Weights may be any file that `iddpm_ext.load` reads. With an optimiser the run goes on at its step.
    Raises ValueError where a file does not fit the run's network, saying how.
    """
    weights, notes = _read_weights(Path(config.init_from), state, average=False)
    averages = [_read_weights(Path(path), state, average=True)[0] for path in config.init_ema]
    for path, decay in zip(config.init_ema, config.ema, strict=False):
        named = _EMA_FILE.fullmatch(Path(path).name)
        if named is not None and float(named[1]) != decay:
            raise ValueError(
                f"train: init_ema must have the decays of ema in their order, "
                f"got {path} where ema has {decay}"
            )
    moments = None
    if config.init_optimizer:
        moments, step, lines = _read_optimizer(Path(config.init_optimizer), state, config)
        notes += lines
    with torch.no_grad():
        for name, value in state.model.state_dict().items():
            copy_whole(value, weights[name])
        for average, values in zip(state.emas.values(), averages or [weights] * len(state.emas),
                                   strict=True):  # fmt: skip
            for name, value in average.items():
                copy_whole(value, values[name])
        if moments is not None:
            for name, parameter in state.model.named_parameters():
                entry = state.optimizer.state[parameter]
                for moment in MOMENTS:
                    copy_whole(entry[moment], moments[moment][name])
            state.optimizer.updates.fill_(step)
            state.step, state.images = step, step * config.batch_size
    at = f" at step {state.step}" if state.step else ""
    return [f"started from {config.init_from}{at}", *notes]


def _read_weights(
    path: Path, state: TrainState, *, average: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors at `path`: of a run or file with both, the averaged ones or those being trained."""
    if path.is_dir() and is_run(path):
        path = weights_of_run(path, average=average)
    if not path.is_file():
        raise FileNotFoundError(f"train: init files must exist, got {str(path)!r}")
    metadata, tensors = read_file(path, average=average)
    notes = _compare(path, metadata, state)
    # OpenAI's code never withholds a label.
    state.trained_before(_extra(metadata).get("label_dropout") if "unet" in metadata else 0.0)
    expected = state.model.state_dict()
    rows = expected[_LABELS].shape[0] if _LABELS in expected else 0
    if is_torch_file(path) and _LABELS in tensors and len(tensors[_LABELS]) > rows > 0:
        notes.append(f"{path} has {len(tensors[_LABELS])} classes, of which the run keeps {rows}")
        tensors[_LABELS] = tensors[_LABELS][:rows]
    found = differences(expected, tensors)
    if found:
        raise ValueError(
            f"train: {path} must fit the network that the run's settings describe, "
            f"got {'; '.join(found)}"
        )
    return tensors, notes


def _compare(path: Path, metadata: Mapping[str, str], state: TrainState) -> list[str]:
    """Refuses another network than the run's; notes on another process and other classes."""
    if "unet" not in metadata:
        return []
    theirs = UNetConfig.from_dict(json.loads(metadata["unet"])).to_dict()
    ours = state.model.config.to_dict()
    broken = [f"{n}={ours[n]!r} (there {theirs[n]!r})" for n in ours if ours[n] != theirs[n]]
    broken = [line for line in broken if line.split("=")[0] not in _FREE]
    if broken:
        raise ValueError(f"train: settings must be those of {path}, got {', '.join(broken)}")
    described = json.loads(metadata.get("diffusion", "null"))
    notes = []
    if described is not None and Diffusion.from_dict(described) != state.model.diffusion:
        notes.append(f"{path} was trained for {Diffusion.from_dict(described)!r}")
    names, before = state.class_names, _extra(metadata).get("class_names")
    if ours["num_classes"] and names and before and list(names) != before:
        notes.append(
            f"{path} has other classes ({difference(names, before)}): each begins as the one of its number"
        )
    return notes


def _extra(metadata: Mapping[str, str]) -> dict[str, Any]:
    return json.loads(metadata.get("extra", "{}"))


def _read_optimizer(
    path: Path, state: TrainState, config: TrainConfig
) -> tuple[dict[str, dict[str, Tensor]], int, list[str]]:
    """moment -> parameter's name -> tensor, the number of steps made, and notes.

    The file is the state of a `torch.optim.AdamW`, which numbers parameters in the network's order; from
    half-precision training it has one or two flat vectors in place of them.
    """
    if not path.is_file():
        raise FileNotFoundError(f"train: init_optimizer must exist, got {str(path)!r}")
    content = read_plain(path)
    try:
        entries, group = _parts_of(content)
        steps = {int(entry["step"]) for entry in entries}
        whole = {m: [entry[m] for entry in entries] for m in MOMENTS}
        for moment, values in whole.items():
            for value in values:
                require_dense(path, moment, value)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"train: {path} must be the state of an AdamW, got {type(error).__name__}: {error}"
        ) from None
    if len(steps) != 1 or min(steps) < 0:
        raise ValueError(f"train: {path} must be of one step, got {sorted(steps)}")
    moments = {m: _by_name(path, values, state) for m, values in whole.items()}
    notes = [
        f"{path} has {name} {group[name]}, the run {ours}"
        for name, ours in state.optimizer.param_groups[0].items()
        if name in ("lr", "betas", "eps", "weight_decay") and name in group and group[name] != ours
    ]
    return moments, steps.pop(), notes


def _parts_of(content: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The entries of an optimiser's state in the order of its parameters, and its settings."""
    groups = content["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    return [content["state"][number] for number in numbers], groups[0]


def _by_name(path: Path, values: list[Tensor], state: TrainState) -> dict[str, Tensor]:
    """One moment's tensors by the names of the parameters."""
    shapes = {name: p.shape for name, p in state.model.named_parameters()}
    if len(values) == len(shapes):
        named = dict(zip(shapes, values, strict=True))
    else:
        named = _unflattened(path, values, shapes)
    rows = shapes.get(_LABELS, torch.Size([0]))[0]
    if rows and named[_LABELS].dim() == 2 and len(named[_LABELS]) > rows:
        named[_LABELS] = named[_LABELS][:rows]
    for name, value in named.items():
        if value.shape != shapes[name]:
            raise ValueError(
                f"train: {path} must fit the network that the run's settings describe, "
                f"got {list(value.shape)} instead of {list(shapes[name])} for {name}"
            )
    return named


def _unflattened(
    path: Path, values: list[Tensor], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Flat vectors taken apart: one of all parameters, or one of those with at most a dimension and
    one of the others."""
    groups = [list(shapes)]
    if len(values) == 2:
        groups = [
            [n for n in shapes if len(shapes[n]) < 2],
            [n for n in shapes if len(shapes[n]) > 1],
        ]
    named: dict[str, Tensor] = {}
    for group, flat in zip(groups, values, strict=False):
        sizes = [math.prod(shapes[name]) for name in group]
        if len(values) > 2 or flat.numel() != sum(sizes):
            raise ValueError(
                f"train: {path} must fit the network that the run's settings describe, got "
                f"{len(values)} tensors, one of {flat.numel()} numbers, for {len(shapes)} parameters"
            )
        pieces = flat.reshape(-1).split(sizes)
        named.update({n: p.view(shapes[n]) for n, p in zip(group, pieces, strict=True)})
    return {name: named[name] for name in shapes}

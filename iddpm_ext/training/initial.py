"""Starting a run from the files of another: weights, averages and optimiser."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iddpm_ext.checkpoint.tensors import differences
from iddpm_ext.checkpoint.torch_file import read_plain, require_dense
from iddpm_ext.data.classes import difference

from .config import TrainConfig
from .design import LABELS, Start, labels_kept, read_start
from .optimizer import MOMENTS
from .parallel import copy_whole
from .state import TrainState

_EMA_FILE = re.compile(r"ema_([0-9.]+)_\d+\.pt")


def start_from(state: TrainState, config: TrainConfig, start: Start) -> list[str]:
    """Loads the weights of `start`, `config.init_ema` and `config.init_optimizer`; returns messages.

    With an optimiser the run continues at its step. Raises ValueError if a file does not fit the run's
    network, saying why.
    """
    notes = []
    # OpenAI's code trains without label dropout.
    state.trained_before(0.0 if start.of_openai else start.extra.get("label_dropout"))
    names, before = state.class_names, start.extra.get("class_names")
    if state.model.config.num_classes and names and before and list(names) != before:
        notes.append(
            f"{start.name} has other classes ({difference(names, before)}): "
            "each begins as the one of its number"
        )
    weights, lines = _fitting(start, state)
    notes += lines
    averages = []
    for path, decay in zip(config.init_ema, config.ema, strict=False):
        named = _EMA_FILE.fullmatch(Path(path).name)
        if named is not None and float(named[1]) != decay:
            raise ValueError(
                f"train: init_ema must have the decays of ema in their order, "
                f"got {path} where ema has {decay}"
            )
        _, described, tensors = read_start(config, path, state.image_shape, average=True)
        averaged = Start(path, tensors, described.extra, start.of_openai)
        averages.append(_fitting(averaged, state)[0])
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


def _fitting(start: Start, state: TrainState) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a file, for as many classes as the network has, and a note on those left out."""
    expected = state.model.state_dict()
    tensors, notes = labels_kept(start, len(expected[LABELS]) if LABELS in expected else 0)
    found = differences(expected, tensors)
    if found:
        raise ValueError(f"train: {start.name} must fit the run's network, got {'; '.join(found)}")
    return tensors, notes


def _read_optimizer(
    path: Path, state: TrainState, config: TrainConfig
) -> tuple[dict[str, dict[str, Tensor]], int, list[str]]:
    """moment -> parameter's name -> tensor, the number of steps, and messages.

    The file is the state of a `torch.optim.AdamW`, which numbers parameters in the network's order. After
    half-precision training it has one or two flat vectors instead.
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
    rows = shapes.get(LABELS, torch.Size([0]))[0]
    if rows and named[LABELS].dim() == 2 and len(named[LABELS]) > rows:
        named[LABELS] = named[LABELS][:rows]
    for name, value in named.items():
        if value.shape != shapes[name]:
            raise ValueError(
                f"train: {path} must fit the run's network, "
                f"got {list(value.shape)} instead of {list(shapes[name])} for {name}"
            )
    return named


def _unflattened(
    path: Path, values: list[Tensor], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Splits flat vectors into parameters.

    There is one of all parameters; or one of those with at most one dimension, and one of the others.
    """
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
                f"train: {path} must fit the run's network, got "
                f"{len(values)} tensors, one of {flat.numel()} numbers, for {len(shapes)} parameters"
            )
        pieces = flat.reshape(-1).split(sizes)
        named.update({n: p.view(shapes[n]) for n, p in zip(group, pieces, strict=True)})
    return {name: named[name] for name in shapes}

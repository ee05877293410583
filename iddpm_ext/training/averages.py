"""Averages of the weights whose length is chosen after training: power-function averages and their fit.

The average of relative width sigma_rel at step t weighs the weights of step tau by p(tau) = (gamma + 1)
tau^gamma / t^(gamma + 1). A run keeps two or more widths and stores them now and then in OUT/averages. Any
other width is a sum of what was stored, as least squares fit its profile p.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from iddpm_ext.files import write_whole
from iddpm_ext.scalars import plain

from .config import WIDEST_AVERAGE

FOLDER = "averages"
_NAME = re.compile(r"step-(\d+)-sigma_rel-([0-9.e-]+)\.safetensors")
# Relative error of the profile that is worth a warning.
_MUCH = 0.1


def exponent(sigma_rel: float) -> float:
    """gamma of a relative width: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))."""
    if not 0 < sigma_rel < WIDEST_AVERAGE:
        raise ValueError(
            f"ema: sigma_rel must be above 0 and below {WIDEST_AVERAGE:.3f}, got {sigma_rel}"
        )
    low, high = 0.0, 1 / sigma_rel  # sigma_rel falls, and is below 1 / (gamma + 2)
    for _ in range(200):
        middle = (low + high) / 2
        if (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > sigma_rel**2:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def power_decay(updates: int, gamma: float) -> float:
    """The decay of the average's next update, after `updates` of them: (1 - 1/t)^(gamma + 1)."""
    return (1 - 1 / (updates + 1)) ** (gamma + 1)


class Fit(NamedTuple):
    """weights: of the stored averages, float64 [K]. error: of the profile, relative to its norm."""

    weights: Tensor
    error: float


def fit(steps: Sequence[int], widths: Sequence[float], step: int, sigma_rel: float) -> Fit:
    """The sum of stored averages whose profile is nearest to that of `sigma_rel` at `step`.

    steps, widths: of the stored averages, K of each; those above `step` have weight 0.
    """
    times, gammas = list(steps), [exponent(width) for width in widths]
    used = [i for i, time in enumerate(times) if time <= step]
    norms = [_overlap(times[i], gammas[i], times[i], gammas[i]) ** 0.5 for i in used]
    goal, gamma = float(step), exponent(sigma_rel)
    size = _overlap(goal, gamma, goal, gamma) ** 0.5
    # Profiles of norm 1, which keeps the equations as well conditioned as they can be.
    matrix = [
        [_overlap(times[i], gammas[i], times[j], gammas[j]) / (norms[a] * norms[b])
         for b, j in enumerate(used)]
        for a, i in enumerate(used)
    ]  # fmt: skip
    right = [
        _overlap(times[i], gammas[i], goal, gamma) / (norms[a] * size) for a, i in enumerate(used)
    ]
    a = torch.tensor(matrix, dtype=torch.float64, device="cpu")
    b = torch.tensor(right, dtype=torch.float64, device="cpu")
    x = torch.linalg.lstsq(a, b[:, None], driver="gelsd").solution[:, 0]
    left = float(1 - 2 * x @ b + x @ a @ x)
    weights = torch.zeros(len(times), dtype=torch.float64, device="cpu")
    norm = torch.tensor(norms, dtype=torch.float64, device="cpu")
    weights[used] = x * size / norm
    return Fit(weights, math.sqrt(max(left, 0.0)))


def _overlap(t: float, gamma: float, s: float, delta: float) -> float:
    """The integral of the product of two profiles, that of gamma at t and that of delta at s."""
    least = min(t, s)
    return (
        (gamma + 1) * (delta + 1) / (gamma + delta + 1)
        * (least / t) ** gamma * (least / s) ** delta * least / (t * s)
    )  # fmt: skip


def store(out: Path, step: int, sigma_rel: float, tensors: Mapping[str, Tensor],
          metadata: Mapping[str, str]) -> None:  # fmt: skip
    """Writes one average of a step, a file that `load` reads, to OUT/averages."""
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step}-sigma_rel-{sigma_rel}.safetensors"
    write_whole(path, save(dict(tensors), dict(metadata)))


def drop_after(out: Path, step: int) -> None:
    """Removes averages of later steps than that from which a run goes on: it comes by them again."""
    for at, _, path in stored(out):
        if at > step:
            path.unlink()


def stored(out: Path) -> list[tuple[int, float, Path]]:
    """(step, sigma_rel, file) of every stored average of a run, in this order."""
    folder = out / FOLDER
    names = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [(match, path) for path in names if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), float(match[2]), path) for match, path in found)


def reconstruct_average(
    run: str | Path, out: str | Path, sigma_rel: float, step: int | None = None
) -> Fit:
    """Writes the network with the average of any relative width, from what a run has stored.

    Args:
        run: the folder of a run that was trained with ema_profile "power".
        out: the file to write; `load` (of a classifier `load_classifier`) reads it.
        sigma_rel: the width; those near to the stored ones are fitted best.
        step: at which the average ends; None for the last one that was stored.

    Returns:
        the weights of the stored averages, in the order of their files, and the fit's error.

    Raises:
        ValueError: sigma_rel is no width, or the run has stored nothing up to that step.
    """
    sigma_rel, step = plain((sigma_rel, step))
    found, gamma = stored(Path(run)), exponent(sigma_rel)
    last = max((at for at, _, _ in found), default=0)
    step = last if step is None else step
    if not found or not found[0][0] <= step <= last:
        have = f"from {found[0][0]} to {last}" if found else "none (it needs --ema-profile power)"
        raise ValueError(
            f"ema: step must be within the averages stored in {run}, {have}, got {step}"
        )
    result = fit([at for at, _, _ in found], [width for _, width, _ in found], step, sigma_rel)
    if result.error > _MUCH:
        warnings.warn(
            f"ema: the stored averages fit sigma_rel {sigma_rel} at step {step} to {result.error:.0%} only",
            stacklevel=2,
        )
    total: dict[str, Tensor] = {}
    for weight, (_, _, path) in zip(result.weights.tolist(), found, strict=True):
        if weight == 0:
            continue
        for name, value in load(path.read_bytes()).items():
            part = value.double() * weight
            total[name] = part if name not in total else total[name].add_(part)
    metadata = _described(found[-1][2], step, sigma_rel, gamma)
    write_whole(Path(out), save({name: value.float() for name, value in total.items()}, metadata))
    return result


def _described(path: Path, step: int, sigma_rel: float, gamma: float) -> dict[str, str]:
    """The metadata of a stored average, for another width and step."""
    with safe_open(path, framework="pt", device="cpu") as file:
        metadata = dict(file.metadata())
    extra = json.loads(metadata["extra"])
    images = extra["images"] * step // extra["step"]
    extra.update(step=step, images=images, sigma_rel=sigma_rel, ema_gamma=gamma)
    return {**metadata, "extra": json.dumps(extra)}

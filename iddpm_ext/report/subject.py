"""The model that a page is about, with its training run and data."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import iddpm_ext
from iddpm_ext.checkpoint.runs import is_run
from iddpm_ext.data import ImageData, open_data
from iddpm_ext.networks.unet import UNet
from iddpm_ext.report.elements import Missing


@dataclass(frozen=True)
class DataArguments:
    """Arguments of `open_data` for the data; path is None if there is none."""

    path: str | None = None
    classes: str = "auto"
    value_range: Sequence[float] | None = None
    alpha: str = "refuse"


@dataclass(frozen=True)
class Way:
    """Arguments of `sample` beside the number of steps. schedule: "pictures", or "" for even steps."""

    sampler: str
    variance: str | None = None
    schedule: str = ""

    @property
    def name(self) -> str:
        """For tables and charts."""
        words = [self.sampler, self.variance and f"{self.variance} variance"]
        words.append(self.schedule and f"steps for {self.schedule}")
        return ", ".join(word for word in words if word)

    @property
    def flags(self) -> str:
        """Of `iddpm sample`, without the number of steps."""
        return f"--sampler {self.sampler}" + (
            f" --variance {self.variance}" if self.variance else ""
        )

    def steps(self, count: int) -> int | str:
        """The `steps` of `sample`."""
        return f"{self.schedule}-{count}" if self.schedule else count

    def goes(self, extra: Mapping[str, Any], count: int, weights: str) -> bool:
        """Whether a checkpoint's `extra` has what it needs, of these weights (`weights_fingerprint`)."""
        stored = {"analytic": "moments", "optimal": "covariance"}.get(self.variance or "")
        if self.schedule and str(count) not in extra.get("picture_schedules", {}):
            return False
        return stored is None or extra.get(stored, {}).get("weights") == weights


@dataclass(frozen=True)
class Effort:
    """How much to measure: numbers of images, of steps and of network evaluations."""

    per_class: int
    most_classes: int
    sample_steps: tuple[int, ...]
    chain_steps: int
    nearest_of: int
    likelihood_images: int
    likelihood_budget: int
    cost_images: int
    ways: dict[Way, tuple[int, ...]]
    reference_images: int


QUICK = Effort(
    per_class=4, most_classes=10, sample_steps=(10, 50), chain_steps=40, nearest_of=5_000,
    likelihood_images=24, likelihood_budget=16, cost_images=32,
    ways={
        Way("unipc"): (5, 10), Way("unipc", schedule="pictures"): (5, 10), Way("ddim"): (10, 25),
        Way("dpm++sde"): (10, 25), Way("ddpm"): (10, 25, 50), Way("ddpm", "optimal"): (10, 25),
    },
    reference_images=256,
)  # fmt: skip
FULL = Effort(
    per_class=8, most_classes=20, sample_steps=(5, 10, 50, 250), chain_steps=100, nearest_of=60_000,
    likelihood_images=200, likelihood_budget=64, cost_images=256,
    ways={
        Way("unipc"): (5, 10, 25), Way("unipc", schedule="pictures"): (5, 10, 25),
        Way("dpm++"): (5, 10, 25), Way("dpm++sde"): (10, 25, 50), Way("ddim"): (5, 10, 25, 50, 100),
        Way("ddim", "analytic"): (10, 25, 50, 100), Way("ddpm"): (10, 25, 50, 100, 250),
        Way("ddpm", "analytic"): (10, 25, 50, 100), Way("ddpm", "optimal"): (10, 25, 50, 100),
    },
    reference_images=2_000,
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A loaded model. name: as the user gave it. run: the folder of its training run, if known."""

    name: str
    model: UNet
    run: Path | None
    data: DataArguments
    effort: Effort
    seed: int
    device: torch.device

    @property
    def word(self) -> str:
        """The name, quoted for a shell."""
        return shlex.quote(self.name)

    @property
    def class_names(self) -> list[str] | None:
        """One per class; numbers if the checkpoint has no names; None without classes."""
        count = self.model.config.num_classes
        if count is None:
            return None
        return list(self.model.extra.get("class_names") or map(str, range(count)))

    def require_sampling(self) -> None:
        """Raises Missing if images cannot be drawn from noise alone."""
        if self.model.diffusion is None:
            raise Missing("The checkpoint holds no diffusion process, so nothing can be drawn.")
        if self.model.config.super_resolution:
            raise Missing(
                "The network enlarges images: there is nothing to draw without a small one."
            )

    def open(self, split: str) -> ImageData:
        """The data's images as the network takes them. Raises Missing if there are none."""
        if self.data.path is None:
            raise Missing("This needs images: give them with --data.")
        opened = open_data(
            self.data.path, split=split, image_size=self.model.config.image_size,
            classes=self.data.classes, value_range=self.data.value_range, alpha=self.data.alpha,
        )  # fmt: skip
        config = self.model.config
        wanted = (config.in_channels, *config.size)
        if opened.image_shape != wanted:
            raise Missing(
                f"The images of {self.data.path} are {_size(opened.image_shape)}, the network's "
                f"{_size(wanted)}."
            )
        return opened

    def data_flags(self) -> str:
        """The flags of a command for the data."""
        data = self.data
        words = ["--data", str(data.path)]
        words += ["--classes", data.classes] if data.classes != "auto" else []
        words += ["--alpha", data.alpha] if data.alpha != "refuse" else []
        if data.value_range is not None:
            words.append("--value-range=" + ",".join(map(str, data.value_range)))
        return shlex.join(words)


def open_subject(
    name: str, data: DataArguments, effort: Effort, seed: int, device: torch.device
) -> Subject:
    """Loads a model; without `data`, that of its training run is used."""
    model = iddpm_ext.load(name).to(device)
    run = run_folder(Path(name))
    if data.path is None and run is not None:
        data = _data_of(run)
    return Subject(name, model, run, data, effort, seed, device)


def run_folder(path: Path) -> Path | None:
    """`path` or one of the two folders above it, if it is the folder of a run; else None."""
    if not path.is_dir() or not is_run(path):
        return None
    places = [
        folder
        for folder in (path, *path.resolve().parents[:2])
        if (folder / "metrics.jsonl").is_file()
    ]
    return places[0] if places else None


def _data_of(run: Path) -> DataArguments:
    """The data of the run, if it still exists."""
    try:
        config: dict[str, Any] = json.loads((run / "config.json").read_text())
        path = str(config["data"])
        if not Path(path).exists():
            return DataArguments()
        return DataArguments(
            path, str(config["classes"]), config["value_range"], str(config["alpha"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return DataArguments()


def _size(shape: Sequence[int]) -> str:
    channels, height, width = shape
    return f"{width}x{height} pixels with {channels} channel{'s' if channels > 1 else ''}"

"""The images of an evaluation: from files, tensors, or a model that is sampled."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import iddpm_ext
from iddpm_ext.checkpoint import bundled, is_model_folder, is_on_hub
from iddpm_ext.data import ImageData, match_classes, open_data
from iddpm_ext.data.classes import shown
from iddpm_ext.data.containers import Folder
from iddpm_ext.data.names import printable
from iddpm_ext.networks.foreign import unwrapped
from iddpm_ext.networks.unet import UNet
from iddpm_ext.sampling.loop import batches, network_of, run
from iddpm_ext.sampling.request import make_request
from iddpm_ext.sizes import ImageSize

_HALF_LEVEL = 1 / 255
Images = str | os.PathLike[str] | Tensor | UNet | ImageData | Iterable[Tensor]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in batches.

    what: a description. count: how many; None if unknown. size: (H, W) of every image. fingerprint: changes
    whenever the images could; empty if changes cannot be noticed.
    """

    what: str
    count: int | None
    size: tuple[int, int]
    fingerprint: str
    _batches: Iterator[Tensor]

    def __iter__(self) -> Iterator[Tensor]:
        """uint8 [N, 3, H, W]; grey images get three equal channels."""
        for images in self._batches:
            yield images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


@dataclass(frozen=True)
class Recipe:
    """How to sample a model: arguments of `iddpm_ext.sample`, for n images.

    classes: the classes, which take turns; None for all.
    """

    n: int = 10_000
    steps: Any = 50
    sampler: str = "ddpm"
    eta: float = 0.0
    variance: str | None = None
    guidance_scale: float = 1.0
    dtype: torch.dtype | None = None
    seed: int = 0
    classes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Reading:
    """How to open a path: arguments of `open_data`."""

    split: str = "train"
    image_size: ImageSize | None = None
    classes: str = "auto"
    value_range: tuple[float, ...] | None = None
    alpha: str = "refuse"


def is_checkpoint(name: object) -> bool:
    """Whether a name or file is one that `iddpm_ext.load` reads."""
    if not isinstance(name, (str, os.PathLike)):
        return False
    text = os.fspath(name)
    if text in bundled() or is_on_hub(text) or Path(text).suffix in (".safetensors", ".pt", ".pth"):
        return True
    return os.path.isdir(text) and is_model_folder(Path(text))


def is_model(images: object) -> bool:
    """Whether `images` will be sampled."""
    return isinstance(unwrapped(images), UNet) or is_checkpoint(images)


def open_source(argument: str, images: Images, reading: Reading, device: torch.device | str) -> Any:
    """The source of images: a model, opened data, a tensor or an iterable. Opens paths and checkpoints.

    Warns of what reading skips or changes.
    """
    if is_checkpoint(images):
        return iddpm_ext.load(cast(str, images), device)
    if isinstance(images, (str, os.PathLike)):
        data = open_data(
            os.fspath(images), split=reading.split, image_size=reading.image_size, bad_images="stop",
            classes=reading.classes, value_range=reading.value_range, alpha=reading.alpha,
        )  # fmt: skip
        for note in data.notes:
            warnings.warn(f"evaluate: {argument}: {note}", stacklevel=3)
        return data
    if isinstance(images, (Tensor, Iterable)) or is_model(images) or _is_data(images):
        return images
    raise TypeError(
        f"evaluate: {argument} must be a path, a tensor, a UNet or batches of tensors, "
        f"got {type(images).__name__}"
    )


def open_images(
    argument: str,
    images: Images,
    source: Any,
    *,
    n: int | None,
    batch_size: int,
    recipe: Recipe,
    reading: Reading,
) -> ImageSet:
    """The first n images, or all, of a source that `open_source` returned; n new ones of a model.

    Floating images are in [-1, 1] and rounded to 256 levels, as in files; uint8 ones are taken as they are.
    """
    path = os.fspath(images) if isinstance(images, (str, os.PathLike)) else None
    if isinstance(unwrapped(source), UNet):
        return _sampled(source, recipe, batch_size, Path(path).name if path else "a UNet")
    if isinstance(source, Tensor):
        _check(argument, source)
        chosen = source.detach()[:n]
        meaning = _Meaning(argument)
        meaning.add(chosen)
        meaning.require()
        digest = hashlib.sha256(
            chosen.cpu().contiguous().view(torch.uint8).numpy().data
        ).hexdigest()
        parts = map(_levels, chosen.split(batch_size))
        fingerprint = f"{chosen.dtype} {list(chosen.shape)} {digest}"
        return ImageSet("a tensor", len(chosen), _size(chosen), fingerprint, iter(parts))
    if path is not None:
        fingerprint = "" if path.startswith("hf:") else f"{_files(Path(path))} {reading}"
        return _read(
            source, n, batch_size, f"{printable(Path(path).name)} ({reading.split})", fingerprint
        )
    if _is_data(source):
        return _read(source, n, batch_size, type(source).__name__, "")
    batches = iter(source)
    first = next(batches, None)
    if first is None:
        raise ValueError(f"evaluate: {argument} must have at least 2 images, got 0")
    _check(argument, first)
    return ImageSet("batches", None, _size(first), "", _checked(argument, first, batches, n))


def model_classes(
    argument: str, model: UNet, data: object, name: str
) -> tuple[tuple[int, ...] | None, str]:
    """The classes of `model` that occur in the data, by name, and a description; None for all.

    data: the other set; without classes, all of the model's are taken.
    """
    classes = model.config.num_classes
    if classes is None or not _is_data(data):
        return None, ""
    data = cast(ImageData, data)
    labels = data.labels(torch.arange(len(data), dtype=torch.int64, device="cpu"))
    if labels is None or data.class_names is None:
        return None, ""
    used = labels.unique().tolist()
    names = model.extra.get("class_names")
    try:
        found = match_classes("evaluate", data.class_names, used, names, classes)[used]
    except ValueError as error:
        reason = str(error).removeprefix("evaluate: data must ")
        raise ValueError(
            f"evaluate: {argument} must {reason.removesuffix('rename them, or give labels')}"
            f"rename them, or let classes be 'none', for the samples of {name}"
        ) from None
    chosen = tuple(sorted(found.tolist()))
    if len(chosen) == classes:
        return None, ""
    words = [names[i] if names else str(i) for i in chosen]
    return chosen, f", classes {shown(words)}"


def _is_data(images: object) -> bool:
    return hasattr(images, "images") and hasattr(images, "image_shape")


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[2], images.shape[3]


def _sampled(model: nn.Module, recipe: Recipe, batch_size: int, name: str) -> ImageSet:
    classes, labels = unwrapped(model).config.num_classes, None
    if classes is not None:
        turns = torch.tensor(recipe.classes or range(classes), dtype=torch.int64, device="cpu")
        labels = turns[torch.arange(recipe.n, dtype=torch.int64, device="cpu") % len(turns)]
    request = make_request(
        "evaluate", model, recipe.steps, n=recipe.n, sampler=recipe.sampler, eta=recipe.eta,
        variance=recipe.variance, labels=labels, guidance_scale=recipe.guidance_scale, seed=recipe.seed,
        batch_size=batch_size, dtype=recipe.dtype, progress=False,
    )  # fmt: skip
    network = network_of(request)
    # Image i is that of one call of `sample`, though batches are drawn on demand.
    parts = batches(request.n, request.batch_size)
    drawn = (_levels(run(request, [images], network=network)) for images in parts)
    how = [recipe.sampler, *([f"{recipe.variance} variance"] if recipe.variance else [])]
    how += [] if recipe.dtype is None else [str(recipe.dtype).removeprefix("torch.")]
    what = f"{recipe.n} samples of {name} ({', '.join(how)}, {recipe.steps} steps)"
    _, height, width = request.spec.image_shape
    return ImageSet(what, recipe.n, (height, width), "", drawn)


def _read(data: ImageData, n: int | None, batch_size: int, what: str, fingerprint: str) -> ImageSet:
    count = len(data) if n is None else min(n, len(data))
    # In a fixed random order, since files are sorted by class.
    generator = torch.Generator(device="cpu").manual_seed(0)
    order = torch.randperm(len(data), generator=generator, dtype=torch.int64, device="cpu")[:count]
    parts = (_levels(data.images(part.sort().values)[0]) for part in order.split(batch_size))
    if fingerprint:
        fingerprint += f" {what} {count} of {len(data)} {data.image_shape}"
    _, height, width = data.image_shape
    return ImageSet(what, count, (height, width), fingerprint, parts)


def _checked(
    argument: str, first: Tensor, rest: Iterator[Tensor], n: int | None
) -> Iterator[Tensor]:
    left, meaning = n, _Meaning(argument)
    for images in itertools.chain([first], rest):
        _check(argument, images)
        if _size(images) != _size(first):
            raise ValueError(
                f"evaluate: {argument} must have one size, got {list(first.shape)} and {list(images.shape)}"
            )
        if left is not None:
            images = images[:left]
            left -= len(images)
        if len(images):
            meaning.add(images)
            yield _levels(images)
        if left == 0:
            break
    meaning.require()


class _Meaning:
    """Checks, over several tensors, that floating images are clearly in [-1, 1]."""

    def __init__(self, argument: str):
        self._argument = argument
        self._floating = False
        self._low, self._high = math.inf, -math.inf

    def add(self, images: Tensor) -> None:
        """Refuses images that are not finite, or outside [-1, 1] by more than the rounding of a level."""
        if images.dtype == torch.uint8:
            return
        low, high = float(images.min()), float(images.max())
        self._floating = True
        self._low, self._high = min(self._low, low), max(self._high, high)
        if not (low > -1 - _HALF_LEVEL and high < 1 + _HALF_LEVEL):
            raise ValueError(
                f"evaluate: {self._argument} must be floating in [-1, 1] or uint8, got {images.dtype} "
                f"between {low:g} and {high:g}: images / 127.5 - 1 of 0 .. 255, clamp(-1, 1) where an "
                "image goes beyond"
            )

    def require(self) -> None:
        """Refuses images without a value below 0, which could be in [0, 1]."""
        if self._floating and self._low >= 0:
            raise ValueError(
                f"evaluate: {self._argument} must be floating in [-1, 1] or uint8, got values from "
                f"{self._low:g} to {self._high:g} only: 2 * images - 1 of [0, 1], or "
                "((images + 1) * 127.5).round().byte() if they are in [-1, 1] as they are"
            )


def _check(argument: str, images: object) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"evaluate: {argument} must give tensors, got {type(images).__name__}")
    if images.dim() != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"evaluate: {argument} must be [N, C, H, W] with C of 1 or 3, got {list(images.shape)}"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"evaluate: {argument} must be floating or uint8, got {images.dtype}")


def _levels(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] on the CPU, from levels or from values in [-1, 1]."""
    if images.dtype == torch.uint8:
        return images.cpu()
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().cpu()


def _files(path: Path) -> str:
    """Names, sizes and times of the files at a path, which change with the images."""
    files = Folder(path).survey().files if path.is_dir() else [""]
    digest = hashlib.sha256()
    for name in files:
        file = path / name if name else path
        if file.is_file():
            state = file.stat()
            digest.update(os.fsencode(f"{name} {state.st_size} {state.st_mtime_ns}\n"))
    return digest.hexdigest()

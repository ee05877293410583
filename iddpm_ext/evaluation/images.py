"""Where the images of an evaluation come from: files, tensors, or a model while it samples."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import iddpm_ext
from iddpm_ext.checkpoint import bundled
from iddpm_ext.data import ImageData, open_data
from iddpm_ext.networks.unet import UNet
from iddpm_ext.sampling.loop import batches, network_of, run
from iddpm_ext.sampling.request import make_request

Images = str | os.PathLike[str] | Tensor | UNet | ImageData | Iterable[Tensor]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in batches.

    what: for people. count: how many; None if only the end will tell.
    fingerprint: changes whenever the images could; empty where that cannot be told.
    """

    what: str
    count: int | None
    fingerprint: str
    _batches: Iterator[Tensor]

    def __iter__(self) -> Iterator[Tensor]:
        """uint8 [N, 3, H, W]; grey images get three equal channels."""
        for images in self._batches:
            yield images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


@dataclass(frozen=True)
class Recipe:
    """How a model samples: the arguments of `iddpm_ext.sample`, n of them images."""

    n: int = 10_000
    steps: Any = 50
    sampler: str = "ddpm"
    eta: float = 0.0
    guidance_scale: float = 1.0
    seed: int = 0


def is_checkpoint(name: object) -> bool:
    """Whether a name or file is one that `iddpm_ext.load` reads."""
    if not isinstance(name, (str, os.PathLike)):
        return False
    text = os.fspath(name)
    return text in bundled() or Path(text).suffix in (".safetensors", ".pt")


def open_images(
    argument: str,
    images: Images,
    *,
    n: int | None,
    split: str,
    batch_size: int,
    recipe: Recipe,
    device: torch.device | str = "cpu",
) -> ImageSet:
    """The first n images of anything that has images, or all; of a model, n new ones.

    Floating images are in [-1, 1] and are rounded to the 256 levels that files have; uint8 ones
    are taken as they are. Classes of a class-conditional model take turns.
    """
    if is_checkpoint(images):
        name = cast(str, images)
        return _sampled(iddpm_ext.load(name, device), recipe, batch_size, Path(name).name)
    if isinstance(images, UNet):
        return _sampled(images, recipe, batch_size, "a UNet")
    if isinstance(images, Tensor):
        _check(argument, images)
        chosen = images[:n]
        digest = hashlib.sha256(chosen.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        parts = map(_levels, chosen.split(batch_size))
        return ImageSet("a tensor", len(chosen), f"{list(chosen.shape)} {digest}", iter(parts))
    if isinstance(images, (str, os.PathLike)):
        data = open_data(Path(images), split=split, bad_images="stop")
        return _read(data, n, batch_size, f"{Path(images).name} ({split})", _files(Path(images)))
    if hasattr(images, "images") and hasattr(images, "image_shape"):
        return _read(cast(ImageData, images), n, batch_size, type(images).__name__, "")
    if not isinstance(images, Iterable):
        raise TypeError(
            f"evaluate: {argument} must be a path, a tensor, a UNet or batches of tensors, "
            f"got {type(images).__name__}"
        )
    return ImageSet("batches", None, "", _checked(argument, images, n))


def _sampled(model: UNet, recipe: Recipe, batch_size: int, name: str) -> ImageSet:
    classes = model.config.num_classes
    labels = (
        None
        if classes is None
        else torch.arange(recipe.n, dtype=torch.int64, device="cpu") % classes
    )
    request = make_request(
        "evaluate", model, recipe.steps, n=recipe.n, sampler=recipe.sampler, eta=recipe.eta,
        labels=labels, guidance_scale=recipe.guidance_scale, seed=recipe.seed,
        batch_size=batch_size, progress=False,
    )  # fmt: skip
    network = network_of(request)
    # Image i is the i-th of one call of `sample`, though a batch is drawn when it is asked for.
    parts = batches(request.n, request.batch_size)
    drawn = (_levels(run(request, [images], network=network)) for images in parts)
    what = f"{recipe.n} samples of {name} ({recipe.sampler}, {recipe.steps} steps)"
    return ImageSet(what, recipe.n, "", drawn)


def _read(data: ImageData, n: int | None, batch_size: int, what: str, fingerprint: str) -> ImageSet:
    count = len(data) if n is None else min(n, len(data))
    # In a random order, the same each time: files are sorted by class.
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count]
    parts = (_levels(data.images(part.sort().values)[0]) for part in order.split(batch_size))
    if fingerprint:
        fingerprint += f" {what} {count} of {len(data)} {data.image_shape}"
    return ImageSet(what, count, fingerprint, parts)


def _checked(argument: str, batches: Iterable[Tensor], n: int | None) -> Iterator[Tensor]:
    left = n
    for images in batches:
        _check(argument, images)
        if left is not None:
            images = images[:left]
            left -= len(images)
        if len(images):
            yield _levels(images)
        if left == 0:
            return


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
    """uint8 [N, C, H, W] on the CPU."""
    if images.dtype == torch.uint8:
        return images.cpu()
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


def _files(path: Path) -> str:
    """Names, sizes and times of the files at a path: what a change of the images would change."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            state = file.stat()
            digest.update(
                f"{file.relative_to(path)} {state.st_size} {state.st_mtime_ns}\n".encode()
            )
    return digest.hexdigest()

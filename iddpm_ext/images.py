"""Writes images: as a grid, a folder, an array or an animation, each with the recipe that made it.

A pixel p in [-1, 1] becomes the level round((p + 1) * 127.5), ties to even, so that the 256 levels of
training data are reproduced. (The original code truncates, which darkens images by half a level on average.)
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import iddpm_ext
from iddpm_ext.files import replacing, temporary_name
from iddpm_ext.scalars import plain

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ANIMATIONS = (".webp", ".gif")
_TEXT_KEY = "iddpm_ext"
_EXIF_DESCRIPTION = 0x010E
_FONT_SIZE = 11
_CAPTION_HEIGHT = 14
_GAP = 2


def save_images(
    x: Tensor,
    path: str | os.PathLike[str],
    *,
    recipe: Mapping[str, Any] | None = None,
    labels: Sequence[int] | Tensor | None = None,
    class_names: Sequence[str] | None = None,
    columns: int | None = None,
    scale: int | None = None,
) -> Path:
    """Writes images as one grid (.png), as arrays (.npz) or as a folder of PNGs (no suffix).

    Files are written atomically. Each PNG contains its recipe, which `read_recipe` reads.

    Args:
        x: floating [N, C, H, W]; values outside [-1, 1] are clipped. PNGs need C = 1, 3 or 4.
        path: what to write. An .npz has arr_0, uint8 [N, H, W, C], and with labels arr_1, int64
            [N]; a folder is created if absent and gets 000000.png and so on.
        recipe: what made the images, JSON-ready (checkpoint, seed, steps, sampler, ...). The version and
            the image's index (in a grid: the count n) are added.
        labels: integers [N], -1 for none.
        class_names: one per class; a grid of labelled images shows the name above each.
        columns: of a grid; its square root if None.
        scale: output pixels per image pixel in a grid; as large as the captions need if None.

    Returns:
        the path.

    Raises:
        TypeError, ValueError: for an argument of a wrong type, shape or value.
        OSError: if the path cannot be written.
    """
    recipe, columns, scale = plain((recipe, columns, scale))
    target = check_writable(path)
    levels = _levels("save_images", "x", x)
    numbers = _checked_labels(labels, len(levels), class_names)
    _check_count("columns", columns)
    _check_count("scale", scale)
    if target.suffix == ".npz" and not target.is_dir():
        arrays = [levels] if numbers is None else [levels, np.array(numbers, dtype=np.int64)]
        with _replacing("save_images", target) as file, open(file, "wb") as stream:
            np.savez(stream, *arrays)
        return target
    _require_mode("save_images", levels)
    known = {**(recipe or {}), "version": iddpm_ext.__version__}
    names = None if numbers is None else [_name(label, class_names) for label in numbers]
    if target.suffix == ".png" and not target.is_dir():
        whole = {**known, "n": len(levels)}
        if numbers is not None:
            whole["labels"] = numbers
        captions = names if class_names is not None else None
        grid = _grid(levels, columns, scale, captions)
        with _replacing("save_images", target) as file:
            grid.save(file, format="PNG", pnginfo=_text(whole), optimize=True)
        return target
    first = int(known.get("index", 0))
    with _replacing_files("save_images", target) as folder:
        for i, image in enumerate(levels):
            own = {**known, "index": first + i}
            if numbers is not None and names is not None:
                own.update(label=numbers[i], class_name=names[i])
            _image(image).save(folder / f"{first + i:06d}.png", pnginfo=_text(own))
    return target


def save_animation(
    frames: Iterable[Tensor],
    path: str | os.PathLike[str],
    *,
    recipe: Mapping[str, Any] | None = None,
    columns: int | None = None,
    scale: int | None = None,
    frame_ms: int = 60,
    last_ms: int = 1500,
) -> Path:
    """Writes batches of images, such as the x of every `SampleStep`, as an animation of grids.

    Args:
        frames: floating tensors [N, C, H, W], all of one shape; clipped to [-1, 1].
        path: a .webp or .gif file.
        recipe, columns, scale: as in `save_images`.
        frame_ms, last_ms: duration of a frame, and of the last one, in milliseconds.

    Returns:
        the path.

    Raises:
        TypeError, ValueError, OSError: as `save_images`.
    """
    recipe, columns, scale, frame_ms, last_ms = plain((recipe, columns, scale, frame_ms, last_ms))
    target = check_writable(path, suffixes=_ANIMATIONS)
    for name, value in (
        ("columns", columns), ("scale", scale), ("frame_ms", frame_ms), ("last_ms", last_ms),
    ):  # fmt: skip
        _check_count(name, value, "save_animation")
    grids = []
    for frame in frames:
        levels = _levels("save_animation", "frames", frame)
        _require_mode("save_animation", levels)
        grids.append(_grid(levels, columns, scale, None))
    if not grids:
        raise ValueError("save_animation: frames must not be empty, got none")
    if len({grid.size for grid in grids}) > 1:
        raise ValueError(
            f"save_animation: frames must have one shape, got grids of {grids[0].size} and others"
        )
    text = _json({**(recipe or {}), "version": iddpm_ext.__version__})
    options: dict[str, Any] = {"comment": text.encode()}
    if target.suffix == ".webp":
        exif = Image.Exif()
        exif[_EXIF_DESCRIPTION] = text
        options = {"exif": exif.tobytes(), "lossless": True}
    with _replacing("save_animation", target) as file:
        grids[0].save(
            file,
            format=target.suffix[1:].upper(),
            save_all=True,
            append_images=grids[1:],
            duration=[frame_ms] * (len(grids) - 1) + [last_ms],
            loop=0,
            **options,
        )
    return target


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe in a file that `save_images` or `save_animation` wrote; ValueError if it has none."""
    with Image.open(path) as image:
        found = image.info.get(_TEXT_KEY) or image.info.get("comment")
        found = found or image.getexif().get(_EXIF_DESCRIPTION)
    try:
        recipe = json.loads(found or "")
    except ValueError:
        recipe = None
    if not isinstance(recipe, dict):
        raise ValueError(f"read_recipe: path must be an image with a recipe, got {str(path)!r}")
    return recipe


def check_writable(
    path: str | os.PathLike[str], *, suffixes: Sequence[str] = (".png", ".npz", "")
) -> Path:
    """The path, if files with these suffixes ("" for a folder) can be written there.

    For checks before long work. Raises ValueError for another suffix and OSError if writing is impossible;
    creates nothing.
    """
    target = Path(path)
    function = "save_animation" if tuple(suffixes) == _ANIMATIONS else "save_images"
    is_folder = "" in suffixes and (target.is_dir() or not target.suffix)
    if not is_folder and target.suffix not in suffixes:
        kinds = ", ".join(s or "no suffix (a folder)" for s in suffixes)
        raise ValueError(f"{function}: path must end in one of {kinds}, got {str(path)!r}")
    if not is_folder and target.is_dir():
        raise IsADirectoryError(f"{function}: path must be a file, got the folder {str(path)!r}")
    if is_folder and target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{function}: path must be a folder, got the file {str(path)!r}")
    parent = target if is_folder and target.is_dir() else target.parent
    if not parent.is_dir():
        raise FileNotFoundError(
            f"{function}: path must be in a folder that exists, got {str(path)!r}"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{function}: path must be writable, got {str(path)!r}")
    return target


def _levels(function: str, name: str, x: Tensor) -> np.ndarray:
    """Floating [N, C, H, W] -> uint8 [N, H, W, C]."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{function}: {name} must be a floating tensor, got {got}")
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"{function}: {name} must be [N, C, H, W], got {list(x.shape)}")
    x = x.detach().to("cpu", torch.promote_types(x.dtype, torch.float32))
    if not bool(x.isfinite().all()):
        at = (~x.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{function}: {name} must be finite, got {float(x[tuple(at)])} at {at}")
    levels = ((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().numpy()


def _require_mode(function: str, levels: np.ndarray) -> None:
    if levels.shape[3] not in _MODES:
        raise ValueError(f"{function}: x must have 1, 3 or 4 channels, got {levels.shape[3]}")


def _checked_labels(
    labels: Sequence[int] | Tensor | None, n: int, class_names: Sequence[str] | None
) -> list[int] | None:
    if labels is None:
        return None
    values = labels if isinstance(labels, Tensor) else torch.from_numpy(np.asarray(labels))
    if values.is_floating_point() or values.shape != (n,):
        raise ValueError(
            f"save_images: labels must be integers [{n}], got {values.dtype} {list(values.shape)}"
        )
    numbers = [int(value) for value in values.tolist()]
    if class_names is not None and max(numbers) >= len(class_names):
        raise ValueError(
            f"save_images: class_names must name class {max(numbers)}, got {len(class_names)} names"
        )
    return numbers


def _check_count(name: str, value: int | None, function: str = "save_images") -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{function}: {name} must be an int above 0, got {value!r}")


def _name(label: int, class_names: Sequence[str] | None) -> str:
    if label < 0:
        return "unlabelled"
    return str(label) if class_names is None else class_names[label]


def _grid(
    levels: np.ndarray, columns: int | None, scale: int | None, captions: Sequence[str] | None
) -> Image.Image:
    """A grid of images uint8 [N, H, W, C], row by row, each under its caption if there are any."""
    n, height, width, channels = levels.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    font = ImageFont.load_default(_FONT_SIZE) if captions else None
    if scale is None:
        widest = max(font.getlength(text) for text in captions) if captions and font else 0
        scale = max(1, math.ceil(widest / width))
    above = _CAPTION_HEIGHT if captions else 0
    cell = (width * scale + _GAP, height * scale + _GAP + above)
    rows = math.ceil(n / columns)
    white = 255 if channels == 1 else (255,) * channels
    grid = Image.new(_MODES[channels], (columns * cell[0] + _GAP, rows * cell[1] + _GAP), white)
    draw = ImageDraw.Draw(grid)
    for i, image in enumerate(levels):
        left, top = _GAP + i % columns * cell[0], _GAP + i // columns * cell[1]
        picture = _image(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        grid.paste(picture, (left, top + above))
        if captions:
            black = 0 if channels == 1 else (0, 0, 0, 255)[:channels]
            middle = (left + width * scale / 2, top + above / 2)
            draw.text(middle, captions[i], fill=black, font=font, anchor="mm")
    return grid


def _image(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)


def _text(recipe: Mapping[str, Any]) -> PngInfo:
    info = PngInfo()
    info.add_text(_TEXT_KEY, _json(recipe))
    return info


def _json(recipe: Mapping[str, Any]) -> str:
    return json.dumps(recipe, sort_keys=True)


@contextlib.contextmanager
def _replacing(function: str, target: Path) -> Iterator[Path]:
    """A context with a temporary file, which replaces the target when it is complete."""
    try:
        with replacing(target) as temporary:
            yield temporary
    except OSError as error:
        raise _unwritable(function, target, error) from error


@contextlib.contextmanager
def _replacing_files(function: str, target: Path) -> Iterator[Path]:
    """A context with a temporary folder, whose files move into the target when all are complete."""
    temporary = temporary_name(target)
    try:
        temporary.mkdir()
        yield temporary
        target.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir()):
            os.replace(file, target / file.name)
    except OSError as error:
        raise _unwritable(function, target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unwritable(function: str, target: Path, error: OSError) -> OSError:
    reason = error.strerror or str(error)
    return type(error)(f"{function}: path must be writable, got {str(target)!r} ({reason})")

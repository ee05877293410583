"""Images embedded in the page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

_GAP = 2
# Larger images are reduced and compressed lossily, so that a page of a few hundred stays below 5 MB.
_LARGEST = 128
_LOSSLESS_UP_TO = 64
_SHOWN_SIDE = 56  # smaller images are enlarged by a whole factor
_TALLEST = 16_000  # pixels, limited by WebP


def strip(x: Tensor, columns: int | None = None) -> tuple[str, int]:
    """Images [N, C, H, W] in [-1, 1] in one picture: its data: URL, and the width to show it at."""
    lossy = max(x.shape[2:]) > _LOSSLESS_UP_TO
    picture = _grid(_reduced(x, _LARGEST), columns or len(x))
    shown = max(1.0, _SHOWN_SIDE / min(x.shape[3], _LARGEST))
    return _address(picture, lossy=lossy), round(picture.width * shown)


def film(frames: Sequence[Tensor], columns: int) -> tuple[str, int, int]:
    """Batches [N, C, H, W], one below the other: data: URL, width and height of a frame."""
    grids = [_grid(_reduced(frame, _LOSSLESS_UP_TO), columns) for frame in frames]
    width, height = grids[0].size
    if height * len(grids) > _TALLEST:
        raise ValueError(f"film: frames must fit {_TALLEST} pixels, got {len(grids)} of {height}")
    whole = Image.new(grids[0].mode, (width, height * len(grids)))
    for i, grid in enumerate(grids):
        whole.paste(grid, (0, i * height))
    return _address(whole, lossy=True), width, height


def _reduced(x: Tensor, side: int) -> Tensor:
    x = x.detach().float().cpu()
    factor = side / max(x.shape[2:])
    if factor >= 1:
        return x
    size = [max(1, round(s * factor)) for s in x.shape[2:]]
    return F.interpolate(x, size, mode="bilinear", antialias=True)


def _grid(x: Tensor, columns: int) -> Image.Image:
    n, _, height, width = x.shape
    if x.shape[1] not in (1, 3):
        x = x[:, :1]  # the first of other numbers of channels
    levels = ((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    cell, rows = (height + _GAP, width + _GAP), math.ceil(n / columns)
    shape = (rows * cell[0] - _GAP, columns * cell[1] - _GAP, levels.shape[3])
    canvas = torch.full(shape, 128, dtype=torch.uint8, device="cpu")
    for i, image in enumerate(levels):
        top, left = i // columns * cell[0], i % columns * cell[1]
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas.squeeze(2).numpy())


def _address(picture: Image.Image, *, lossy: bool) -> str:
    data = io.BytesIO()
    if lossy:
        picture.convert("RGB").save(data, format="WEBP", quality=80, method=4)
    else:
        picture.save(data, format="PNG", optimize=True)
    kind = "webp" if lossy else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"

"""From the bytes of one image file to the square of float32 values that a network sees."""

from __future__ import annotations

import io
import math
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# More pixels than this are taken for a decompression bomb; Pillow only warns until twice its own limit.
MAX_PIXELS = 100_000_000
_GREY = ("1", "L", "LA", "La")
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


class BadImage(ValueError):
    """An image that cannot be used; the message says which and why."""


def open_image(data: bytes | BinaryIO, name: str) -> Image.Image:
    """The first frame of an image file, complete and upright (EXIF orientation applied).

    name: for the message of BadImage, which is raised when the file is empty, truncated, of no known format,
    or claims more than MAX_PIXELS pixels.
    """
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(file)
            if math.prod(image.size) > MAX_PIXELS:
                raise BadImage(
                    f"{name}: must have at most {MAX_PIXELS} pixels, got {image.width}x{image.height}"
                )
            image.load()
            return ImageOps.exif_transpose(image)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(
            f"{name}: must have at most {MAX_PIXELS} pixels, got a decompression bomb"
        ) from error
    except UnidentifiedImageError as error:
        raise BadImage(f"{name}: must be an image, got a file of no known format") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise BadImage(f"{name}: must be a complete image, got {error}") from error
    except (
        Exception
    ) as error:  # Pillow's decoders raise struct.error, IndexError and more on damage
        raise BadImage(f"{name}: must be decodable, got {type(error).__name__}: {error}") from error


def is_grey(image: Image.Image) -> bool:
    """Whether the file stores one channel, alpha apart."""
    return image.mode in _GREY or image.mode in _DEEP


def bit_depth(image: Image.Image) -> int:
    """Bits a channel of the file, as far as Pillow keeps them: 1, 8, 16 or 32."""
    return {"1": 1, "F": 32}.get(image.mode, 16 if image.mode in _DEEP else 8)


def to_array(image: Image.Image, channels: int, size: int | None) -> np.ndarray:
    """float32 [H, W, channels] in [-1, 1]; with `size`, resized and cropped to that square.

    16-bit values keep their precision (65535 becomes 1); an alpha channel is dropped, as in the original.
    """
    if image.mode in _DEEP:
        # "I" is how Pillow gives 16-bit files of some formats; its values are still 0..65535.
        values = np.asarray(image, dtype=np.float32)
        full = 1.0 if image.mode == "F" else 65535.0
        plane = Image.fromarray(values)
        plane = plane if size is None else fit(plane, size)
        unit = np.clip(np.asarray(plane), 0.0, full) / np.float32(full / 2) - 1
        return np.repeat(unit[..., None], channels, axis=2)
    image = image.convert("L" if channels == 1 else "RGB")
    image = image if size is None else fit(image, size)
    levels = np.asarray(image, dtype=np.float32)
    return levels.reshape(*levels.shape[:2], channels) / np.float32(127.5) - 1


def fit(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square of `image`, brought to `size` x `size`, as the original does it.

    Halved by averaging while the shorter side is at least twice the goal, then bicubic so that the shorter
    side fits, then cropped in the middle. Source: improved-diffusion's image_datasets.py.
    """
    if image.size == (size, size):
        return image
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))

"""Decodes one image file to the square of float32 values that a network takes."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .values import Range, choose_range, to_signed_unit

# Larger images are taken for decompression bombs; Pillow itself only warns up to twice its own limit.
MAX_PIXELS = 100_000_000
# The least part of the shorter side that a random crop shows.
_LEAST_CROP = 0.8
ALPHA = ("refuse", "drop", "black", "white")
# Without formats whose decoders start another program, such as PostScript.
_FORMATS = (
    "PNG", "JPEG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF",
)  # fmt: skip
_GREY = ("1", "L", "LA", "La")
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


class BadImage(ValueError):
    """An image that cannot be used; the message says which and why."""


class UnclearImage(BadImage):
    """An ambiguous image; the message says how to resolve the ambiguity."""


class Reading(NamedTuple):
    """How to interpret images whose files are ambiguous.

    value_range: black and white of images of more than 8 bits, or of 8-bit masks of 0 and 1; None for
    0 .. 65535 of 16 bits. alpha: handling of transparent pixels, one of ALPHA: "drop" keeps their colours,
    "black" and "white" composite the image over that colour.
    """

    value_range: Range | None = None
    alpha: str = "refuse"


def open_image(data: bytes | BinaryIO, name: str) -> Image.Image:
    """The first frame of an image file, complete and upright (EXIF orientation applied).

    name: for the message of BadImage, which is raised if the file is empty, truncated, of no known format,
    or has more than MAX_PIXELS pixels.
    """
    return look_at(data, name)[0]


def look_at(data: bytes | BinaryIO, name: str) -> tuple[Image.Image, list[str]]:
    """The image as `open_image` returns it, and messages on what reading ignores or changes."""
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    Image.init()
    formats = [kind for kind in _FORMATS if kind in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(file, formats=formats)
            if math.prod(image.size) > MAX_PIXELS:
                raise BadImage(
                    f"{name}: must have at most {MAX_PIXELS} pixels, got {image.width}x{image.height}"
                )
            # The second image of a photograph (MPO) is its preview.
            moving = getattr(image, "is_animated", False) and image.format != "MPO"
            shortened = ";16" in str(image.tile) and image.mode not in _DEEP
            image.load()
            upright = ImageOps.exif_transpose(image)
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
    traits = ["only the first of several frames is read"] if moving else []
    if image.getexif().get(0x0112, 1) != 1:
        traits.append("turned upright, as EXIF says")
    if shortened:
        traits.append("16 bits a channel of colour are read as 8, as Pillow does it")
    if upright.mode == "CMYK":
        traits.append("CMYK is converted to RGB without a colour profile")
    if upright.mode == "P":
        traits.append("palettes are read as colour")
    return upright, traits


def is_grey(image: Image.Image) -> bool:
    """Whether the file stores one channel, alpha apart."""
    return image.mode in _GREY or image.mode in _DEEP


def is_deep(image: Image.Image) -> bool:
    """Whether the file's values are of 16 bits, or floating."""
    return image.mode in _DEEP


def bit_depth(image: Image.Image) -> int:
    """Bits per channel of the file, as far as Pillow keeps them: 1, 8, 16 or 32."""
    return {"1": 1, "F": 32}.get(image.mode, 16 if image.mode in _DEEP else 8)


def is_transparent(image: Image.Image) -> bool:
    """Whether any pixel is not opaque."""
    if not image.has_transparency_data:
        return False
    return int(np.asarray(image.convert("RGBA").getchannel("A")).min()) < 255


def deep_values(image: Image.Image) -> np.ndarray:
    """[H, W] of an image with `is_deep`: uint16 if the values fit, else of the file's type."""
    values = np.asarray(image)
    if values.dtype.kind == "f":
        return values
    fits = values.min() >= 0 and values.max() <= 65535
    return values.astype(np.uint16 if fits else np.int32)


def to_array(
    image: Image.Image,
    channels: int,
    size: tuple[int, int] | None,
    reading: Reading | None = None,
    name: str = "image",
    crop: Sequence[float] | None = None,
) -> np.ndarray:
    """float32 [H, W, channels] in [-1, 1]; with `size`, resized and cropped to that height
    and width.

    16-bit values keep their precision (65535 becomes 1). name: for the message of BadImage, raised for
    values outside the range of `reading`, and of UnclearImage, raised if `reading` must be more specific.
    crop: three numbers in [0, 1) for `random_crop`; None crops at the centre.
    """
    reading = Reading() if reading is None else reading
    if image.mode in _DEEP:
        unit = _deep_unit(image, reading, name)
        if size is not None:
            unit = np.clip(np.asarray(_fitted(Image.fromarray(unit), size, name, crop)), -1, 1)
        return np.repeat(unit[..., None], channels, axis=2)
    image = _opaque(image, reading.alpha, name)
    one_bit = image.mode == "1"
    try:
        image = image.convert("L" if channels == 1 else "RGB")
    except ValueError as error:
        raise BadImage(f"{name}: must have a colour space of screens, got {error}") from error
    if reading.value_range is not None and not one_bit:
        unit = _unit(np.asarray(image), reading.value_range, name)
        image = Image.fromarray(np.round((unit + 1) * np.float32(127.5)).astype(np.uint8))
    image = image if size is None else _fitted(image, size, name, crop)
    levels = np.asarray(image, dtype=np.float32)
    return levels.reshape(*levels.shape[:2], channels) / np.float32(127.5) - 1


def _deep_unit(image: Image.Image, reading: Reading, name: str) -> np.ndarray:
    if image.has_transparency_data and reading.alpha != "drop":
        raise UnclearImage(f"{name}: must be without transparency where it has 16 bits, got some")
    values, given = deep_values(image), reading.value_range
    # Whether all 16 bits are used is decided over many images, not here.
    if given is None and values.dtype == np.uint16:
        given = (0.0, 65535.0)
    if given is None and values.dtype.kind == "f":
        raise UnclearImage(
            f"{name}: must have a value_range for floating values ({values.min():g} .. "
            f"{values.max():g}; 0,1 or -1,1 or 0,255?), got None"
        )
    return _unit(values, given, name)


def _unit(values: np.ndarray, given: Range | None, name: str) -> np.ndarray:
    try:
        found = (float(values.min()), float(values.max()))
        return to_signed_unit(name, values, choose_range(name, values.dtype, found, given))
    except ValueError as error:
        raise UnclearImage(str(error)) from None


def _fitted(
    image: Image.Image, size: tuple[int, int], name: str, crop: Sequence[float] | None
) -> Image.Image:
    """`fit` or `random_crop`, unless resizing would first enlarge the image beyond MAX_PIXELS."""
    height, width = size
    scale = max(width / image.width, height / image.height)
    if (image.width * scale) * (image.height * scale) > MAX_PIXELS:
        raise BadImage(
            f"{name}: must have sides more alike for {width}x{height}, got {image.width}x{image.height}"
        )
    return fit(image, size) if crop is None else random_crop(image, size, crop)


def _opaque(image: Image.Image, alpha: str, name: str) -> Image.Image:
    if alpha == "drop" or not is_transparent(image):
        return image
    if alpha == "refuse":
        raise UnclearImage(
            f"{name}: must be opaque, or alpha be 'drop' (show the colours below), 'black' or 'white' "
            "(lay it over that), got transparent pixels"
        )
    ground = Image.new("RGBA", image.size, (0, 0, 0, 255) if alpha == "black" else (255,) * 4)
    return Image.alpha_composite(ground, image.convert("RGBA"))


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest centred part of `image` with the proportions of `size` (height, width), resized to it.

    Squares are the same as in the original. Source: improved-diffusion's image_datasets.py.
    """
    height, width = size
    if image.size == (width, height):
        return image
    image = _covering(image, size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def random_crop(image: Image.Image, size: tuple[int, int], numbers: Sequence[float]) -> Image.Image:
    """A part of `image` of a size (height, width), at a random place of it at a random scale.

    The image is first resized so that it covers `size` by 1 to 1.25 times: the shorter side of that is a
    whole number of pixels, each as likely as the other.

    numbers: in [0, 1), of the scale, of the height and of the width at which the part is.

    Source: guided-diffusion's image_datasets.py, random_crop_arr.
    """
    height, width = size
    short = min(size)
    largest = math.ceil(short / _LEAST_CROP)
    goal = short + _below(numbers[0], largest - short + 1)
    covered = (math.ceil(height * goal / short), math.ceil(width * goal / short))
    image = _covering(image, covered)
    top = _below(numbers[1], image.height - height + 1)
    left = _below(numbers[2], image.width - width + 1)
    return image.crop((left, top, left + width, top + height))


def _below(number: float, count: int) -> int:
    """One of 0 .. count - 1, by a number in [0, 1), which rounding may have made 1."""
    return min(int(number * count), count - 1)


def _covering(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image at the least scale that covers a size (height, width).

    Halved by averaging while it is at least twice as large, then bicubic.
    """
    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    sides = (round(image.width * scale), round(image.height * scale))
    return image.resize(sides, Image.Resampling.BICUBIC)

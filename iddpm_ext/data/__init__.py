"""Images for training and likelihood, in [-1, 1], from the formats that data sets come in."""

from __future__ import annotations

from .arrays import ArrayData
from .cache import CachedData
from .check import DataReport, check_data, empty_classes
from .classes import match_classes
from .files import BAD_IMAGES, FileData
from .idx import read_idx
from .image import ALPHA, BadImage
from .loader import Batch, batches
from .order import Order
from .source import ImageData, open_data

__all__ = [
    "ALPHA",
    "BAD_IMAGES",
    "ArrayData",
    "CachedData",
    "BadImage",
    "Batch",
    "DataReport",
    "FileData",
    "ImageData",
    "Order",
    "batches",
    "check_data",
    "empty_classes",
    "match_classes",
    "open_data",
    "read_idx",
]

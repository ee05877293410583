"""Images for training and likelihood, in [-1, 1], from the formats that data sets come in."""

from __future__ import annotations

from .arrays import ArrayData
from .cache import CachedData
from .check import DataReport, check_data, empty_classes
from .files import BAD_IMAGES, FileData
from .idx import read_idx
from .image import BadImage
from .loader import Batch, batches
from .order import Order
from .source import ImageData, open_data

__all__ = [
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
    "open_data",
    "read_idx",
]

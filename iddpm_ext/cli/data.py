"""Look at data before training: `iddpm data check PATH`."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro


def run(
    action: Annotated[Literal["check"], tyro.conf.Positional],
    path: Annotated[str, tyro.conf.Positional],
    split: Literal["train", "test"] = "train",
) -> int:
    """Reads every image and reports unreadable files, sizes, channels, bit depth and classes.

    Args:
        action: check.
        path: a folder or zip of images, or any other source that training reads.
        split: of sources that have both.

    Returns 1 where an image or a class could not be used, else 0.
    """
    from iddpm_ext.data import check_data

    report = check_data(path, split=split)
    print(report)
    return 0 if report.sound else 1

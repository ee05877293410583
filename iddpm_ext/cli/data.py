"""Look at data before training: `iddpm data check PATH`.

Example: iddpm data check DIR
"""

from __future__ import annotations

from typing import Annotated, Literal

import tyro


def run(
    action: Annotated[Literal["check"], tyro.conf.Positional],
    path: Annotated[str, tyro.conf.Positional],
    split: Literal["train", "test", "all"] = "train",
    classes: str = "auto",
    value_range: tuple[float, ...] | None = None,
    alpha: Literal["refuse", "drop", "black", "white"] = "refuse",
) -> int:
    """Reads every image and reports unreadable files, sizes, channels, bit depth, values, classes, what is
    skipped or changed in reading, and what training would refuse because it is ambiguous.

    Args:
        action: check.
        path: a folder or zip of images, or any other source that training reads.
        split: train or test, for sources that have both; all, for which such folders are not splits.
        classes: source of the classes: auto, folders, names, file, ids, none or a column.
        value_range: the values of black and white, 0,1 or 0,4095 or =-1,1.
        alpha: handling of transparent pixels.

    Returns 1 if an image or a class cannot be used, else 0.
    """
    from iddpm_ext.data import check_data

    report = check_data(path, split=split, classes=classes, value_range=value_range, alpha=alpha)
    print(report)
    return 0 if report.sound else 1

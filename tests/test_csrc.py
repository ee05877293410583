"""What csrc promises about itself: folders that include downwards only, in one style."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from iddpm_ext import ops

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"

# From the ground up. A folder includes its own files and those of the floors below it, so no two
# folders include each other.
FLOORS = [
    {"common"},
    {"nhwc"},
    {*ops.REGISTRY, "ceilings"},
    {"unet_engine"},
]


def floor(folder: str) -> int:
    return next(i for i, folders in enumerate(FLOORS) if folder in folders)


def includes() -> Iterator[tuple[Path, str]]:
    """(file, what it includes of ours) of every file in a folder of csrc, but the CUDA emulator."""
    for path in sorted(CSRC.glob("*/*")):
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            if not (TESTS / "cuda_emu" / name).is_file():
                yield path, name


def test_every_folder_has_a_floor():
    folders = {path.name for path in CSRC.iterdir() if path.is_dir()}
    assert folders == set.union(*FLOORS)


def test_includes_name_a_file_from_csrc_on():
    wrong = [f"{path.name}: {name}" for path, name in includes() if not (CSRC / name).is_file()]
    assert wrong == []


def test_folders_include_downwards_only():
    upward = [
        f"{path.parent.name}/{path.name} includes {name}"
        for path, name in includes()
        if (target := name.partition("/")[0]) != path.parent.name
        and floor(target) >= floor(path.parent.name)
    ]
    assert upward == []

"""Rules of csrc: folders include only lower ones, in one style."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from iddpm_ext import ops

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"

# Layers, the lowest first. A folder may include its own files and those of lower layers, so no two folders
# include each other.
FLOORS = [
    {"common"},
    {"nhwc"},
    {*ops.REGISTRY, "ceilings", "checksum", "end_convs", "pixel_rows"},
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


# Between them these include every header of the CPU's kernels.
KERNELS = ["qkv_attention/qkv_attention", "q_sample/q_sample", "conv3x3/conv3x3_weight_bwd"]
X86 = ["-mfma", "-mf16c"]
ISA_FLAGS = {
    "base": ["-msse4.2"],
    "avx2": ["-mavx2", *X86],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *X86],
}


def check_syntax(compiler: str, isa: str, flags: list[str], sources: list[str]) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    warnings = ["-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-Werror"]
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{CSRC}", *warnings, *flags]
    files = [str(CSRC / f"{name}.cpp") for name in sources]
    done = subprocess.run(
        [*command, f"-DIDDPM_ISA={isa}", *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[:2000]


@pytest.mark.parametrize("isa", ISA_FLAGS)
def test_kernels_are_cpp_that_clang_takes(isa):
    check_syntax("clang++", isa, ISA_FLAGS[isa], [*KERNELS, "group_norm_silu/group_norm_silu_bwd"])


def test_kernels_need_no_x86():
    check_syntax("aarch64-linux-gnu-g++", "base", [], KERNELS)

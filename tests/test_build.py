"""The compiled module describes its build, and its instruction set can be selected."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from iddpm_ext import _native

pytestmark = pytest.mark.skipif(_native.cpu_absence() is not None, reason="no compiled module")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_build_info_names_the_decisions_and_their_reasons():
    info = _native.native().build_info()
    assert info["isa"] in info["isa_available"]
    assert info["isa_available"][0] == "base"
    assert set(info["isa_available"]) <= set(info["isa_compiled"])
    assert info["compiler"]
    assert info["openmp"]["built"] == (info["openmp"]["reason"] == "")
    assert info["cuda"]["reason"]
    if info["cuda"]["built"]:
        assert info["cuda"]["archs"]
        assert info["cuda"]["devices"] > 0 or info["cuda"]["error"]


def test_set_isa_switches_and_returns_the_previous_one():
    native = _native.native()
    first = native.set_isa("base")
    try:
        assert native.build_info()["isa"] == "base"
        assert native.set_isa(first) == "base"
        assert native.build_info()["isa"] == first
    finally:
        native.set_isa(first)


def test_set_isa_refuses_an_unknown_name():
    with pytest.raises(ValueError, match=r"IDDPM_ISA must be one of base.*, got 'mmx'"):
        _native.native().set_isa("mmx")


PRINT_ISA = "import torch, iddpm_ext._C as c; print(c.build_info()['isa'])"


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512", "amx"])
def test_the_environment_chooses_the_instruction_set(isa):
    if isa not in _native.native().build_info()["isa_available"]:
        pytest.skip(f"this CPU has no {isa}")
    assert run_python(PRINT_ISA, IDDPM_ISA=isa).stdout.strip() == isa


def test_an_unknown_instruction_set_in_the_environment_is_refused_at_import():
    result = run_python(PRINT_ISA, IDDPM_ISA="mmx")
    assert result.returncode != 0
    assert "got 'mmx'" in result.stderr


OBJECTS = Path(__file__).resolve().parent.parent / "build"


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("isa", ["avx2", "avx512", "amx", "amx_emulated"])
def test_kernel_objects_share_no_symbol_that_the_linker_could_take_for_another_cpu(isa):
    newest: dict[str, Path] = {}
    for path in sorted(OBJECTS.glob(f"*/*-{isa}.*.o"), key=lambda path: path.stat().st_mtime):
        newest[path.name.partition(".")[0]] = path
    if not newest:
        pytest.skip("no object files here: the module was not built in this tree")
    symbols = subprocess.run(
        ["nm", "-C", "--defined-only", *newest.values()], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    weak = [line for line in symbols if line[17:19] == "W "]
    assert [line for line in weak if f"iddpm::{isa}::" not in line] == []

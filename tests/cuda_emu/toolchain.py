"""Compiles with the emulator: which compiler, whether it can, and small programs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
HEADERS = Path(__file__).parent


def absence() -> str | None:
    """Why kernels cannot be emulated here, or None."""
    if not (ROOT / "setup.py").exists():
        return "no source tree"
    if shutil.which(compiler()) is None:
        return f"no C++ compiler {compiler()}"
    missing = [m for m in ("setuptools", "pybind11") if importlib.util.find_spec(m) is None]
    return f"{missing[0]} is not installed" if missing else None


def compiler() -> str:
    """The C++ compiler; g++ where CXX does not name another."""
    return os.environ.get("CXX") or "g++"


def compile_program(source: Path, *flags: str) -> Path:
    """An executable of one emulated file, compiled if it or a header is newer."""
    inputs = [source, *HEADERS.glob("*.h"), *ROOT.glob("csrc/common/*")]
    program = BUILD / "-".join([source.stem, *(f.strip("-").replace("=", "-") for f in flags)])
    if not program.exists() or program.stat().st_mtime < max(p.stat().st_mtime for p in inputs):
        BUILD.mkdir(exist_ok=True)
        fresh = program.with_suffix(f".{os.getpid()}")
        command = [compiler(), "-std=c++17", "-O1", "-g", "-Wno-unknown-pragmas", *flags]
        command += [f"-I{ROOT}/csrc", f"-I{HEADERS}", str(source), "-o", str(fresh)]
        subprocess.run(command, check=True)
        fresh.replace(program)
    return program

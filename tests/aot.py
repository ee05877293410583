"""Compiles the Triton kernels of every op ahead of time, in a separate process.

`python aot.py FOLDER OP,OP ARCH...` writes a cubin for each case of
`iddpm_ext.ops.<op>.triton.aot_cases()` and prints one JSON line per cubin. The tests' own process uses
Triton's interpreter, which does not compile.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from iddpm_ext.ops.spec import REGISTRY


def cases(ops: list[str]) -> list[tuple[str, int, Any, dict[str, str], dict[str, Any]]]:
    """(op, number, kernel, signature, constants) of every case that these ops declare."""
    found = []
    for name, spec in REGISTRY.items():
        if name in ops and "triton" in spec.kernels:
            module = importlib.import_module(f"iddpm_ext.ops.{name}.triton")
            found += [(name, i, *case) for i, case in enumerate(module.aot_cases())]
    return found


def compile_case(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], arch: int
) -> bytes:
    """The cubin of one case; Triton keeps a cache of its own."""
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["cubin"]


def main(folder: Path, ops: list[str], archs: list[int]) -> None:
    """Compile every case of the ops for every architecture."""
    for op, number, kernel, signature, constants in cases(ops):
        for arch in archs:
            cubin = compile_case(kernel, signature, constants, arch)
            path = folder / f"{op}-{number}-sm{arch}.cubin"
            path.write_bytes(cubin)
            exact = bool(constants.get("EXACT"))
            record = {"op": op, "arch": arch, "path": str(path), "exact": exact}
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), [int(arch) for arch in sys.argv[3:]])

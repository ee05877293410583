"""Reads registers, stack and instructions of compiled GPU kernels from cubins."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Arithmetic that has a 64th of float32's throughput on many GPUs; nothing here needs it.
FLOAT64 = r"D(ADD|MUL|FMA|SETP|MNMX)\b|F2F\.F64|MUFU\.RCP64H"


@dataclass(frozen=True)
class Kernel:
    """One kernel of a cubin; `instructions` counts opcodes with their modifiers, as LDG.E.128."""

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: Counter[str] = field(repr=False)

    def count(self, pattern: str) -> int:
        """How many instructions match the regular expression from their start."""
        return sum(n for opcode, n in self.instructions.items() if re.match(pattern, opcode))


@functools.cache
def cuobjdump() -> str | None:
    """The disassembler: of PATH, of NVIDIA's wheel, or Triton's own."""
    if on_path := shutil.which("cuobjdump"):
        return on_path
    packages = Path(sysconfig.get_path("purelib"))
    for pattern in ("nvidia/cu*/bin/cuobjdump", "triton/backends/nvidia/bin/cuobjdump"):
        for tool in sorted(packages.glob(pattern)):
            return str(tool)
    return None


def kernels(cubin: Path) -> list[Kernel]:
    """Every kernel of `cubin`."""
    tool = cuobjdump()
    assert tool is not None
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)",
        _output(tool, "--dump-resource-usage", str(cubin)),
    )
    code: dict[str, Counter[str]] = {}
    for part in _output(tool, "-sass", str(cubin)).split("Function : ")[1:]:
        name, body = part.split("\n", 1)
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", body)
        code[name.strip()] = Counter(opcodes)
    return [
        Kernel(_demangled(name), int(registers), int(stack), int(shared), code[name])
        for name, registers, stack, shared in usage
    ]


def _demangled(name: str) -> str:
    if not name.startswith("_Z") or shutil.which("c++filt") is None:
        return name
    return _output("c++filt", name).strip()


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

"""Finds tensors that are made without explicit dtype and device, and so depend on process defaults.

    python tools/check_tensors.py [FILE or FOLDER ...]

Prints `file:line: call` for each and exits with 1 if there are any; checks iddpm_ext/ by default. Functions
that take both from another tensor (`zeros_like`, `new_zeros`, `from_numpy`) and `torch.load` are allowed.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

FACTORIES = frozenset(
    "arange as_tensor asarray bartlett_window blackman_window empty empty_permuted empty_strided eye full "
    "hamming_window hann_window kaiser_window linspace logspace normal ones rand randint randn randperm "
    "range scalar_tensor sparse_coo_tensor tensor tril_indices triu_indices zeros".split()
)
#: Functions that always use or set the defaults.
FORBIDDEN = frozenset({"Tensor", "FloatTensor", "set_default_device", "set_default_dtype"})


def findings(source: str) -> Iterator[tuple[int, str]]:
    """(line, call) of every tensor that is made without a dtype or without a device."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = node.func.value, node.func.attr
        if not isinstance(owner, ast.Name) or owner.id != "torch":
            continue
        given = {keyword.arg for keyword in node.keywords}
        explicit = None in given or {"dtype", "device"} <= given  # None: **options
        if name in FORBIDDEN or (name in FACTORIES and not explicit):
            yield node.lineno, ast.unparse(node)


def main(paths: list[str]) -> int:
    """Prints the findings of the files; returns the exit code."""
    package = ROOT / "iddpm_ext"
    roots = [Path(path).resolve() for path in paths] or [package]
    files = [
        f for root in roots for f in ([root] if root.is_file() else sorted(root.rglob("*.py")))
    ]
    count = 0
    for file in files:
        shown = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
        for line, call in findings(file.read_text(encoding="utf-8")):
            count += 1
            print(f"{shown}:{line}: {call}: give dtype and device")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

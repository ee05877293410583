"""Settings of every test: OpenMP threads that do not spin, and Triton's interpreter without a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
from typing import Any

import pytest

# Read by OpenMP when torch is loaded, also in processes that tests start. Threads that spin while they wait
# would take cores from others on a busy machine. Of several processes (`pytest -n`) each uses its share of
# the cores, but at least two threads, so that work is divided among them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(2, (os.cpu_count() or 1) // workers)))

import torch

# The decorator of a Triton kernel reads this when its module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def round_to_bfloat16_in_the_interpreter() -> None:
    """Makes Triton's interpreter round float32 to bfloat16, as a GPU does, instead of truncating."""
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        rounded = torch.tensor(source.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    interpreter.InterpreterBuilder.cast_impl = rounding_cast


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuses test ids that contain an address: pytest-xdist needs equal ids in every process."""
    for item in items:
        if re.search(r"0x[0-9a-f]{6}", item.nodeid):
            raise pytest.UsageError(f"{item.nodeid}: a test's name must not hold an address")


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    round_to_bfloat16_in_the_interpreter()

"""Every op's Triton kernels compile for real GPUs, without spills; other tests interpret them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sass

from iddpm_ext.ops.spec import REGISTRY

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
ARCHS = (80, 90, 100)
OPS = [name for name, spec in REGISTRY.items() if "triton" in spec.kernels]


@pytest.fixture(scope="module")
def cubins(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], dict[Path, bool]]:
    """The cubins of each (op, architecture), and whether they compute exactly, in float64."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    ops = {item.callspec.params["op"] for item in items if item.module is request.module}
    folder = tmp_path_factory.mktemp("aot")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(sass.ROOT / "build" / "triton")
    environment["PYTHONPATH"] = os.pathsep.join([str(sass.ROOT), *sys.path])
    program = Path(__file__).with_name("aot.py")
    done = subprocess.run(
        [sys.executable, str(program), str(folder), ",".join(sorted(ops)), *map(str, ARCHS)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    found: dict[tuple[str, int], dict[Path, bool]] = {}
    for line in done.stdout.splitlines():
        record = json.loads(line)
        cubins_there = found.setdefault((record["op"], record["arch"]), {})
        cubins_there[Path(record["path"])] = record["exact"]
    return found


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", OPS)
def test_triton_kernels_compile_ahead_of_time(cubins, op: str, arch: int):
    assert cubins[op, arch]
    assert all(path.read_bytes()[:4] == b"\x7fELF" for path in cubins[op, arch])


@pytest.mark.skipif(sass.cuobjdump() is None, reason="no cuobjdump")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", OPS)
def test_triton_kernels_do_not_spill_or_compute_in_float64(cubins, op: str, arch: int):
    for path in (path for path, exact in cubins[op, arch].items() if not exact):
        for kernel in sass.kernels(path):
            assert kernel.stack_bytes == 0, (path.name, kernel)
            assert kernel.count(sass.FLOAT64) == 0, (path.name, kernel)

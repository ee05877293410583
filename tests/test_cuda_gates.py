"""Registers, spills and memory accesses of every CUDA kernel, compiled by nvcc for each architecture.

A kernel needs no entry here unless it breaks a default or claims wide memory access.
"""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sass

sys.path.insert(0, str(sass.ROOT / "tools"))

from cuda_toolkit import CudaUnavailable, Toolkit, find_toolkit
from objects import Unit, compile_one

ARCHS = ("80", "90a", "100")
SOURCES = sorted(p for p in sass.ROOT.glob("csrc/*/*.cu") if p.parent.name != "common")

# 64 registers let 1024 threads live on a multiprocessor.
REGISTERS = 64
# Kernels (regular expressions on their C++ names) that may use more, and why.
MORE_REGISTERS: dict[str, int] = {
    "ExactLikelihood": 128,  # double precision, by choice and at the last step only
    "vlb_terms_kernel": 80,  # value and gradient of either kind of term in one pass
    "group_norm_tile_kernel": 96,  # a thread keeps eight channels' maps; three blocks still fit
    r"group_norm_tile_kernel<\w+, (\(int\))?1>": 128,  # groups of odd widths: eight at a time
    "group_norm_rows_kernel": 80,
    # Staged tiles leave room for two blocks anyway.
    "group_norm_bwd_(rows|tile)_kernel": 128,
    "first_conv_kernel": 128,  # 32 sums per thread; two blocks' weights share a multiprocessor
    "last_conv_kernel": 80,  # 24 sums and 18 weights a thread
    "hybrid_loss_kernel": 80,  # noise, two losses and two gradients in one pass
}
# Kernels that compute in float64 on purpose.
IN_DOUBLE = "ExactLikelihood"
# Kernels whose atomics add integers, which have one sum in any order.
ADDS_INTEGERS = "checksum_kernel"
# Kernels that move 16 bytes at a time, and where.
WIDE_LOADS = (
    r"reverse_step_kernel<float, true>",
    r"chain_step_kernel<float, true>",
    r"vlb_to_all_kernel<true,",
    r"adamw_ema_kernel<float>",
    r"settle_kernel<\w+, (\(int\))?[48]>",
    r"interleave_kernel<\w+, (\(int\))?[48]>",
    r"group_norm_rows_kernel<\w+, (\(int\))?[48],",
)
# Kernels that copy 16 bytes at a time to shared memory without registers, and read as many back.
TILES = r"group_norm_(bwd_)?tile_kernel"
WIDE_STORES = (
    r"reverse_step_kernel<\w+, true>",
    r"chain_step_kernel<\w+, true>",
    *WIDE_LOADS[3:],
    TILES,
)


def toolkit() -> Toolkit | str:
    """The toolkit, or why there is nothing to test."""
    if not SOURCES:
        return "no source tree"
    if sass.cuobjdump() is None:
        return "no cuobjdump (pip install nvidia-cuda-cuobjdump)"
    try:
        return find_toolkit()
    except CudaUnavailable as error:
        return str(error)


TOOLKIT = toolkit()
pytestmark = pytest.mark.skipif(isinstance(TOOLKIT, str), reason=f"no nvcc: {TOOLKIT}")


def compile_cubin(source: Path, arch: str) -> Path:
    """A cubin, from the cache if neither the source nor a header changed."""
    assert isinstance(TOOLKIT, Toolkit)
    cache = sass.ROOT / "build" / "gates"
    cache.mkdir(parents=True, exist_ok=True)
    command = (
        TOOLKIT.nvcc,
        "-std=c++17",
        "-O3",
        f"-I{sass.ROOT}/csrc",
        "-cubin",
        f"-arch=sm_{arch}",
    )
    unit = Unit(f"{source.stem}-sm{arch}", source, command, TOOLKIT.release)
    return compile_one(unit, cache)[0]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[tuple[str, str], list[sass.Kernel]]:
    """The kernels of each (file, architecture) that a selected test looks at."""
    looked_at = {
        (op, item.callspec.params["arch"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module
        for op in [item.callspec.params.get("op")]
    }
    pairs = [
        (source, arch)
        for source in SOURCES
        for arch in ARCHS
        if {(source.stem, arch), (None, arch)} & looked_at
    ]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda pair: sass.kernels(compile_cubin(*pair)), pairs))
    return {(source.stem, arch): k for (source, arch), k in zip(pairs, found, strict=True)}


each_file = pytest.mark.parametrize("arch", ARCHS)
each_source = pytest.mark.parametrize("op", [source.stem for source in SOURCES])


def allowed_registers(name: str) -> int:
    return max(
        [n for pattern, n in MORE_REGISTERS.items() if re.search(pattern, name)] or [REGISTERS]
    )


@each_file
@each_source
def test_no_kernel_spills_or_keeps_arrays_in_local_memory(compiled, op: str, arch: str):
    assert compiled[op, arch]
    for kernel in compiled[op, arch]:
        assert kernel.stack_bytes == 0, kernel
        assert kernel.count(r"(LDL|STL)\b") == 0, kernel


@each_file
@each_source
def test_registers_leave_room_for_the_threads_that_hide_latency(compiled, op: str, arch: str):
    for kernel in compiled[op, arch]:
        assert kernel.registers <= allowed_registers(kernel.name), kernel


@each_file
@each_source
def test_no_kernel_computes_in_float64_or_uses_atomics(compiled, op: str, arch: str):
    for kernel in compiled[op, arch]:
        if IN_DOUBLE not in kernel.name:
            assert kernel.count(sass.FLOAT64) == 0, kernel
        if ADDS_INTEGERS not in kernel.name:
            assert kernel.count(r"(ATOM|ATOMG|ATOMS|RED)\b") == 0, kernel


@each_file
def test_kernels_that_claim_it_move_sixteen_bytes_at_a_time(compiled, arch: str):
    named = {k.name: k for (_, a), found in compiled.items() if a == arch for k in found}
    for patterns, instruction in (
        (WIDE_LOADS, r"LDG\.E\S*\.128"),
        (WIDE_STORES, r"STG\.E\S*\.128"),
        ((TILES,), r"LDGSTS\.E\S*\.128"),
        ((TILES,), r"LDS\.128"),
    ):
        for pattern in patterns:
            claimed = [k for name, k in named.items() if re.search(pattern, name)]
            assert claimed, f"no kernel matches {pattern}"
            for kernel in claimed:
                assert kernel.count(instruction) > 0, kernel

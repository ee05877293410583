"""The CUDA emulator detects errors: kernels with planted bugs do not pass."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cuda_emu import toolchain

pytestmark = pytest.mark.skipif(
    toolchain.absence() is not None, reason=f"no emulator: {toolchain.absence()}"
)
SOURCE = Path(toolchain.__file__).with_name("planted.cpp")


def run_planted(bug: str, seed: int = 0, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    environment.update(CUDA_EMU_SEED=str(seed), ASAN_OPTIONS="detect_leaks=0")
    program = toolchain.compile_program(SOURCE, *flags)
    return subprocess.run([program, bug], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("seed", range(8))
def test_a_correct_kernel_passes_whatever_the_order_of_its_warps(seed: int):
    assert run_planted("none", seed).stdout == "right\n"


@pytest.mark.parametrize("bug", ["missing_barrier", "missing_trailing_barrier"])
def test_a_missing_barrier_changes_the_result_for_most_orders(bug: str):
    results = [run_planted(bug, seed).stdout for seed in range(8)]
    assert set(results) <= {"right\n", "wrong\n"}
    assert results.count("wrong\n") >= 6


@pytest.mark.parametrize("bug", ["unset_shared", "no_copy_wait"])
def test_shared_memory_that_nobody_wrote_changes_the_result(bug: str):
    assert run_planted(bug).stdout == "wrong\n"


def test_a_block_that_does_not_wait_for_its_cluster_changes_the_result_or_fails():
    assert not any(run_planted("no_cluster_wait", seed).stdout == "right\n" for seed in range(4))


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("divergent_barrier", "719 divergent __syncthreads: thread "),
        ("return_barrier", "719 divergent __syncthreads: thread 0 waits at planted.cpp:"),
        ("missed_shuffle", "719 divergent warp operation: thread "),
        ("overrun", "719 shared memory overrun behind the 16 bytes of planted.cpp:"),
        ("misaligned", "719 misaligned access of 16 bytes (thread "),
        ("empty_grid", "9 invalid launch: grid 0x1x1, 128 threads"),
        ("no_cluster_barrier", "719 access to a block of the cluster that may not have started"),
        ("half_cluster_barrier", "719 a wait at the cluster's barrier without an arrival"),
        ("odd_cluster", "9 invalid launch: grid 4x1x1, 128 threads"),
        ("too_much_shared", "9 invalid launch: grid 3x1x1, 128 threads, 307200 bytes"),
    ],
)
def test_a_launch_with_a_planted_bug_fails_and_says_why(bug: str, message: str):
    assert run_planted(bug).stdout.startswith(message)


def test_address_sanitizer_names_the_line_of_a_shared_memory_overrun():
    try:
        correct = run_planted("none", 1, "-fsanitize=address")
    except subprocess.CalledProcessError:
        pytest.skip("the compiler has no AddressSanitizer")
    assert correct.stdout == "right\n"
    overrun = run_planted("overrun", 1, "-fsanitize=address")
    assert overrun.returncode != 0
    assert "heap-buffer-overflow" in overrun.stderr and "planted.cpp:" in overrun.stderr

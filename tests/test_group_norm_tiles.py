"""The channels_last CUDA kernels of GroupNorm, emulated, for all ways to divide images and all batches."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cuda_emu import toolchain
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import group_norm_gpu
from iddpm_ext import _native
from iddpm_ext.ops import group_norm_silu as op
from iddpm_ext.ops.spec import BACKENDS

REASON = toolchain.absence() or _native.cpu_absence()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no emulator: {REASON}")

# Clusters of all sizes; no clusters, so that what does not fit one block is read twice; narrow slices.
SETTINGS = (
    "",
    "TILE=4096",
    "TILE=4096,CLUSTER=1",
    "TILE=2048,ROWS=8",
    "TILE=1024,ROWS=32",
    "BLOCKS=100000",
    "LINE=256",
)
# Widths of a group that divide a thread's channels, are divided by them, and neither; odd sizes; a
# sample that does not fit one block.
SHAPES = (
    (2, 128, 16, 16, 32),
    (2, 96, 9, 7, 8),
    (3, 64, 4, 4, 4),
    (1, 48, 1, 1, 4),
    (2, 40, 13, 20, 2),
    (1, 64, 40, 64, 8),
)


@contextlib.contextmanager
def sizes(text: str) -> Iterator[None]:
    """The sizes that the launchers decide, as "TILE=4096,CLUSTER=1" says."""
    pairs = dict(pair.split("=") for pair in text.split(",") if pair)
    with mock.patch.dict(os.environ, {f"CUDA_EMU_{k}": v for k, v in pairs.items()}):
        yield


@pytest.fixture(scope="module")
def emulated_cuda():
    from cuda_emu import emulator

    emulator.module()
    return emulator.emulated_cuda


def call(shape: tuple[int, ...], dtype: torch.dtype, sums: bool, mean: float) -> dict[str, Any]:
    n, c, h, w, groups = shape
    draw = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draw)

    def images() -> Tensor:
        return (normal(n, c, h, w) + mean).to(dtype).contiguous(memory_format=torch.channels_last)

    found = {"x": images(), "num_groups": groups, "weight": normal(c), "bias": normal(c)}
    found |= {"scale": 0.5 * normal(n, c), "shift": normal(n, c)}
    if sums:
        found |= {"residual": images(), "channel_bias": 3 * normal(n, c), "return_sum": True}
    return found


def results(kwargs: dict[str, Any], backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """What the call returns, and its gradients."""
    kwargs = {
        k: v.to(dtype or v.dtype, copy=True).requires_grad_() if isinstance(v, Tensor) else v
        for k, v in kwargs.items()
    }
    y = op(**kwargs, backend=backend)
    found = list(y) if isinstance(y, tuple) else [y]
    draw = torch.Generator().manual_seed(1)
    dy = torch.randn(found[0].shape, generator=draw).to(found[0])
    dy = dy.contiguous(memory_format=torch.channels_last)
    leaves = [v for v in kwargs.values() if isinstance(v, Tensor)]
    return [*(f.detach() for f in found), *torch.autograd.grad(found, leaves, [dy] * len(found))]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_way_to_cut_images_agrees_with_float64(shape, dtype, emulated_cuda):
    for sums, mean in ((False, 0.0), (True, 100.0 if dtype == torch.float32 else 5.0)):
        kwargs = call(shape, dtype, sums, mean)
        exact = results(kwargs, "reference", torch.float64)
        yardstick = errors(results(kwargs, "reference"), exact)
        for setting in SETTINGS:
            with emulated_cuda(), sizes(setting):
                found = errors(results(kwargs, "cuda"), exact)
            assert all(a <= 2 * b + 2e-6 for a, b in zip(found, yardstick, strict=True)), setting


@pytest.mark.parametrize("setting", ["", "TILE=2048", "TILE=2048,CLUSTER=1"])
def test_no_result_depends_on_the_batch_or_on_how_wide_slices_are(setting, emulated_cuda):
    kwargs = call((3, 128, 16, 16, 32), torch.bfloat16, True, 1.0)
    second = {k: v[1:2] if isinstance(v, Tensor) and v.ndim > 1 else v for k, v in kwargs.items()}
    with emulated_cuda():
        with sizes(",".join(filter(None, (setting, "BLOCKS=0")))):
            together = op(**kwargs, backend="cuda")
        with sizes(",".join(filter(None, (setting, "BLOCKS=100000")))):
            alone = op(**second, backend="cuda")
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[1:2], b)


def test_wide_slices_that_shared_memory_cannot_hold_change_no_gradient(emulated_cuda):
    kwargs = call((1, 96, 32, 32, 8), torch.bfloat16, False, 1.0)
    with emulated_cuda():
        found = []
        for blocks in ("BLOCKS=0", "BLOCKS=100000"):
            with sizes(f"LINE=512,TILE=262144,{blocks}"):
                found.append(results(kwargs, "cuda"))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("shape", "layout", "differentiated", "chosen"),
    [
        ((1, 8, 4, 4), torch.contiguous_format, False, "triton"),
        ((1, 8, 4, 4), torch.contiguous_format, True, "cuda"),
        ((1, 256, 16, 16), torch.channels_last, False, "triton"),
        ((1, 256, 16, 16), torch.channels_last, True, "cuda"),
        ((1, 512, 16, 16), torch.channels_last, False, "cuda"),
        ((16, 256, 8, 8), torch.channels_last, False, "triton"),
        ((128, 256, 8, 8), torch.channels_last, False, "cuda"),
    ],
)
def test_auto_takes_the_kernel_that_was_measured_to_be_faster(
    shape, layout, differentiated, chosen
):
    from iddpm_ext.ops import group_norm_silu as package_function

    module = sys.modules[package_function.__module__]
    x = torch.randn(shape).contiguous(memory_format=layout)
    groups = min(32, shape[1])
    with mock.patch.object(module, "unavailable", lambda *_: None):
        assert module._faster_on_gpu(x, shape[1], groups, differentiated) == chosen
    with mock.patch.object(module, "unavailable", lambda *_: "absent"):
        assert module._faster_on_gpu(x, shape[1], groups, differentiated) == "cuda"
    assert chosen in BACKENDS


def test_the_gpu_benchmark_checks_and_times_every_part(emulated_cuda, capsys, monkeypatch):
    def count(variants, *, rounds, calls, milliseconds):
        for function in variants.values():
            for _ in range(calls):
                function()
        return {name: [1.0] * rounds for name in variants}

    monkeypatch.setattr(group_norm_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(group_norm_gpu, "OURS", ("cuda",))
    monkeypatch.setattr(group_norm_gpu, "MAPS", ((32, 4),))
    monkeypatch.setattr(group_norm_gpu, "BATCHES", (2, 1))
    monkeypatch.setattr(group_norm_gpu, "COLD_BYTES", 1 << 13)
    monkeypatch.setattr(group_norm_gpu, "interleave_graphs", count)
    rows = []
    with emulated_cuda():
        for what in ("forward", "backward"):
            for n in (2, 1):
                found = group_norm_gpu.Call(n, 32, 4, sums=n == 2)
                variants = ["cuda", "eager"]
                rows += group_norm_gpu.measure(found, what, ("hot", "cold"), variants, 2, {})
    assert len(rows) == 2 * 2 * 2 * 2
    assert all(row.correct is not False for row in rows), capsys.readouterr().out
    assert {row.times_copy for row in rows if row.variant == "cuda"} == {1.0}
    planned = {(c.label, what) for c, what, _, _ in group_norm_gpu.jobs(["forward"], False)}
    assert planned == {(f"{n}x32x4x4 bfloat16 NHWC", "forward") for n in (2, 1)}

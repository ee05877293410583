"""The CUDA kernels of every op, run on the CPU by the emulator, against the reference in float64.

Loops over the registry like test_ops.py: a new op needs no line here.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emu import toolchain
from op_calls import DTYPES, assert_close, cloned, differentiable, gradients, run, to_double

from iddpm_ext import _native
from iddpm_ext.ops.spec import REGISTRY, Case, OpSpec

REASON = toolchain.absence() or _native.cpu_absence()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no emulator: {REASON}")
SEEDS = (1, 2)
CSRC = Path(__file__).resolve().parent.parent / "csrc"


def cuda_cases(differentiable_only: bool = False) -> list[Any]:
    """(spec, case) for every op with a CUDA kernel, on every dtype it takes."""
    return [
        pytest.param(spec, case, id=f"{spec.name}-{str(dtype)[6:]}-{case.label}")
        for spec, dtype in product(REGISTRY.values(), DTYPES)
        if "cuda" in spec.kernels and dtype in spec.dtypes["cuda"]
        if spec.differentiable or not differentiable_only
        for case in spec.sample_inputs("cpu", dtype)
    ]


@pytest.fixture(scope="module")
def emulated_cuda(request):
    """The emulator with the kernels of the ops that are tested in this run: `-k blend` compiles no others."""
    from cuda_emu import emulator

    calls = [i.callspec.params for i in request.session.items if i.path == request.path]
    tested = {call["spec"].name for call in calls}
    every = {spec.name for spec in REGISTRY.values() if "cuda" in spec.kernels}
    folders = tuple(sorted(tested)) if tested != every else ()
    emulator.module(*folders)
    return partial(emulator.emulated_cuda, folders=folders)


@pytest.mark.parametrize(("spec", "case"), cuda_cases())
def test_kernel_agrees_with_the_reference_in_float64_in_any_order_of_its_warps(
    spec: OpSpec, case: Case, emulated_cuda
):
    exact = run(spec, "reference", to_double(cloned(case.kwargs)))
    yardstick = run(spec, "reference", cloned(case.kwargs))
    results = []
    for seed in SEEDS:
        with emulated_cuda(seed):
            results.append(run(spec, "cuda", cloned(case.kwargs)))
    for result, target, measure in zip(results[0], exact, yardstick, strict=True):
        assert result.dtype == measure.dtype and result.stride() == measure.stride()
        assert_close(result, target, measure, result.dtype)
    for result, other in zip(*results, strict=True):
        assert torch.equal(result.nan_to_num(), other.nan_to_num())


def own_kernels(cases: list[Any]) -> list[Any]:
    """Those of ops that have a kernel of ours: a library's gradient on the CPU says nothing of a GPU's."""
    return [c for c in cases if (CSRC / c.values[0].name / f"{c.values[0].name}.cu").exists()]


@pytest.mark.parametrize(("spec", "case"), own_kernels(cuda_cases(differentiable_only=True)))
def test_gradients_agree_with_the_reference_in_float64(spec: OpSpec, case: Case, emulated_cuda):
    exact = gradients(spec, "reference", differentiable(spec, to_double(cloned(case.kwargs))))
    yardstick = gradients(spec, "reference", differentiable(spec, case.kwargs))
    with emulated_cuda(SEEDS[0]):
        results = gradients(spec, "cuda", differentiable(spec, case.kwargs))
    for result, target, measure in zip(results, exact, yardstick, strict=True):
        assert result.dtype == measure.dtype
        assert_close(result, target, measure, result.dtype)

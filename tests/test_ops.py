"""Every op on every backend, against its reference in float64. A new op needs no line here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations_with_replacement, product
from typing import Any
from unittest import mock

import pytest
import torch
from op_calls import (
    DTYPES,
    FLOATS,
    KERNELS,
    assert_close,
    cloned,
    differentiable,
    floating_arguments,
    gradients,
    in_dtypes,
    poison_fresh_memory,
    run,
    same_bits,
    tensors,
    to_double,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves

from iddpm_ext import ops
from iddpm_ext.ops import synthetic
from iddpm_ext.ops.spec import REGISTRY, BadCase, Case, OpSpec, triton_interpreted, unavailable
from iddpm_ext.random import NoiseKey

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DIFFERENTIABLE = [spec for spec in REGISTRY.values() if spec.differentiable]
NUMERICALLY_DIFFERENTIABLE = [spec for spec in DIFFERENTIABLE if not spec.stops_gradient]
SMALL = 4000


def kernel_cases(specs: Iterable[OpSpec]) -> list[Any]:
    """(spec, backend, case) for every kernel that can run here, on every dtype it takes."""
    found = []
    for spec, device, backend, dtype in product(specs, DEVICES, KERNELS, DTYPES):
        if unavailable(spec.name, backend, device, dtype) is None:
            for case in spec.sample_inputs(device, dtype):
                name = f"{spec.name}-{backend}-{device}-{str(dtype)[6:]}-{case.label}"
                found.append(pytest.param(spec, backend, case, id=name))
    return found


def bad_cases() -> list[Any]:
    return [
        pytest.param(spec, case, id=f"{spec.name}-{device}-{case.label}")
        for spec, device in product(REGISTRY.values(), DEVICES)
        for case in spec.bad_inputs(device)
        if device == "cpu" or not case.of_values
    ]


@pytest.mark.parametrize(("spec", "backend", "case"), kernel_cases(REGISTRY.values()))
def test_backend_agrees_with_the_reference_in_float64(spec: OpSpec, backend: str, case: Case):
    poison_fresh_memory()
    inputs = cloned(case.kwargs)
    results = run(spec, backend, inputs)
    exact = run(spec, "reference", to_double(cloned(case.kwargs)))
    yardstick = run(spec, "reference", cloned(case.kwargs))
    assert len(results) == len(exact) > 0
    for result, target, measure in zip(results, exact, yardstick, strict=True):
        assert result.dtype == measure.dtype and result.stride() == measure.stride()
        assert_close(result, target, measure, result.dtype, spec.roundings)


def parallel_cases() -> list[Any]:
    """The cases of kernels that run on several threads."""
    cases = kernel_cases(REGISTRY.values())
    return [c for c in cases if c.values[1] != "triton" or not triton_interpreted()]


@pytest.mark.parametrize(("spec", "backend", "case"), parallel_cases())
def test_backend_repeats_itself_bit_for_bit(spec: OpSpec, backend: str, case: Case):
    first = run(spec, backend, cloned(case.kwargs))
    again = run(spec, backend, cloned(case.kwargs))
    assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))


def batch_cases() -> list[Any]:
    """(spec, backend, case) in float32 with two samples or more, of which larger batches are made."""
    found = []
    for spec, backend in product(REGISTRY.values(), KERNELS):
        if not spec.batched or unavailable(spec.name, backend, "cpu", torch.float32):
            continue
        cases = [
            case
            for case in spec.sample_inputs("cpu", torch.float32)
            if case.kwargs[spec.batched[0]].shape[0] > 1
            and case.kwargs[spec.batched[0]][0].numel() < SMALL
            and case.label not in synthetic.LAYOUTS
        ]
        # Triton's interpreter takes seconds for a batch.
        for case in cases[: 2 if backend == "triton" else None]:
            name = f"{spec.name}-{backend}-{case.label}"
            found.append(pytest.param(spec, backend, case, id=name))
    return found


def of_samples(spec: OpSpec, kwargs: dict[str, Any], which: list[int]) -> dict[str, Any]:
    """The call for these samples alone."""

    def take(value: Any) -> Any:
        if isinstance(value, NoiseKey):
            return replace(value, samples=take(value.samples), steps=take(value.steps))
        return value[which].clone() if isinstance(value, Tensor) else value

    return {k: take(v) if k in spec.batched else v for k, v in kwargs.items()}


@pytest.mark.parametrize(("spec", "backend", "case"), batch_cases())
def test_a_sample_of_sixteen_has_the_bits_that_it_has_alone(spec: OpSpec, backend: str, case: Case):
    kwargs = case.kwargs
    if isinstance(kwargs.get("channel_bias"), Tensor) and kwargs["channel_bias"].ndim == 2:
        kwargs = {**kwargs, "channel_bias": kwargs["channel_bias"][0]}
    n = kwargs[spec.batched[0]].shape[0]
    sixteen = of_samples(spec, kwargs, [i % n for i in range(16)])
    together = run(spec, backend, sixteen)
    for i in (0, 15):
        alone = run(spec, backend, of_samples(spec, sixteen, [i]))
        for a, b in zip(alone, together, strict=True):
            assert same_bits(a[0].contiguous(), b[i].contiguous())


def richest_call(spec: OpSpec) -> dict[str, Any]:
    """A small call with as many floating arguments as a call can have."""
    calls = [
        case.kwargs
        for case in spec.sample_inputs("cpu", torch.float32)
        if 0 < sum(x.numel() for x in tensors(list(case.kwargs.values()))) < SMALL
    ]
    return max(calls, key=lambda kwargs: len(floating_arguments(kwargs)))


@pytest.mark.parametrize("backend", ["auto", "reference", *KERNELS])
@pytest.mark.parametrize("spec", REGISTRY.values(), ids=REGISTRY)
def test_every_pair_of_dtypes_is_computed_rightly_or_refused(spec: OpSpec, backend: str):
    """If a kernel read an argument's bits as another dtype, the result would be far off."""
    named = backend not in ("auto", "reference")
    if named and unavailable(spec.name, backend, "cpu", torch.float32):
        pytest.skip("no such kernel here")
    call, computed = richest_call(spec), 0
    # Triton's interpreter is slow: only one argument at a time.
    pairs = [
        pair
        for pair in combinations_with_replacement(floating_arguments(call), 2)
        if backend != "triton" or pair[0] == pair[1]
    ]
    for first, second in pairs:
        alone = first == second
        for one, other in zip(FLOATS, FLOATS, strict=True) if alone else product(FLOATS, FLOATS):
            wanted = {first: one, second: other}
            kwargs = in_dtypes(call, wanted)
            try:
                results = run(spec, backend, cloned(kwargs))
            except (TypeError, RuntimeError) as refusal:
                assert str(refusal).startswith(f"{spec.name}: "), (wanted, refusal)
                continue
            computed += 1
            exact = run(spec, "reference", to_double(cloned(kwargs)))
            yardstick = run(spec, "reference", cloned(kwargs))
            for result, target, measure in zip(results, exact, yardstick, strict=True):
                assert result.dtype == measure.dtype, wanted
                assert_close(result, target, measure, result.dtype, spec.roundings)
    assert computed >= len(pairs)


@pytest.mark.parametrize("spec", REGISTRY.values(), ids=REGISTRY)
def test_dtypes_that_do_not_float_are_refused(spec: OpSpec):
    call = richest_call(spec)
    for name in floating_arguments(call):
        for dtype in (torch.int64, torch.bool, torch.complex64, torch.uint8):
            with pytest.raises(TypeError, match=f"^{spec.name}: {name}"):
                spec.public(**in_dtypes(call, {name: dtype}))


@pytest.mark.parametrize("spec", REGISTRY.values(), ids=REGISTRY)
def test_integer_arguments_are_int64_or_refused(spec: OpSpec):
    call = richest_call(spec)
    for name, value in call.items():
        if isinstance(value, Tensor) and value.dtype == torch.int64:
            for dtype in (torch.int32, torch.float32, torch.float64, torch.bool):
                with pytest.raises(TypeError, match=f"^{spec.name}: {name} must be int64"):
                    spec.public(**{**call, name: value.to(dtype)})


@pytest.mark.parametrize("spec", REGISTRY.values(), ids=REGISTRY)
def test_autocast_leaves_an_op_alone(spec: OpSpec):
    if unavailable(spec.name, "cpu", "cpu", torch.float32):
        pytest.skip("no C++ kernels here")
    for case in list(spec.sample_inputs("cpu", torch.float32))[:3]:
        expected = run(spec, "cpu", cloned(case.kwargs))
        with torch.autocast("cpu", torch.bfloat16):
            results = run(spec, "cpu", cloned(case.kwargs))
        assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize(("spec", "backend", "case"), kernel_cases(DIFFERENTIABLE))
def test_gradients_agree_with_the_reference_in_float64(spec: OpSpec, backend: str, case: Case):
    results = gradients(spec, backend, differentiable(spec, case.kwargs))
    exact = gradients(spec, "reference", differentiable(spec, to_double(cloned(case.kwargs))))
    yardstick = gradients(spec, "reference", differentiable(spec, case.kwargs))
    for result, target, measure in zip(results, exact, yardstick, strict=True):
        assert result.dtype == measure.dtype
        assert_close(result, target, measure, result.dtype, spec.roundings)


def small_cases(specs: Iterable[OpSpec], dtype: torch.dtype) -> list[Any]:
    """Cases small enough for numerical differentiation, also used for tracing."""
    return [
        pytest.param(spec, case, id=f"{spec.name}-{case.label}")
        for spec in specs
        for case in spec.sample_inputs("cpu", dtype)
        if sum(x.numel() for x in tensors(list(case.kwargs.values()))) < SMALL
    ]


@pytest.mark.parametrize(("spec", "case"), small_cases(NUMERICALLY_DIFFERENTIABLE, torch.float64))
def test_reference_passes_gradcheck(spec: OpSpec, case: Case):
    leaves = [k for k in spec.differentiable if isinstance(case.kwargs.get(k), Tensor)]
    if sum(case.kwargs[k].numel() for k in leaves) == 0:
        pytest.skip("nothing to differentiate")
    kwargs = cloned(to_double(case.kwargs))

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        arguments = {**kwargs, **dict(zip(leaves, values, strict=True))}
        found = tensors(spec.public(**arguments, backend="reference"))
        return tuple(x for x in found if x.requires_grad)

    inputs = tuple(kwargs[k].requires_grad_(True) for k in leaves)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def operator_of(spec: OpSpec) -> Any:
    return getattr(torch.ops.iddpm_ext, spec.name).default


@pytest.mark.parametrize(("spec", "case"), small_cases(REGISTRY.values(), torch.float32))
def test_operator_passes_opcheck(spec: OpSpec, case: Case):
    backend = "cpu"
    if unavailable(spec.name, backend, "cpu", torch.float32):
        pytest.skip("no C++ kernels here")
    calls: list[tuple[Any, ...]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is operator_of(spec):
                calls.append(args)
            return func(*args, **(kwargs or {}))

    with Recorder():
        spec.public(**cloned(case.kwargs), backend=backend)
    assert calls, "the public function does not go through its operator"
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator_of(spec), calls[0], test_utils=checks)


@pytest.mark.parametrize("free", [False, True], ids=["sizes fixed", "first tensor's sizes free"])
@pytest.mark.parametrize("spec", REGISTRY.values(), ids=REGISTRY)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiles_into_one_graph_with_the_same_result(spec: OpSpec, backend: str, free: bool):
    """Free sizes are what torch.compile takes where a size changed between two calls of one function; the
    other tensors are often weights, whose sizes stay numbers."""
    case = next(iter(spec.sample_inputs("cpu", torch.float32)))
    if unavailable(spec.name, backend, "cpu", torch.float32):
        pytest.skip("no such kernel here")

    def call(kwargs: dict[str, Any]) -> list[Tensor]:
        return run(spec, backend, kwargs)

    torch.compiler.reset()  # the ops before this one left graphs of the same functions
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    kwargs = cloned(case.kwargs)
    if free:
        first = next(x for x in tree_leaves(kwargs) if isinstance(x, Tensor))
        torch._dynamo.maybe_mark_dynamic(first, list(range(first.ndim)))
    results, expected = compiled(kwargs), call(cloned(case.kwargs))
    assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize(("spec", "case"), bad_cases())
def test_bad_input_is_refused_before_any_work(spec: OpSpec, case: BadCase):
    with pytest.raises(case.error, match=case.match) as caught:
        spec.public(**case.kwargs)
    assert str(caught.value).startswith(f"{spec.name}: ")


def test_an_explicit_backend_that_does_not_support_a_call_says_why_and_which_can():
    with pytest.raises(
        RuntimeError, match=r"'cuda' does not support this call: .*; can: .*reference"
    ):
        ops.resolve_backend("reverse_step", "cuda", torch.device("cpu"), torch.float32)


def test_auto_takes_the_reference_where_no_kernel_takes_the_dtype():
    chosen = ops.resolve_backend("reverse_step", "auto", torch.device("cpu"), torch.float64)
    assert chosen == "reference"


def test_an_op_may_have_a_reference_alone():
    spec = replace(REGISTRY["q_sample"], name="new", kernels={"reference": torch.add})
    with mock.patch.dict(REGISTRY, new=spec):
        for device in ("cpu", "cuda"):
            chosen = ops.resolve_backend("new", "auto", torch.device(device), torch.float32)
            assert chosen == "reference"
        with pytest.raises(RuntimeError, match=r"^new: .*no such kernel; can: reference$"):
            ops.resolve_backend("new", "cpu", torch.device("cpu"), torch.float32)

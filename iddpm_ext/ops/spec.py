"""`OpSpec`, the registry of ops, and the choice of a backend for a call."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from iddpm_ext import _native
from iddpm_ext.ops.modes import transformed

#: Backends in the order in which "auto" tries them, by device type.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}
BACKENDS = ("reference", "cpu", "cuda", "triton")

FLOAT32_ONLY = frozenset({torch.float32})
FLOAT32_AND_HALVES = frozenset({torch.float32, torch.bfloat16, torch.float16})


class Case(NamedTuple):
    """Arguments of one call of an op, for tests and benchmarks."""

    label: str
    kwargs: dict[str, Any]


class BadCase(NamedTuple):
    """Arguments that an op must refuse, with the error's type and a part of its text.

    of_values: the error depends on the values of a tensor, which are checked on the CPU only (`ops.checks`).
    """

    label: str
    kwargs: dict[str, Any]
    error: type[Exception]
    match: str
    of_values: bool = False


@dataclass(frozen=True)
class OpSpec:
    """One op: its public function and its backends.

    kernels: a function for each backend; all take the arguments of the registered operator without the
    trailing backend. dtypes: the dtypes of the first tensor that each kernel supports ("reference" supports
    every floating dtype). stops_gradient: a part of the gradient is left out on purpose, so numerical
    differentiation differs. roundings: tests allow float32 results an error of so many roundings of their
    largest value. batched: arguments with one entry per sample; a sample's result must not depend on the
    others. Cases for tests and benchmarks are in `iddpm_ext/ops/<name>/cases.py`, imported when used.
    """

    name: str
    summary: str
    public: Callable[..., Any]
    kernels: Mapping[str, Callable[..., Any]]
    dtypes: Mapping[str, frozenset[torch.dtype]] = field(
        default_factory=lambda: dict.fromkeys(("cpu", "cuda", "triton"), FLOAT32_ONLY)
    )
    differentiable: tuple[str, ...] = ()
    stops_gradient: bool = False
    roundings: float = 2.0
    batched: tuple[str, ...] = ()

    def _cases(self) -> Any:
        return importlib.import_module(f"iddpm_ext.ops.{self.name}.cases")

    def sample_inputs(self, device: str, dtype: torch.dtype) -> Iterator[Case]:
        """Calls that every backend must compute like the reference."""
        return self._cases().sample_inputs(device, dtype)

    def bad_inputs(self, device: str) -> Iterator[BadCase]:
        """Calls that must be refused before any work."""
        return self._cases().bad_inputs(device)

    def benchmark_inputs(self, device: str) -> Iterator[Case]:
        """Calls at the sizes of common networks."""
        return self._cases().benchmark_inputs(device)

    def property_inputs(self, draw: Any, device: str, dtype: torch.dtype) -> dict[str, Any]:
        """One random call that every backend must compute like the reference; `random_calls.Draw`."""
        return self._cases().property_inputs(draw, device, dtype)

    def in_pytorch(self) -> Callable[..., Any] | None:
        """`public` by fused functions of PyTorch, for tests to compare the rounding with; None if none."""
        return getattr(self._cases(), "in_pytorch", None)

    def minimum_bytes(self, kwargs: dict[str, Any]) -> int:
        """Bytes that any implementation must move: each input read once, each output written once."""
        return self._cases().minimum_bytes(kwargs)

    def flops(self, kwargs: dict[str, Any]) -> int | None:
        """Floating-point operations of the forward pass, if they rather than bytes bound its time."""
        count = getattr(self._cases(), "flops", None)
        return None if count is None else count(kwargs)


REGISTRY: dict[str, OpSpec] = {}

# Computed once: constants when traced, and free at every call.
_ABSENCE = {"cpu": _native.cpu_absence(), "cuda": _native.cuda_absence()}


def register(spec: OpSpec) -> OpSpec:
    """Adds an op to the registry; its name must be new and its backends known."""
    assert spec.name not in REGISTRY, f"op {spec.name} is registered twice"
    assert set(spec.kernels) <= set(BACKENDS) and "reference" in spec.kernels
    REGISTRY[spec.name] = spec
    return spec


@functools.cache
def _triton_missing() -> bool:
    return importlib.util.find_spec("triton") is None


def triton_interpreted() -> bool:
    """Whether Triton's interpreter is on (TRITON_INTERPRET=1), which runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(name: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why `backend` does not support op `name` there, or None if it does."""
    spec = REGISTRY[name]
    if backend not in spec.kernels:
        return "this op has no such kernel"
    if backend == "reference":
        return None
    if transformed():
        return "torch.func and forward-mode differentiation cannot look through it"
    if backend == "triton":
        if _triton_missing():
            return "the package triton is not installed"
        if device_type != "cuda" and not triton_interpreted():
            return f"it needs CUDA tensors (or TRITON_INTERPRET=1), not {device_type}"
    elif device_type != backend:
        return f"it needs {backend.upper()} tensors, not {device_type}"
    else:
        if _ABSENCE[backend] is not None:
            return _ABSENCE[backend]
    if dtype not in spec.dtypes[backend]:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in spec.dtypes[backend]))
        return f"it takes {names}, not {str(dtype).removeprefix('torch.')}"
    return None


def _without_gradient(fixed: Mapping[str, Any]) -> str | None:
    """Why a kernel does not support a call that needs gradients in `fixed`, or None."""
    if torch.is_grad_enabled():
        for name, value in fixed.items():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                return f"it has no gradient in {name}, which requires one"
    return None


def resolve_backend(
    name: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    fixed: Mapping[str, Any] = types.MappingProxyType({}),
) -> str:
    """The backend for a call of op `name` on `device` with a first tensor of `dtype`.

    fixed: the arguments in which only the reference is differentiable. "auto" takes the first of
    `PREFERENCE` that supports the call. An explicit backend that does not raises RuntimeError, with the
    reason and the backends that do; an unknown one ValueError.
    """

    def obstacle(candidate: str) -> str | None:
        reason = unavailable(name, candidate, device.type, dtype)
        return reason or (None if candidate == "reference" else _without_gradient(fixed))

    if backend == "auto":
        order = PREFERENCE.get(device.type, ("reference",))
        return next(b for b in order if obstacle(b) is None)
    if backend not in BACKENDS:
        choices = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"{name}: backend must be one of {choices}, got {backend!r}")
    reason = obstacle(backend)
    if reason is None:
        return backend
    able = [b for b in BACKENDS if obstacle(b) is None]
    raise RuntimeError(
        f"{name}: backend {backend!r} does not support this call: {reason}; can: {', '.join(able)}"
    )

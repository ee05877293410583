"""Calls of the ops in tests: run, copied, converted, differentiated, and their results compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iddpm_ext.ops.spec import BACKENDS, OpSpec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOATS = (*DTYPES, torch.float64)
KERNELS = [backend for backend in BACKENDS if backend != "reference"]

# The allowed error against float64, as a multiple of PyTorch's own at the same dtype (root mean square over
# the elements, since the largest error of a few depends on chance where terms cancel) ...
ERROR_RATIO = 2.0
# ... but at least so many roundings of the largest value (for float32, the op's `roundings` if larger).
ROUNDINGS = 2.0


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [x for item in value for x in tensors(item)]
    return []


def convert(kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, list):
            return [visit(v) for v in value]
        return value

    return {name: visit(value) for name, value in kwargs.items()}


def to_double(kwargs: dict[str, Any]) -> dict[str, Any]:
    return convert(kwargs, lambda x: x.double() if x.is_floating_point() else x)


def cloned(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Copies with the same strides, for ops that work in place."""

    def copy(x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x.clone()
        room = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype)
        room = room.to(x.device)
        room.copy_(torch.as_strided(x, room.shape, (1,), 0))
        return torch.as_strided(room, x.shape, x.stride(), x.storage_offset())

    return convert(kwargs, copy)


def run(spec: OpSpec, backend: str, kwargs: dict[str, Any]) -> list[Tensor]:
    """What the op returns, or for an op that works in place, the tensors it was given."""
    result = spec.public(**kwargs, backend=backend)
    return tensors(list(kwargs.values()) if result is None else result)


def poison_fresh_memory() -> None:
    """Makes it likely that elements that are never written are NaN."""
    for size in (64, 4096, 65536):
        torch.full((size,), float("nan"))


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).square().mean().sqrt()) if exact.numel() else 0.0


def assert_close(
    result: Tensor,
    exact: Tensor,
    yardstick: Tensor,
    dtype: torch.dtype,
    roundings: float = ROUNDINGS,
    largest: float | None = None,
) -> None:
    assert result.shape == exact.shape
    assert torch.equal(result.isnan(), exact.isnan())
    if not exact.is_floating_point():
        assert torch.equal(result, exact)
        return
    finite = exact.isfinite()
    result, exact, yardstick = result[finite], exact[finite], yardstick[finite]
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    scale = scale if largest is None else largest
    roundings = roundings if dtype == torch.float32 else ROUNDINGS
    allowed = max(ERROR_RATIO * error(yardstick, exact), roundings * torch.finfo(dtype).eps * scale)
    assert error(result, exact) <= allowed


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, those of a NaN included."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))


def differentiable(spec: OpSpec, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A copy whose differentiable tensors are leaves that require gradients, strides kept."""
    copy = cloned(kwargs)
    for name in spec.differentiable:
        if isinstance(copy.get(name), Tensor):
            copy[name].requires_grad_(True)
    return copy


def gradients(spec: OpSpec, backend: str, kwargs: dict[str, Any]) -> list[Tensor]:
    """Gradients of a fixed weighted sum of every result that has one."""
    on_cpu: Any = {"dtype": torch.float64, "device": "cpu"}
    total = torch.zeros((), **on_cpu)
    for i, result in enumerate(tensors(spec.public(**kwargs, backend=backend))):
        if result.requires_grad and result.numel():
            weights = torch.linspace(-1, 1, result.numel(), **on_cpu).cos() + 0.1 * i
            total = total + (result.double().cpu() * weights.view(result.shape)).sum()
    leaves = [kwargs[k] for k in spec.differentiable if isinstance(kwargs.get(k), Tensor)]
    if not total.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [g if g is not None else torch.zeros_like(x) for g, x in zip(found, leaves, strict=True)]


def floating_arguments(kwargs: dict[str, Any]) -> list[str]:
    """Names of the arguments that are floating tensors, or lists of some."""
    return [
        name for name, value in kwargs.items() if any(x.is_floating_point() for x in tensors(value))
    ]


def in_dtypes(kwargs: dict[str, Any], dtypes: dict[str, torch.dtype]) -> dict[str, Any]:
    """A copy with these arguments in these dtypes."""
    changed = {
        name: convert({name: kwargs[name]}, lambda x, to=dtype: x.to(to))[name]
        for name, dtype in dtypes.items()
    }
    return {**cloned(kwargs), **cloned(changed)}

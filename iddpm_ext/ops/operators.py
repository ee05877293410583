"""Registration with `torch.library`, and the short way around it.

Operators of kernels are defined and implemented from Python. The backend is their last argument, so the
choice that the public function made is part of a compiled graph too. The reference never comes here: it
is called as the PyTorch that it is, so that autograd and compilers see through it.

The dispatcher takes 8 microseconds a call, and 50 with a gradient, which is longer than many kernels. So
plain tensors in eager mode, where nobody traces or transforms, go straight to the kernel, and get
their gradient from an `autograd.Function`; all else goes through the operator.

A kernel's gradient is not differentiable again. Where a graph of it is asked for (`create_graph`, the
derivatives of derivatives), the backward pass differentiates the reference instead, on the same inputs:
PyTorch's own functions, which it can differentiate any number of times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iddpm_ext.ops.modes import batched_gradients, observed, transformed
from iddpm_ext.ops.rows import no_autocast

LIBRARY = torch.library.Library("iddpm_ext", "DEF")

_PLAIN = (Tensor, nn.Parameter)
_DIRECT: dict[str, _Direct] = {}  # by the operator's name


class _Direct:
    """An operator that takes the short way where it may."""

    def __init__(self, overload: Callable[..., Any], kernels: Mapping[str, Callable[..., Any]]):
        self.overload, self.kernels = overload, kernels
        self.function: type[torch.autograd.Function] | None = None

    def __call__(self, *args: Any) -> Any:
        if not observed():
            wanted = False
            for arg in args:
                if isinstance(arg, Tensor):
                    if type(arg) not in _PLAIN:
                        return self.overload(*args)
                    wanted = wanted or arg.requires_grad
            if not (wanted and torch.is_grad_enabled()):
                return self.kernels[args[-1]](*args[:-1])
            if self.function is not None:
                return self.function.apply(*args)
        return self.overload(*args)


def define(
    schema: str, kernels: Mapping[str, Callable[..., Any]], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Defines `iddpm_ext::<schema>` and returns what calls it.

    The schema's last argument is `str backend`, which picks from `kernels`; `fake` computes shapes,
    dtypes and strides for tracing and is given every argument.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))

    def dispatch(*args: Any) -> Any:
        return kernels[args[-1]](*args[:-1])

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, dispatch, key)
    torch.library.register_fake(f"iddpm_ext::{name}", fake, lib=LIBRARY)
    _DIRECT[name] = _Direct(getattr(torch.ops.iddpm_ext, name).default, kernels)
    return _DIRECT[name]


def differentiate(
    name: str,
    setup: Callable[..., None],
    backward: Callable[..., tuple[Any, ...]],
    formula: Callable[..., tuple[Any, ...]],
) -> None:
    """Gives `iddpm_ext::<name>` a gradient.

    `setup(ctx, inputs, output)` saves, `backward(ctx, *gradients)` computes, and so does
    `formula(ctx, *gradients)`, in PyTorch's functions, where a graph of the gradient is asked for.
    One registration holds for every backend and compiled code; both return one value an argument of the
    schema, the backend included.
    """

    def either(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled() or transformed() or batched_gradients():
            return formula(ctx, *gradients)
        return backward(ctx, *gradients)

    torch.library.register_autograd(f"iddpm_ext::{name}", either, setup_context=setup, lib=LIBRARY)
    kernels = _DIRECT[name].kernels

    # Without a `setup_context` of its own, whose arguments PyTorch binds by inspection at every call.
    def forward(ctx: Any, *args: Any) -> Any:
        output = kernels[args[-1]](*args[:-1])
        setup(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(either)}
    _DIRECT[name].function = type(name, (torch.autograd.Function,), members)


def vector_jacobian(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of the wanted `inputs` of `function`, given those of its results; differentiable again.

    `function` is made of PyTorch's functions. A result whose gradient is None has no part in it.
    """
    keeps_graph = torch.is_grad_enabled()
    at = [
        i
        for i, (x, take) in enumerate(zip(inputs, wanted, strict=True))
        if take and x is not None and x.requires_grad
    ]
    own = list(inputs)
    found: list[Tensor | None] = [None] * len(own)
    with torch.enable_grad(), no_autocast(_device_of(inputs)):
        for i in at:
            # A view of each: a tensor that is two of the arguments has a gradient as either.
            own[i] = inputs[i].view_as(inputs[i])  # type: ignore[union-attr, arg-type]
        pairs = [
            (result, gradient)
            for result, gradient in zip(function(*own), gradients, strict=True)
            if gradient is not None and result.requires_grad
        ]
        if pairs and at:
            results, given = zip(*pairs, strict=True)
            leaves = [x for x in (own[i] for i in at) if x is not None]
            computed = torch.autograd.grad(
                results, leaves, given, create_graph=keeps_graph, allow_unused=True
            )
            for i, gradient in zip(at, computed, strict=True):
                found[i] = gradient
    return found


def _device_of(inputs: Sequence[Tensor | None]) -> str:
    return next(x.device.type for x in inputs if x is not None)

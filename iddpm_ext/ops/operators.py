"""Registration of kernels with `torch.library`, and direct calls that bypass the dispatcher.

The operators are defined and implemented from Python. The backend is their last argument, so a compiled
graph keeps the choice that the public function made. The reference is not registered: it is called as plain
PyTorch, which autograd and compilers see through.

The dispatcher takes 8 microseconds per call, and 50 with a gradient, which is longer than many kernels. So
in eager mode, where nothing traces or transforms, calls go straight to the kernel, with an
`autograd.Function` for the gradient; all others go through the operator.

The gradient that a kernel computes cannot be differentiated again. Where that is asked for (`create_graph`),
the backward pass differentiates the reference instead, on the same inputs; this works any number of times.
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
    """An operator that calls its kernel directly where that is possible."""

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
    """Defines `iddpm_ext::<schema>` and returns the function to call.

    The schema's last argument is `str backend`, which selects from `kernels`; `fake` takes every argument and
    returns results of the right shapes, dtypes and strides for tracing.
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

    `setup(ctx, inputs, output)` saves what `backward(ctx, *gradients)` needs. `formula(ctx, *gradients)`
    computes the same in PyTorch's functions, for a gradient that is to be differentiated again. Both return
    one value per argument of the schema, the backend included. They hold for every backend and compiled code.
    """

    def either(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled() or transformed() or batched_gradients():
            return formula(ctx, *gradients)
        return backward(ctx, *gradients)

    torch.library.register_autograd(f"iddpm_ext::{name}", either, setup_context=setup, lib=LIBRARY)
    kernels = _DIRECT[name].kernels

    # Without `setup_context`, for which PyTorch inspects the arguments at every call.
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
    """Gradients in the wanted `inputs` of `function`, given those in its results; differentiable again.

    `function` consists of PyTorch's functions. Results whose gradient is None are ignored.
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
            # A view, so that a tensor that is passed as two arguments has a gradient in each.
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

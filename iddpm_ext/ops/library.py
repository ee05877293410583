"""Registration with `torch.library`, and the short way around it.

Operators of kernels are defined and implemented from Python. The backend is their last argument, so the
choice that the public function made is part of a compiled graph too. The reference never comes here: it
is called as the PyTorch that it is, so that autograd and compilers see through it.

The dispatcher takes 8 microseconds a call, and 50 with a gradient, which is longer than many kernels. So
plain tensors in eager mode, where nobody traces or transforms, go straight to the kernel, and get
their gradient from an `autograd.Function`; all else goes through the operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

LIBRARY = torch.library.Library("iddpm_ext", "DEF")

_PLAIN = (Tensor, nn.Parameter)
_DIRECT: dict[str, _Direct] = {}  # by the operator's name


class _Direct:
    """An operator that takes the short way where it may."""

    def __init__(self, overload: Callable[..., Any], kernels: Mapping[str, Callable[..., Any]]):
        self.overload, self.kernels = overload, kernels
        self.function: type[torch.autograd.Function] | None = None

    def __call__(self, *args: Any) -> Any:
        if not _observed():
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


def _observed() -> bool:
    """Whether somebody watches, traces or transforms what is called now."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._autograd._profiler_enabled()
    )


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
    name: str, setup: Callable[..., None], backward: Callable[..., tuple[Any, ...]]
) -> None:
    """Gives `iddpm_ext::<name>` a gradient.

    `setup(ctx, inputs, output)` saves, `backward(ctx, *gradients)` computes.
    One registration serves every backend and compiled code; `backward` returns one value an argument
    of the schema, the backend included.
    """
    torch.library.register_autograd(
        f"iddpm_ext::{name}", backward, setup_context=setup, lib=LIBRARY
    )
    kernels = _DIRECT[name].kernels

    # Without a `setup_context` of its own, whose arguments PyTorch binds by inspection at every call.
    def forward(ctx: Any, *args: Any) -> Any:
        output = kernels[args[-1]](*args[:-1])
        setup(ctx, args, output)
        return output

    # Kernels' gradients are not differentiable again: asking for that must not give a wrong answer.
    once = torch.autograd.function.once_differentiable(backward)
    members = {"forward": staticmethod(forward), "backward": staticmethod(once)}
    _DIRECT[name].function = type(name, (torch.autograd.Function,), members)

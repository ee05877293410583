"""Registration with `torch.library`: one path for eager and compiled code.

Operators of kernels are defined and implemented from Python, which costs 2-3 microseconds a call. The
backend is their last argument, so the choice that the public function made is part of a compiled graph
too. The reference never comes here: it is called as the PyTorch that it is, so that autograd and
compilers see through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

LIBRARY = torch.library.Library("iddpm_ext", "DEF")


def define(
    schema: str, kernels: Mapping[str, Callable[..., Any]], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Defines `iddpm_ext::<schema>` and returns its overload.

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
    return getattr(torch.ops.iddpm_ext, name).default


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

"""What PyTorch may do to tensors beside computing with them: trace, watch and transform."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation looks through tensors now.

    A kernel reads a tensor's memory, in which there is neither a tangent nor the dimension of `vmap`.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def observed() -> bool:
    """Whether somebody watches, traces or transforms what is called now."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or transformed()
    )

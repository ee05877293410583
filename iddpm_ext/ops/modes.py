"""What PyTorch may do to tensors beside computing with them: trace, watch and transform."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation looks through tensors now.

    A kernel reads a tensor's memory, in which there is neither a tangent nor the dimension of `vmap`.
    """
    if forward_ad._current_level >= 0:
        return True
    # A compiler cannot trace the other question; its graphs have the operator, and no zeros of it: a batch
    # is taken apart, a gradient of a gradient raises.
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None


def batched_gradients() -> bool:
    """Whether a backward pass gets a batch of gradients at once, by `is_grads_batched` of PyTorch."""
    return torch._C._dispatch_tls_is_dispatch_key_included("VmapMode")


def observed() -> bool:
    """Whether somebody watches, traces or transforms what is called now."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or transformed()
    )

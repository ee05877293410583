"""PyTorch's modes in which a kernel must not read memory: tracing, dispatch modes, transforms."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is active.

    A kernel reads a tensor's memory, which has neither the tangents nor the dimension of `vmap`.
    """
    if forward_ad._current_level >= 0:
        return True
    # A compiler cannot trace the query below. Its graphs contain the operator, under which `vmap` falls back
    # to a loop and second derivatives raise: no wrong results.
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None


def batched_gradients() -> bool:
    """Whether the backward pass runs for a batch of gradients (`is_grads_batched` of torch.autograd.grad)."""
    return torch._C._dispatch_tls_is_dispatch_key_included("VmapMode")


def observed() -> bool:
    """Whether calls are being traced, profiled, transformed, or seen by a dispatch mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or transformed()
    )

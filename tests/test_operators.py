"""Kernels are reached directly in eager mode and through their operators everywhere else, with one result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from iddpm_ext import ops
from iddpm_ext.ops.spec import unavailable

pytestmark = pytest.mark.skipif(
    unavailable("q_sample", "cpu", "cpu", torch.float32) is not None, reason="no C++ kernels here"
)
PARAMETERS = (torch.linspace(0.5, 1.5, 8), torch.linspace(-1, 1, 8))


class Operators(TorchDispatchMode):
    """The names of our operators that PyTorch's dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "iddpm_ext":
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def images() -> Tensor:
    return torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(0))


def normalised(x: Tensor) -> Tensor:
    return ops.group_norm_silu(x, 2, *PARAMETERS, backend="cpu")


def test_an_observer_sees_the_operator_and_the_same_numbers():
    direct = normalised(images())
    with Operators() as seen:
        observed = normalised(images())
    assert seen.names == ["iddpm_ext::group_norm_silu"]
    assert torch.equal(direct, observed)


def test_the_direct_gradient_is_the_operators():
    x = images().requires_grad_(True)
    weights = torch.linspace(-1, 1, x.numel()).view(x.shape)
    (direct,) = torch.autograd.grad((normalised(x) * weights).sum(), x)
    with Operators() as seen:
        (observed,) = torch.autograd.grad((normalised(x) * weights).sum(), x)
    assert seen.names == ["iddpm_ext::group_norm_silu", "iddpm_ext::group_norm_silu_bwd"]
    assert torch.equal(direct, observed)


def test_plain_results_need_no_gradient_under_no_grad():
    x = images().requires_grad_(True)
    with torch.no_grad():
        assert not normalised(x).requires_grad
    assert normalised(x).requires_grad


def test_a_first_derivative_keeps_to_the_kernels_and_a_second_does_not():
    x = images().requires_grad_(True)
    loss = normalised(x).square().sum()
    with Operators() as seen:
        torch.autograd.grad(loss, x, retain_graph=True)
        torch.autograd.grad(loss, x, create_graph=True)
    assert seen.names == ["iddpm_ext::group_norm_silu_bwd"]


def test_fake_tensors_get_fake_results():
    from torch._subclasses import FakeTensor, FakeTensorMode

    with FakeTensorMode() as mode:
        x = mode.from_tensor(images())
        weight, bias = (mode.from_tensor(p) for p in PARAMETERS)
        result = ops.group_norm_silu(x, 2, weight, bias, backend="cpu")
    assert isinstance(result, FakeTensor) and result.shape == x.shape


def test_extreme_inputs_of_silu_keep_their_limits():
    # A group of one channel and a huge scale: what reaches SiLU is far beyond where e^-x overflows.
    x = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    one, zero = torch.ones(1), torch.zeros(1)
    y = ops.group_norm_silu(x, 1, one * 1e4, zero, backend="cpu")
    exact = ops.group_norm_silu(x.double(), 1, one * 1e4, zero, backend="reference")
    assert torch.allclose(y.double(), exact, rtol=1e-6, atol=1e-30)
    assert bool((y[x < -0.1] == 0).all())

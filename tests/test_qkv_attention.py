"""Specific to attention: layouts without copies, memory, independence of batches and threads."""

from __future__ import annotations

from typing import Any

import pytest
import rounding
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from op_accuracy import assert_call_is_as_good_as_pytorchs
from op_calls import assert_close
from torch import Tensor

from iddpm_ext.ops import qkv_attention, unavailable
from iddpm_ext.ops.qkv_attention import compiled, pytorch, reference
from iddpm_ext.ops.qkv_attention.layout import split_heads
from iddpm_ext.ops.spec import REGISTRY, OpSpec

pytestmark = pytest.mark.skipif(
    unavailable("qkv_attention", "cpu", "cpu", torch.float32) is not None, reason="no C++ kernels"
)

LAYOUTS = ("by channel", "by token", "pitched")


def draw(n: int, channels: int, tokens: int, layout: str = "by channel", seed: int = 0) -> Tensor:
    values = torch.randn(n, channels, tokens, generator=torch.Generator().manual_seed(seed))
    if layout == "by channel":
        return values
    room = torch.full((n, tokens, channels + (5 if layout == "pitched" else 0)), float("nan"))
    return room[..., :channels].transpose(1, 2).copy_(values)


def result_and_gradient(qkv: Tensor, heads: int, dout: Tensor, **more) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = qkv_attention(qkv, heads, **more)
    return out.detach(), torch.autograd.grad(out, qkv, dout)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_of_a_batch_equals_the_sample_alone(layout):
    qkv, dout = draw(16, 3 * 2 * 12, 70, layout), draw(16, 24, 70, layout, seed=1)
    together = result_and_gradient(qkv, 2, dout)
    for i in (0, 7, 15):
        alone = result_and_gradient(qkv[i : i + 1], 2, dout[i : i + 1])
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize(("n", "heads"), [(1, 1), (1, 2), (3, 2)])
def test_threads_change_no_bit(n, heads):
    qkv, dout = draw(n, 3 * heads * 64, 200), draw(n, heads * 64, 200, seed=1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(result_and_gradient(qkv, heads, dout))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_read_both_layouts_where_they_lie(layout):
    x = draw(2, 24, 10, layout)
    assert compiled._readable(x) is x
    for order in ("legacy", "new"):
        storage = {v.untyped_storage().data_ptr() for v in split_heads(x, 2, order)}
        assert storage == {x.untyped_storage().data_ptr()}


@pytest.mark.parametrize("order", ["legacy", "new"])
def test_orders_are_permutations_of_the_channels(order):
    heads, width = 3, 5
    q, k, v = draw(2, 3 * heads * width, 11).view(2, 3, heads, width, 11).unbind(1)
    stacked = torch.stack([q, k, v], 2 if order == "legacy" else 1)
    got = qkv_attention(stacked.flatten(1, 3), heads, order=order)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(2, 3) for x in (q, k, v))
    )
    scores = float((q.mT.double() @ k.double()).abs().max()) / width**0.5
    bound = rounding.of_attention(scores, width, 11) * float(expected.abs().max())
    torch.testing.assert_close(
        got.double(), expected.transpose(2, 3).flatten(1, 2), rtol=0, atol=bound
    )


def test_backward_keeps_two_numbers_a_position_and_no_probabilities():
    n, heads, width, tokens = 1, 2, 8, 512
    saved: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    qkv = draw(n, 3 * heads * width, tokens).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        qkv_attention(qkv, heads)
    floats = n * heads * tokens * (3 * width + 2)  # qkv and the statistics
    assert sum(x.numel() for x in saved) == floats


def test_gradient_that_is_expanded_or_lies_otherwise_is_taken():
    for layout, other in (LAYOUTS[:2], LAYOUTS[1::-1]):
        qkv = draw(2, 3 * 16, 20, layout)
        expected = result_and_gradient(qkv, 2, draw(2, 16, 20, layout, seed=1))[1]
        got = result_and_gradient(qkv, 2, draw(2, 16, 20, other, seed=1))[1]
        assert torch.equal(got, expected)
        ones, one = torch.ones(2, 16, 20), torch.ones(1, 1, 1)
        expected = result_and_gradient(qkv, 2, ones)[1]
        assert torch.equal(result_and_gradient(qkv, 2, one.expand(2, 16, 20))[1], expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_does_not_lower_the_precision(backend):
    qkv = draw(2, 3 * 32, 40)
    expected = qkv_attention(qkv, 2, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = qkv_attention(qkv, 2, backend=backend)
        half = qkv_attention(qkv.bfloat16(), 2, backend=backend)
    assert torch.equal(got, expected)
    # One rounding of the inputs and one of the result; rounded scores of this size would show.
    exact = qkv_attention(qkv.bfloat16().double(), 2, backend="reference")
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, exact.bfloat16()) or (half - exact).abs().max() < 2**-8


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [0, 1, 64, 100])
def test_library_attention_computes_the_same(layout, tokens):
    """The CUDA backend is PyTorch's attention on views: here on a CPU."""
    qkv = draw(2, 3 * 48, tokens, layout)
    for order in ("legacy", "new"):
        q, k, v = split_heads(qkv, 3, order)
        largest = [float(x.abs().max()) if tokens else 0.0 for x in (q, k, v)]
        # Of a score, by Cauchy and Schwarz, of 16 numbers each.
        bound = rounding.of_attention(largest[0] * largest[1] * 16**0.5, 16, tokens) * largest[2]
        got = pytorch.qkv_attention(qkv, 3, order)
        expected = qkv_attention(qkv, 3, order=order)
        assert got.stride() == expected.stride()
        torch.testing.assert_close(got, expected, rtol=0, atol=2 * bound)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_compiles_into_one_graph(layout):
    qkv, dout = draw(2, 3 * 16, 20, layout), draw(2, 16, 20, seed=1)

    def call(x: Tensor) -> Tensor:
        return qkv_attention(x * 1.0, 2)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = []
    for function in (call, compiled):
        x = qkv.detach().requires_grad_()
        found.append(torch.autograd.grad(function(x), x, dout)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_operator_passes_opcheck(layout):
    qkv, dout = draw(2, 3 * 16, 20, layout), draw(2, 16, 20, seed=1)
    statistics = compiled.cpu(qkv, 2, "legacy")[1]
    torch.library.opcheck(
        torch.ops.iddpm_ext.qkv_attention_bwd.default,
        (dout, qkv, statistics, 2, "legacy", "cpu"),
        test_utils=("test_schema", "test_faketensor"),
    )


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3),
    heads=st.integers(1, 3),
    width=st.integers(1, 70),
    tokens=st.integers(1, 140),
    layout=st.sampled_from(LAYOUTS),
    order=st.sampled_from(["legacy", "new"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
# A case in which PyTorch's own run is exact by chance.
@example(
    n=1, heads=3, width=2, tokens=2, layout="by channel", order="legacy", dtype=torch.float32, size=30.0,
    seed=298,
)  # fmt: skip
def test_any_shape_is_as_exact_as_pytorch(
    n, heads, width, tokens, layout, order, dtype, size, seed
):
    qkv = size * draw(n, 3 * heads * width, tokens, layout, seed)
    qkv, dout = qkv.to(dtype), draw(n, heads * width, tokens, seed=seed + 1).to(dtype)

    def compute(spec: OpSpec, backend: str, call: dict[str, Any]) -> list[Tensor]:
        x = call["qkv"].detach().requires_grad_()
        out = spec.public(**{**call, "qkv": x}, backend=backend)
        return [out.detach(), torch.autograd.grad(out, x, dout.to(out.dtype))[0]]

    call = {"qkv": qkv, "num_heads": heads, "order": order}
    assert_call_is_as_good_as_pytorchs(REGISTRY["qkv_attention"], "cpu", call, compute)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pytorchs_fused_kernels_get_aligned_rows(dtype, monkeypatch):
    """A token's channels begin at a multiple of 16 bytes, wherever a head's do."""
    attention, seen = F.scaled_dot_product_attention, []

    def watched(*inputs):
        seen.extend(inputs)
        return attention(*inputs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    spec = REGISTRY["qkv_attention"]
    for case in spec.sample_inputs("cpu", dtype):
        seen.clear()
        qkv, heads = case.kwargs["qkv"], case.kwargs["num_heads"]
        order = case.kwargs.get("order", "legacy")
        found = pytorch.qkv_attention(qkv.flatten(2), heads, order)
        expected = reference.qkv_attention(qkv.flatten(2), heads, order)
        exact = reference.qkv_attention(qkv.flatten(2).double(), heads, order)
        assert_close(found, exact, expected, dtype, spec.roundings)
        width = qkv.shape[1] // (3 * heads)
        if width * qkv.element_size() % 16 == 0:
            for x in seen:
                steps = (*x.stride()[:3], x.storage_offset())
                assert all(step * x.element_size() % 16 == 0 for step in steps), case.label

"""The self-attention of the network's feature maps, from the packed q, k and v of all heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from iddpm_ext.ops import checks
from iddpm_ext.ops.operators import define, differentiate, vector_jacobian
from iddpm_ext.ops.qkv_attention import compiled, pytorch, reference
from iddpm_ext.ops.qkv_attention.layout import empty_like_rows
from iddpm_ext.ops.spec import FLOAT32_AND_HALVES, OpSpec, register, resolve_backend
from iddpm_ext.scalars import plain

NAME = "qkv_attention"

#: Orders of the 3C channels of qkv: [heads][q, k, v][d], or [q, k, v][heads][d].
ORDERS = ("legacy", "new")


def qkv_attention(
    qkv: Tensor, num_heads: int, *, order: str = "legacy", backend: str = "auto"
) -> Tensor:
    """Attention of every position to all positions of its sample, in several heads.

        out_i = sum_j p_ij v_j,   p_ij = softmax_j(q_i . k_j / sqrt(d))   in each head of width d

    Vaswani et al., *Attention is all you need*, equation (1). Scores, softmax and sums are in float32 for
    16-bit inputs too, in an order that depends on neither the batch nor the threads.

    Args:
        qkv: [N, 3C, T] or [N, 3C, H, W] with T = H W positions, contiguous or channels_last, also with
            gaps; tensors of other strides are copied. float32, bfloat16 or float16; any floating dtype for
            the reference.
        num_heads: C = num_heads d.
        order: of the channels: "legacy" is [heads][q, k, v][d], as in the Improved DDPM checkpoints;
            "new" is [q, k, v][heads][d], an option of guided diffusion.
        backend: "auto", "reference", "cpu" or "cuda" (PyTorch's scaled-dot-product attention on views).

    Returns:
        [N, C, T] or [N, C, H, W] with the dtype and the memory format of qkv.

    Raises:
        TypeError, ValueError: for an argument of a wrong type, shape or value.
        RuntimeError: if an explicit backend does not support the call.

    Differentiable in qkv any number of times. For the backward pass two numbers per position and head are
    saved, from which it recomputes the probabilities.
    """
    num_heads = plain(num_heads)
    _check(qkv, num_heads, order)
    chosen = resolve_backend(NAME, backend, qkv.device, qkv.dtype)
    rows = qkv.flatten(2)
    if chosen == "cpu":
        out = _op(rows, num_heads, order, chosen)[0]
    else:
        out = SPEC.kernels[chosen](rows, num_heads, order)
    return out.view(out.shape[0], out.shape[1], *qkv.shape[2:])


def _check(qkv: Tensor, num_heads: int, order: str) -> None:
    checks.floating(NAME, "qkv", qkv)
    if qkv.ndim not in (3, 4):
        raise ValueError(
            f"{NAME}: qkv must be [N, 3C, T] or [N, 3C, H, W], got shape {list(qkv.shape)}"
        )
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"{NAME}: num_heads must be an integer, got {num_heads!r}")
    channels = qkv.shape[1]
    if channels % 3 or channels == 0:
        raise ValueError(f"{NAME}: qkv must have 3C channels, got {channels}")
    if num_heads < 1 or channels // 3 % num_heads:
        raise ValueError(
            f"{NAME}: num_heads must divide the {channels // 3} channels, got {num_heads}"
        )
    if order not in ORDERS:
        raise ValueError(f"{NAME}: order must be one of {', '.join(ORDERS)}, got {order!r}")


def _fake(qkv: Tensor, num_heads: int, order: str, backend: str) -> tuple[Tensor, Tensor]:
    return empty_like_rows(qkv, qkv.shape[1] // 3), compiled.empty_statistics(qkv, num_heads)


def _fake_bwd(dout: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    return empty_like_rows(qkv, qkv.shape[1])


SPEC = register(
    OpSpec(
        name=NAME,
        summary="self-attention from packed q, k and v",
        public=qkv_attention,
        kernels={
            "reference": reference.qkv_attention,
            "cpu": compiled.cpu,
            "cuda": pytorch.qkv_attention,
        },
        dtypes=dict.fromkeys(("cpu", "cuda"), FLOAT32_AND_HALVES),
        differentiable=("qkv",),
        batched=("qkv",),
        # The rounding of a score s puts a relative error of |s| roundings on its exponential; |s| reaches
        # 400 in one case, and the gradient multiplies differences of such numbers.
        roundings=16.0,
    )
)

_op = define(
    "qkv_attention(Tensor qkv, int num_heads, str order, str backend) -> (Tensor, Tensor)",
    {"cpu": compiled.cpu},
    _fake,
)

_op_bwd = define(
    "qkv_attention_bwd(Tensor dout, Tensor qkv, Tensor statistics, int num_heads, "
    "str order, str backend) -> Tensor",
    {"cpu": compiled.cpu_bwd},
    _fake_bwd,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, *ctx.options = inputs
    ctx.save_for_backward(qkv, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None, None
    return _op_bwd(dout, *ctx.saved_tensors, *ctx.options), None, None, None


def _formula(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, _ = ctx.saved_tensors
    num_heads, order, _ = ctx.options

    def attention(qkv: Tensor) -> tuple[Tensor]:
        return (reference.qkv_attention(qkv, num_heads, order),)

    return (*vector_jacobian(attention, [qkv], [True], [dout]), None, None, None)


differentiate(NAME, _setup, _backward, _formula)

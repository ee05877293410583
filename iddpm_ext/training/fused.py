"""A `UNet` fused for training on a GPU: channels_last, few passes over memory, weights in half precision.

It has the fusions of `engines/cuda/network.py`, with gradients: the normalisation reads the convolution's
bias, the skip connection and the parts of the concatenation before it; its backward pass sums their
gradients.

Nothing here is specific to CUDA: all functions are PyTorch's or ops of this package, on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iddpm_ext.networks.unet import (
    AttentionBlock,
    Block,
    Downsample,
    GroupNormSiLU,
    ResBlock,
    UNet,
    Upsample,
    upsample_to,
)
from iddpm_ext.ops import group_norm_silu, qkv_attention
from iddpm_ext.ops.adamw_ema.layout import leaves_no_gaps
from iddpm_ext.ops.pixel_rows import channel_sums, images_of, rows_of, settle
from iddpm_ext.ops.rows import no_autocast

_LAST = torch.channels_last


class FusedTraining:
    """The network in training mode, with gradients for the parameters of `model`.

    model: float32 parameters.
    dtype: of the features: float32, bfloat16 or float16. The first and last convolution, the timestep path,
        and all sums and statistics are float32.

    Attributes:
        copies: copies of parameters in `dtype`, which the optimiser updates with the parameters.
    """

    def __init__(self, model: UNet, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        self.copies: dict[Tensor, Tensor] = {}
        blocks: list[Any] = [*model.input_blocks, model.middle_block, *model.output_blocks]
        layers = [layer for block in blocks for layer in block.modules()]
        self._res_blocks = [layer for layer in layers if isinstance(layer, ResBlock)]
        if dtype == torch.float32:
            return
        for layer in layers:
            if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)) and layer is not blocks[0][0]:
                self._copy(layer.weight, wants_gradient=True)
            if isinstance(layer, AttentionBlock):
                self._copy(layer.qkv.get_parameter("bias"), wants_gradient=False)

    def _copy(self, parameter: Tensor, *, wants_gradient: bool) -> None:
        copy = parameter.detach().to(self.dtype, copy=True)
        self.copies[parameter] = copy.requires_grad_(wants_gradient)

    def _weight(self, layer: nn.Module) -> Tensor:
        weight = layer.get_parameter("weight")
        return self.copies.get(weight, weight)

    def _matrix(self, layer: nn.Module) -> Tensor:
        """The weight [K, C] of a 1x1 convolution."""
        return self._weight(layer).flatten(1)

    def collect(self) -> None:
        """Adds the gradients of the copies to the float32 gradients of the parameters."""
        fresh: tuple[list[Tensor], list[Tensor]] = ([], [])
        more: tuple[list[Tensor], list[Tensor]] = ([], [])
        for parameter, copy in self.copies.items():
            if copy.grad is None:
                continue
            into = fresh if parameter.grad is None else more
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            for values, value in zip(
                into, _in_memory_order(parameter.grad, copy.grad), strict=True
            ):
                values.append(value)
            copy.grad = None
        if fresh[0]:
            torch._foreach_copy_(*fresh)
        if more[0]:
            torch._foreach_add_(*more)

    def __call__(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        low_res: Tensor | None = None,
    ) -> Tensor:
        """As `UNet.forward`: x float32 [N, C, H, W] -> float32 [N, C_out, H, W]."""
        model: Any = self.model
        with no_autocast(x.device.type):
            embeddings = self._embeddings(model.embed(timesteps, y))
            first, head = model.input_blocks[0][0], model.out
            if low_res is not None:
                x = torch.cat([x, upsample_to(low_res, x)], dim=1)
            h = F.conv2d(x.contiguous(memory_format=_LAST), first.weight, None, padding=1)
            # Of one-channel images no format can be told, so the convolution may return the other one.
            features = _Features(h.to(self.dtype, memory_format=_LAST), None, first.bias)
            skips = [features]
            for block in model.input_blocks[1:]:
                features = self._block(block, features, embeddings)
                skips.append(features)
            features = self._block(model.middle_block, features, embeddings)
            for block in model.output_blocks:
                features = self._block(block, features, embeddings, skips.pop())
            h = self._normalised(head[0], features)
            return F.conv2d(h.float(), head[2].weight, head[2].bias, padding=1)

    def _embeddings(self, emb: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The embeddings of each residual block, by one matrix product: (scale, shift), or (bias,)."""
        weights, biases, widths = [], [], list[int]()
        for block in self._res_blocks:
            linear: Any = block.emb_layers[1]
            weights.append(self._weight(linear))
            conv: Any = block.in_layers[2]
            # If the embedding is only added, it includes the bias of the convolution before.
            biases.append(linear.bias if block.scale_shift else linear.bias + conv.bias)
            widths += [conv.out_channels] * (2 if block.scale_shift else 1)
        product = F.linear(F.silu(emb).to(self.dtype), torch.cat(weights))
        pieces = iter((product.float() + torch.cat(biases)).split(widths, dim=1))
        for block in self._res_blocks:
            yield (next(pieces), next(pieces)) if block.scale_shift else (next(pieces),)

    def _block(
        self,
        block: Block,
        features: _Features,
        embeddings: Iterator[tuple[Tensor, ...]],
        joined: _Features | None = None,
    ) -> _Features:
        for layer in block:
            if isinstance(layer, ResBlock):
                features = self._res_block(layer, features, next(embeddings), joined)
            elif isinstance(layer, AttentionBlock):
                features = self._attention(layer, features)
            elif isinstance(layer, Upsample):
                features = self._resample(layer.conv, _doubled(features.settled()))
            else:
                assert isinstance(layer, Downsample)
                if isinstance(layer.op, nn.Conv2d):
                    features = self._resample(layer.op, features.settled(), stride=2)
                else:
                    features = _Features(F.avg_pool2d(features.settled(), 2))
            joined = None
        return features

    def _resample(self, conv: nn.Module, h: Tensor, stride: int = 1) -> _Features:
        if not isinstance(conv, nn.Conv2d):
            return _Features(h)
        h = F.conv2d(h, self._weight(conv), None, stride=stride, padding=1)
        return _Features(h, None, conv.bias)

    def _res_block(
        self,
        block: ResBlock,
        features: _Features,
        embedding: tuple[Tensor, ...],
        joined: _Features | None,
    ) -> _Features:
        in_layers: Any = block.in_layers
        out_layers: Any = block.out_layers
        skip: Any = block.skip_connection
        in_norm, in_conv, out_norm, out_conv = (
            in_layers[0], in_layers[2], out_layers[0], out_layers[3],
        )  # fmt: skip
        beside = None if joined is None else joined.settled()
        h = self._normalised(in_norm, features, beside)
        h = F.conv2d(_resampled(h, block.resample), self._weight(in_conv), None, padding=1)
        if block.scale_shift:
            h = out_norm(h, *embedding, channel_bias=in_conv.bias)
        else:
            h = out_norm(h, channel_bias=embedding[0])
        h = F.conv2d(out_layers[2](h), self._weight(out_conv), None, padding=1)
        parts = [features.h] if beside is None else [features.h, beside]
        if isinstance(skip, nn.Identity):
            whole = parts[0] if beside is None else torch.cat(parts, dim=1)
            return _Features(h, _resampled(whole, block.resample), out_conv.bias)
        h = _AddProduct.apply(
            h, self._matrix(skip), *(_resampled(part, block.resample) for part in parts)
        )
        return _Features(h, None, out_conv.bias + skip.bias)

    def _attention(self, layer: AttentionBlock, features: _Features) -> _Features:
        h = self._normalised(layer.norm, features)
        n, c, height, width = h.shape
        bias = layer.qkv.get_parameter("bias")
        rounded = self.copies.get(bias, bias).detach()
        rows = _Linear.apply(rows_of(h), self._matrix(layer.qkv), bias, rounded)
        out = qkv_attention(
            rows.view(n, height * width, 3 * c).transpose(1, 2),
            layer.num_heads, order=layer.order, backend=layer.backend,
        )  # fmt: skip
        rows = out.transpose(1, 2).reshape(-1, c)
        images = _Product.apply(rows, self._matrix(layer.proj_out), h)
        return _Features(images, features.h, layer.proj_out.get_parameter("bias"))

    def _normalised(
        self, norm: GroupNormSiLU, features: _Features, beside: Tensor | None = None
    ) -> Tensor:
        """The normalised features; the same pass writes their sum for later layers."""
        common: Any = {"eps": norm.eps, "silu": norm.silu, "x2": beside, "backend": norm.backend}
        if features.bias is None and features.residual is None:
            return group_norm_silu(features.h, norm.num_groups, norm.weight, norm.bias, **common)
        y, features.h = group_norm_silu(
            features.h, norm.num_groups, norm.weight, norm.bias,
            residual=features.residual, channel_bias=features.bias, return_sum=True, **common,
        )  # fmt: skip
        features.residual = features.bias = None
        return y


class _Features:
    """A feature map h + residual + bias [N, C, H, W] whose sums are not computed yet; bias is [C]."""

    def __init__(self, h: Tensor, residual: Tensor | None = None, bias: Tensor | None = None):
        self.h, self.residual, self.bias = h, residual, bias

    def settled(self) -> Tensor:
        """The sum, computed now unless it has been already."""
        if self.residual is not None or self.bias is not None:
            self.h = settle(self.h, self.residual, self.bias)
        self.residual = self.bias = None
        return self.h


class _AddProduct(torch.autograd.Function):
    """h + a 1x1 convolution of the concatenation of parts, in place, without building the latter."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, matrix: Tensor, *parts: Tensor) -> Tensor:
        rows, begin = h.permute(0, 2, 3, 1).view(-1, h.shape[1]), 0
        for part in parts:
            columns = matrix[:, begin : begin + part.shape[1]]
            rows.addmm_(rows_of(part), columns.t())
            begin += part.shape[1]
        ctx.save_for_backward(matrix, *parts)
        ctx.mark_dirty(h)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        matrix, *parts = ctx.saved_tensors
        rows, begin = rows_of(dy), 0
        dmatrix = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
        dparts = []
        for part in parts:
            own = slice(begin, begin + part.shape[1])
            dparts.append(images_of(rows @ matrix[:, own], part))
            torch.mm(rows.t(), rows_of(part), out=dmatrix[:, own])
            begin += part.shape[1]
        return (dy, dmatrix, *dparts)


class _Product(torch.autograd.Function):
    """rows @ matrix.t() as images like `like`, which are no view, as later sums are written into them.

    Autograd copies gradients of views that are written to several times, and drops their memory format.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor, like: Tensor) -> Tensor:
        ctx.save_for_backward(rows, matrix)
        n, _, height, width = like.shape
        images = torch.empty(
            (n, len(matrix), height, width),
            dtype=rows.dtype,
            device=rows.device,
            memory_format=_LAST,
        )
        pixels = images.permute(0, 2, 3, 1).view(-1, len(matrix))
        torch.mm(rows, matrix.t(), out=pixels)
        return images

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, matrix = ctx.saved_tensors
        dy = rows_of(dy)
        return dy @ matrix, dy.t() @ rows, None


class _Linear(torch.autograd.Function):
    """rows @ matrix.t() + bias. rounded: the bias in the dtype of rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor, bias: Tensor, rounded: Tensor) -> Tensor:
        ctx.save_for_backward(rows, matrix)
        return torch.addmm(rounded, rows, matrix.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, matrix = ctx.saved_tensors
        return dy @ matrix, dy.t() @ rows, channel_sums(dy), None


def _in_memory_order(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Flat views in memory order, if the layouts are equal; then one kernel takes many tensors."""
    first = tensors[0]
    if all(leaves_no_gaps(t) and _strides(t) == _strides(first) for t in tensors):
        return tuple(t.as_strided((t.numel(),), (1,)) for t in tensors)
    return tensors


def _strides(x: Tensor) -> list[int]:
    """The strides of the dimensions that have more than one element."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def _resampled(x: Tensor, how: str | None) -> Tensor:
    if how is None:
        return x
    return _doubled(x) if how == "up" else F.avg_pool2d(x, 2)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")

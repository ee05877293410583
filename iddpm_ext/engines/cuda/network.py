"""A `UNet` as the CUDA engine computes it: channels_last, and few passes over memory.

Convolutions run without their bias. The normalisation that reads their result adds it, and the skip
connection, and writes the sum for the next skip connection; it reads both parts of a concatenation where
they are. 1x1 convolutions are matrix products on the rows of pixels.

Nothing here is specific to CUDA: all functions are PyTorch's or ops of this package, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iddpm_ext.engines.cuda import kernels
from iddpm_ext.networks.unet import (
    AttentionBlock,
    Downsample,
    GroupNormSiLU,
    ResBlock,
    UNet,
    Upsample,
)
from iddpm_ext.ops import group_norm_silu, qkv_attention
from iddpm_ext.ops.pixel_rows import settle

_LAST = torch.channels_last


class Weights:
    """Copies of weights in the layout and dtype of the engine, which stay where they are.

    A captured graph holds their addresses, so changed weights are copied into them again.
    """

    def __init__(self) -> None:
        self._copies: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def add(self, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that holds what `make` returns, now and after every `refresh`."""
        # Cloned, since a conversion that changes nothing returns the weight itself.
        copy = make().clone(memory_format=torch.preserve_format)
        self._copies.append((copy, make))
        return copy

    def refresh(self) -> None:
        """Copy all weights again."""
        for copy, make in self._copies:
            copy.copy_(make())


class Features:
    """A feature map h + residual + bias [N, C, H, W] whose sums are not computed yet; bias is [C]."""

    def __init__(self, h: Tensor, residual: Tensor | None = None, bias: Tensor | None = None):
        self.h, self.residual, self.bias = h, residual, bias

    def settled(self, backend: str) -> Tensor:
        """The sum, computed now unless it has been already."""
        if self.residual is not None or self.bias is not None:
            self.h = settle(self.h, self.residual, self.bias, backend)
        self.residual = self.bias = None
        return self.h


class _Norm(NamedTuple):
    groups: int
    eps: float
    silu: bool
    weight: Tensor
    bias: Tensor


# A layer: (features, embeddings, the encoder's features to concatenate) -> features.
_Layer = Callable[[Features, Tensor, "Features | None"], Features]


class FusedNetwork:
    """The network in evaluation mode.

    dtype: of the features. The first and last convolution, and all sums and statistics, are float32: the
        noise of the last steps is finer than half precision resolves on pixels near -1 or 1.
    backend: of the op `group_norm_silu`, and of `qkv_attention` where that supports it.
    """

    def __init__(self, model: UNet, dtype: torch.dtype, backend: str = "auto"):
        self.dtype, self._backend = dtype, backend
        self._kernels = backend if backend in ("cuda", "reference") else "auto"
        self._attention_backend = backend if backend in ("cpu", "cuda", "reference") else "auto"
        self._weights = Weights()
        self._embedding_biases: list[Callable[[], Tensor]] = []
        inputs: list[Any] = list(model.input_blocks)
        outputs: list[Any] = list(model.output_blocks)
        head: Any = model.out
        self._first = self._end_kernel(inputs[0][0])
        self._first_bias = self._float(inputs[0][0].bias)
        self.floats = 0
        self._down = [self._block(block) for block in inputs[1:]]
        self._middle = self._block(model.middle_block)
        self._up = [self._block(block) for block in outputs]
        self._head_norm = self._norm(head[0])
        self._head = self._end_kernel(head[2])
        self._head_bias = self._float(head[2].bias)
        #: float32 [floats], to be added to the embeddings: the biases of the convolutions to whose
        #: results embeddings are added.
        self.embedding_bias = self._weights.add(
            lambda: torch.cat([bias() for bias in self._embedding_biases])
        )

    def refresh(self) -> None:
        """Copies the model's weights again, in place."""
        self._weights.refresh()

    def __call__(self, x: Tensor, embeddings: Tensor) -> Tensor:
        """The network's output, float32 [N, C_out, H, W].

        x: float32 [N, C, H, W]. embeddings: float32 [N, floats] of any strides: the projections of all
        blocks in order, plus `embedding_bias`.
        """
        h = kernels.first_convolution(x, self._first, self.dtype, self._kernels)
        features = Features(h, None, self._first_bias)
        skips = [features]
        for layers in self._down:
            features = _run(layers, features, embeddings)
            skips.append(features)
        features = _run(self._middle, features, embeddings)
        for layers in self._up:
            features = _run(layers, features, embeddings, skips.pop())
        y = self._normalised(self._head_norm, features)
        return kernels.last_convolution(y, self._head, self._head_bias, self._kernels)

    # ---- weights

    def _kernel(self, conv: Any) -> Tensor:
        """A convolution's weight [K, C, 3, 3], channels_last."""
        return self._weights.add(
            lambda: conv.weight.detach().to(self.dtype).contiguous(memory_format=_LAST)
        )

    def _end_kernel(self, conv: Any) -> Tensor:
        """The weight [K, C, 3, 3] of the first or last convolution, float32."""
        return self._weights.add(lambda: kernels.columns_last(conv.weight.detach().float()))

    def _doubling_kernel(self, conv: Any) -> Tensor:
        """[4K, C, 2, 2], for a convolution of a doubled image."""

        def make() -> Tensor:
            four = kernels.doubling_weight(conv.weight.detach().float())
            return four.to(self.dtype).contiguous(memory_format=_LAST)

        return self._weights.add(make)

    def _matrix(self, conv: Any) -> Tensor:
        """The weight [K, C] of a 1x1 convolution."""
        return self._weights.add(lambda: conv.weight.detach().flatten(1).to(self.dtype))

    def _float(self, *parameters: Any) -> Tensor:
        """The sum of parameters, float32."""
        return self._weights.add(lambda: sum(p.detach().float() for p in parameters))

    def _norm(self, norm: GroupNormSiLU) -> _Norm:
        return _Norm(
            norm.num_groups, norm.eps, norm.silu, self._float(norm.weight), self._float(norm.bias)
        )

    # ---- layers

    def _block(self, block: Any) -> list[_Layer]:
        return [self._layer(layer) for layer in block]

    def _layer(self, layer: nn.Module) -> _Layer:
        if isinstance(layer, ResBlock):
            return self._res_block(layer)
        if isinstance(layer, AttentionBlock):
            return self._attention(layer)
        if isinstance(layer, Upsample):
            return self._upsample(layer.conv)
        assert isinstance(layer, Downsample)
        if isinstance(layer.op, nn.Conv2d):
            return self._strided(layer.op)
        return lambda features, *_: Features(_halved(self._settled(features)))

    def _upsample(self, conv: nn.Module) -> _Layer:
        if not isinstance(conv, nn.Conv2d):
            return lambda features, *_: Features(_doubled(self._settled(features)))
        kernel, bias = self._doubling_kernel(conv), self._float(conv.bias)

        def run(features: Features, *_: Any) -> Features:
            h = kernels.doubled_convolution(self._settled(features), kernel, self._kernels)
            return Features(h, None, bias)

        return run

    def _strided(self, conv: nn.Conv2d) -> _Layer:
        kernel, bias = self._kernel(conv), self._float(conv.bias)

        def run(features: Features, *_: Any) -> Features:
            h = F.conv2d(self._settled(features), kernel, None, stride=2, padding=1)
            return Features(h, None, bias)

        return run

    def _settled(self, features: Features) -> Tensor:
        return features.settled(self._kernels)

    def _res_block(self, layer: ResBlock) -> _Layer:
        in_norm, out_norm = (self._norm(layers[0]) for layers in _pair(layer))
        first_conv, second_conv = (layers[-1] for layers in _pair(layer))
        doubles = layer.resample == "up"
        first = self._doubling_kernel(first_conv) if doubles else self._kernel(first_conv)
        second = self._kernel(second_conv)
        own = slice(self.floats, self.floats + self._claim(layer, first_conv))
        first_bias = self._float(first_conv.bias) if layer.scale_shift else None
        skip_conv: Any = layer.skip_connection
        matrix = self._matrix(skip_conv) if isinstance(skip_conv, nn.Conv2d) else None
        biases = [second_conv.bias] if matrix is None else [second_conv.bias, skip_conv.bias]
        bias = self._float(*biases)
        resized = {None: _same, "up": _doubled, "down": _halved}[layer.resample]

        def run(features: Features, embeddings: Tensor, joined: Features | None) -> Features:
            beside = None if joined is None else self._settled(joined)
            y = self._normalised(in_norm, features, beside)
            if doubles:
                h = kernels.doubled_convolution(y, first, self._kernels)
            else:
                h = F.conv2d(resized(y), first, None, padding=1)
            embedding = embeddings[:, own]
            if layer.scale_shift:
                scale, shift = embedding.chunk(2, dim=1)
                y = self._normalised(out_norm, Features(h, None, first_bias), None, scale, shift)
            else:
                y = self._normalised(out_norm, Features(h, None, embedding))
            h = F.conv2d(y, second, None, padding=1)
            parts = [features.h] if beside is None else [features.h, beside]
            if matrix is None:
                whole = parts[0] if beside is None else torch.cat(parts, dim=1)
                return Features(h, resized(whole), bias)
            begin = 0
            for part in parts:  # each part of the concatenation on its own, which is never built
                rows, columns = _rows(resized(part)), matrix[:, begin : begin + part.shape[1]]
                _rows(h).addmm_(rows, columns.t())
                begin += part.shape[1]
            return Features(h, None, bias)

        return run

    def _claim(self, layer: ResBlock, conv: nn.Conv2d) -> int:
        """Reserves the block's place in the embeddings and adds conv's bias to it; returns its width."""
        linear: Any = layer.emb_layers[1]
        self.floats += linear.out_features
        if layer.scale_shift:
            zeros = torch.zeros_like(linear.bias, dtype=torch.float32).detach()
            self._embedding_biases.append(lambda: zeros)
        else:
            assert conv.bias is not None
            self._embedding_biases.append(lambda: conv.bias.detach().float())  # type: ignore[union-attr]
        return linear.out_features

    def _attention(self, layer: AttentionBlock) -> _Layer:
        norm, qkv_matrix = self._norm(layer.norm), self._matrix(layer.qkv)
        qkv_bias = self._weights.add(lambda: layer.qkv.bias.detach().to(self.dtype))  # type: ignore[union-attr]
        matrix, bias = self._matrix(layer.proj_out), self._float(layer.proj_out.bias)

        def run(features: Features, *_: Any) -> Features:
            y = self._normalised(norm, features)
            n, c, height, width = y.shape
            qkv = F.linear(_rows(y), qkv_matrix, qkv_bias).view(n, height * width, 3 * c)
            out = qkv_attention(
                qkv.transpose(1, 2),
                layer.num_heads,
                order=layer.order,
                backend=self._attention_backend,
            )
            h = torch.mm(out.transpose(1, 2).reshape(-1, c), matrix.t())
            return Features(_images(h, n, height, width), features.h, bias)

        return run

    def _normalised(
        self,
        norm: _Norm,
        features: Features,
        beside: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """The normalised features; the same pass writes their sum for later layers.

        Not within a residual block, where the bias is per sample, or comes with scale and shift: no later
        layer reads that sum.
        """
        common: Any = {"eps": norm.eps, "silu": norm.silu, "x2": beside, "backend": self._backend}
        bias, residual = features.bias, features.residual
        inner = scale is not None or (bias is not None and bias.dim() == 2)
        if inner or (bias is None and residual is None):
            return group_norm_silu(
                features.h, norm.groups, norm.weight, norm.bias,
                scale=scale, shift=shift, channel_bias=bias, **common,
            )  # fmt: skip
        y, features.h = group_norm_silu(
            features.h, norm.groups, norm.weight, norm.bias,
            residual=residual, channel_bias=bias, return_sum=True, **common,
        )  # fmt: skip
        features.residual = features.bias = None
        return y


def _run(
    layers: list[_Layer], features: Features, embeddings: Tensor, joined: Features | None = None
) -> Features:
    for layer in layers:
        features, joined = layer(features, embeddings, joined), None
    return features


def _pair(layer: ResBlock) -> tuple[Any, Any]:
    return layer.in_layers, layer.out_layers


def _rows(x: Tensor) -> Tensor:
    """x [N, C, H, W], channels_last, as the matrix [N H W, C]; always a view, since it is written to."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def _images(rows: Tensor, n: int, height: int, width: int) -> Tensor:
    return rows.view(n, height, width, -1).permute(0, 3, 1, 2)


def _same(x: Tensor) -> Tensor:
    return x


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)

"""Lays out a `UNet` as a plan for the CPU engine: which kernel reads which buffer, in which order.

Activations are NHWC float32. Concatenation costs nothing: an encoder's output and the decoder's
features that it is concatenated with are written side by side into one wide buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from iddpm_ext import _native
from iddpm_ext.engines.base import NotSupported
from iddpm_ext.engines.cpu import pack
from iddpm_ext.engines.cpu import rows as ops
from iddpm_ext.engines.cpu.algorithms import Algorithm, ConvShape
from iddpm_ext.networks.unet import AttentionBlock, Downsample, ResBlock, UNet, Upsample

_ALIGN = 16  # floats: 64 bytes


@dataclass(frozen=True)
class Map:
    """A feature map of the plan: `channels` of `pixels` in an NHWC buffer."""

    buffer: ops.Buffer
    channels: int
    size: tuple[int, int]

    @property
    def pixels(self) -> int:
        """Of one sample."""
        return self.size[0] * self.size[1]

    def part(self, first: int, channels: int) -> Map:
        """Some of the channels."""
        return Map(self.buffer.channel(first), channels, self.size)


@dataclass(frozen=True)
class Plan:
    """Rows of operations, and what they need to run."""

    rows: list[ops.Row]
    arena_floats: int
    shared_floats: int
    scratch_floats: int
    embedding_floats: int
    convolutions: list[tuple[int, ConvShape]]  # row number and shape of each that had a choice


class Arena:
    """Hands out buffers within one block of memory and takes them back; first fit."""

    def __init__(self, base: int):
        self.base = base
        self.size = 0
        self._taken: dict[int, int] = {}

    def take(self, floats: int) -> int:
        """The address of a free range of that many floats."""
        floats += -floats % _ALIGN
        start = 0
        for begin, end in sorted(self._taken.items()):
            if begin - start >= floats:
                break
            start = end
        self._taken[start] = start + floats
        self.size = max(self.size, start + floats)
        return self.base + 4 * start

    def free(self, address: int) -> None:
        """Give back what `take` returned."""
        del self._taken[(address - self.base) // 4]


# (module, form, make) -> the packed tensor: `make()` the first time, the same tensor afterwards.
Packer = Callable[[nn.Module, str, Callable[[], Tensor]], Tensor]


class Planner:
    """Emits the rows of one network for one batch size, image size and number of threads.

    Addresses count from `base`, so a first pass with base 0 tells how much memory the plan needs.
    """

    def __init__(
        self,
        model: UNet,
        batch_size: int,
        size: tuple[int, int],
        threads: int,
        *,
        choose: Callable[[ConvShape], Algorithm],
        bf16: bool,
        packer: Packer,
        base: int = 0,
    ):
        self.model, self.batch, self.size, self.threads = model, batch_size, size, threads
        self.choose, self.bf16, self.packer = choose, bf16, packer
        self.arena = Arena(base)
        self.rows: list[ops.Row] = []
        self.convolutions: list[tuple[int, ConvShape]] = []
        self.shared = self.scratch = self.embedding = 0

    def plan(self) -> Plan:
        """The whole network, from the caller's input to the caller's output."""
        inputs: list[Any] = list(self.model.input_blocks)
        outputs: list[Any] = list(self.model.output_blocks)
        image = self._new(inputs[0][0].in_channels, self.size)
        self.rows.append(ops.input_row(image.channels, image.pixels, image.buffer))

        h, joined = image, []
        for block, partner in zip(inputs, reversed(outputs), strict=True):
            width, size = _shape_after(block, h)
            wide = self._new(partner[0].in_layers[0].num_channels, size)
            own = wide.part(wide.channels - width, width)
            self._block(block, h, own)
            joined.append((wide, wide.part(0, wide.channels - width)))
            h = own
        self._free(image)

        wide, rest = joined.pop()
        self._block(self.model.middle_block, h, rest)
        for block in outputs:
            upper, out = joined.pop() if joined else (None, self._new(*_shape_after(block, wide)))
            self._block(block, wide, out)
            self._free(wide)
            wide = upper or out
        self._head(out)
        return Plan(
            rows=self.rows,
            arena_floats=self.arena.size,
            shared_floats=self.shared,
            scratch_floats=self.scratch,
            embedding_floats=self.embedding,
            convolutions=self.convolutions,
        )

    def _new(self, channels: int, size: tuple[int, int]) -> Map:
        floats = self.batch * size[0] * size[1] * channels
        return Map(ops.Buffer(self.arena.take(floats), channels), channels, size)

    def _free(self, *maps: Map) -> None:
        for m in maps:
            self.arena.free(m.buffer.address)

    def _block(self, block: Any, source: Map, out: Map) -> None:
        layers = list(block)
        h = source
        for i, layer in enumerate(layers):
            target = out if i == len(layers) - 1 else self._new(*_shape_after([layer], h))
            self._layer(layer, h, target)
            if h is not source:
                self._free(h)
            h = target

    def _layer(self, layer: Any, source: Map, out: Map) -> None:
        if isinstance(layer, ResBlock):
            self._res_block(layer, source, out)
        elif isinstance(layer, AttentionBlock):
            self._attention(layer, source, out)
        elif isinstance(layer, Downsample):
            self._gathered(layer.op, source, out, stride=2)
        elif isinstance(layer, Upsample):
            self._conv(layer.conv, source, out, upscale=1)
        else:
            self._gathered(layer, source, out)

    def _res_block(self, layer: Any, source: Map, out: Map) -> None:
        normed = self._new(source.channels, source.size)
        self._norm(layer.in_layers[0], source, normed)
        h = self._new(out.channels, source.size)
        self._conv(layer.in_layers[2], normed, h)
        self._free(normed)
        offset = self.embedding
        self.embedding += layer.emb_layers[1].out_features
        self._norm(layer.out_layers[0], h, h, embedding=offset, scale_shift=layer.scale_shift)
        residual = source
        if isinstance(layer.skip_connection, nn.Conv2d):
            # Never rounded: it carries the whole residual stream.
            self._linear(layer.skip_connection, source, out)
            residual = out
        self._conv(layer.out_layers[3], h, out, residual)
        self._free(h)

    def _attention(self, layer: Any, source: Map, out: Map) -> None:
        normed = self._new(source.channels, source.size)
        self._norm(layer.norm, source, normed, silu=False)
        qkv = self._new(3 * source.channels, source.size)
        self._linear(layer.qkv, normed, qkv, bf16=self.bf16)
        width = source.channels // layer.num_heads
        if width % 8:
            raise NotSupported(
                f"attention heads must be a multiple of 8 channels wide, got {width}"
            )
        tokens = source.pixels
        self.rows.append(
            ops.attention_row(tokens, layer.num_heads, width, qkv.buffer, normed.buffer)
        )
        self._need_scratch(_native.native().attention_workspace(tokens, width))
        self._linear(layer.proj_out, normed, out, source, bf16=self.bf16)
        self._free(normed, qkv)

    def _head(self, source: Map) -> None:
        head: Any = self.model.out
        norm, conv = head[0], head[2]
        normed = self._new(source.channels, source.size)
        self._norm(norm, source, normed)
        columns = conv.out_channels
        out = self._new(columns + -columns % _ALIGN, source.size)
        self._conv(conv, normed, out)
        self.rows.append(ops.output_row(columns, out.pixels, out.buffer))

    def _norm(
        self,
        norm: Any,
        source: Map,
        out: Map,
        *,
        silu: bool = True,
        embedding: int = -1,
        scale_shift: bool = False,
    ) -> None:
        weight = self.packer(norm, "weight", lambda: pack.pack_vector(norm.weight))
        bias = self.packer(norm, "bias", lambda: pack.pack_vector(norm.bias))
        self.rows.append(
            ops.group_norm_row(
                source.pixels,
                source.buffer,
                source.channels,
                norm.num_groups,
                weight,
                bias,
                out.buffer,
                eps=norm.eps,
                silu=silu,
                embedding=embedding,
                scale_shift=scale_shift,
            )
        )
        self._need_shared(
            _native.native().group_norm_shared(self.batch, source.pixels, source.channels)
        )

    def _weight(self, layer: Any, form: str, make: Callable[[], Tensor], bf16: bool) -> Tensor:
        if bf16:
            return self.packer(layer, f"{form} bf16", lambda: pack.pack_pairs(make()))
        return self.packer(layer, form, make)

    def _bias(self, layer: Any) -> Tensor:
        return self.packer(layer, "bias", lambda: pack.pack_vector(layer.bias))

    def _linear(
        self,
        layer: Any,
        source: Map,
        out: Map,
        residual: Map | None = None,
        *,
        bf16: bool = False,
    ) -> None:
        weight = self._weight(
            layer, "matrix", lambda: pack.pack_matrix(layer.weight.flatten(1)), bf16
        )
        self.rows.append(
            ops.gemm_row(
                source.pixels,
                source.buffer,
                source.channels,
                out.channels,
                weight,
                self._bias(layer),
                out.buffer,
                residual.buffer if residual else None,
            )
        )
        if bf16:
            rows = self.batch * source.pixels
            self._need_scratch(_native.native().gemm_bf16_scratch(rows, source.channels))

    def _gathered(self, layer: Any, source: Map, out: Map, stride: int = 1) -> None:
        weight = self.packer(layer, "taps", lambda: pack.pack_taps(layer.weight))
        self.rows.append(
            ops.conv_row(
                source.size,
                source.buffer,
                source.channels,
                out.channels,
                weight,
                self._bias(layer),
                out.buffer,
                stride=stride,
            )
        )
        pixels = self.batch * out.pixels
        self._need_scratch(_native.native().conv_scratch(pixels, source.channels))

    def _conv(
        self, layer: Any, source: Map, out: Map, residual: Map | None = None, *, upscale: int = 0
    ) -> None:
        shape = ConvShape(*out.size, source.channels, out.channels, self.batch, bool(upscale))
        if layer is self.model.out[2]:
            # A convolution to three or six channels gains little, and rounds the result itself.
            algorithm = Algorithm(min(self.choose(shape).tile, 4))
        else:
            algorithm = self.choose(shape)
            self.convolutions.append((len(self.rows), shape))
        tile, bf16 = algorithm.tile, algorithm.bf16
        form = f"F({tile})"
        weight = self._weight(layer, form, lambda: pack.pack_winograd(layer.weight, tile), bf16)
        tiles = self.batch * -(-out.size[0] // tile) * -(-out.size[1] // tile)
        native = _native.native()
        block = native.winograd_block(tile, source.channels, bf16)
        self.rows.append(
            ops.winograd_row(
                out.size,
                source.buffer,
                source.channels,
                out.channels,
                weight,
                self._bias(layer),
                out.buffer,
                residual.buffer if residual else None,
                tile=tile,
                upscale=upscale,
                block=block,
            )
        )
        if bf16:
            shared = native.winograd_bf16_shared(tiles, source.channels, self.threads)
            scratch = native.winograd_bf16_scratch(tiles, source.channels, block)
        else:
            shared = native.winograd_shared(tile, tiles, source.channels, self.threads)
            scratch = native.winograd_scratch(tile, tiles, source.channels, block, self.threads)
        self._need_shared(shared)
        self._need_scratch(scratch)

    def _need_shared(self, floats: int) -> None:
        self.shared = max(self.shared, floats)

    def _need_scratch(self, floats: int) -> None:
        self.scratch = max(self.scratch, floats)


def _shape_after(layers: Iterable[Any], source: Map) -> tuple[int, tuple[int, int]]:
    """Channels and size of the feature map that leaves these layers."""
    channels, (height, width) = source.channels, source.size
    layer: Any
    for layer in layers:
        if isinstance(layer, ResBlock):
            last: Any = layer.out_layers[3]
            channels = last.out_channels
        elif isinstance(layer, Downsample):
            height, width = -(-height // 2), -(-width // 2)
        elif isinstance(layer, Upsample):
            height, width = 2 * height, 2 * width
        elif isinstance(layer, nn.Conv2d):
            channels = layer.out_channels
    return channels, (height, width)

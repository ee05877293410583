"""Turns a `UNet` into a plan for the CPU engine: which kernel reads and writes which buffer, in which order.

Activations are NHWC float32. Concatenation costs nothing: the encoder's output and the decoder's
features are written side by side into one buffer as wide as both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from iddpm_ext import _native
from iddpm_ext.engines.base import NotSupported
from iddpm_ext.engines.cpu import pack
from iddpm_ext.engines.cpu import rows as ops
from iddpm_ext.engines.cpu.algorithms import Algorithm, ConvShape
from iddpm_ext.engines.cpu.operands import (
    CONVOLUTION,
    STRIDED,
    Layout,
    Tap,
    doubled_filter,
    doubled_taps,
)
from iddpm_ext.networks.unet import AttentionBlock, Downsample, ResBlock, UNet, Upsample

_ALIGN = 16  # floats: 64 bytes
_CACHED = 256 * 1024  # floats of a block's buffers that stay in the L2 cache


@dataclass(frozen=True)
class Map:
    """A feature map [batch, H, W, channels] in a buffer whose pixels may be wider."""

    buffer: ops.Buffer
    channels: int
    size: tuple[int, int]

    @property
    def pixels(self) -> int:
        """Pixels of one sample."""
        return self.size[0] * self.size[1]

    def samples(self, first: int) -> Map:
        """The map of the samples from `first` on."""
        offset = 4 * first * self.pixels * self.buffer.pitch
        buffer = ops.Buffer(self.buffer.address + offset, self.buffer.pitch)
        return Map(buffer, self.channels, self.size)

    def part(self, first: int, channels: int) -> Map:
        """The map of `channels` channels from `first` on."""
        return Map(self.buffer.channel(first), channels, self.size)


@dataclass(frozen=True)
class Image:
    """A feature map in bfloat16, laid out for tile products."""

    address: int
    layout: Layout


@dataclass(frozen=True)
class Plan:
    """The operations, one row each, and the memory that they need."""

    rows: list[ops.Row]
    arena_floats: int
    shared_floats: int
    scratch_floats: int
    embedding_floats: int
    # Index of the row and shape of every convolution that more than one algorithm can compute.
    convolutions: list[tuple[int, ConvShape]]


class Arena:
    """Allocates buffers within one block of memory: first fit."""

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
        """Frees the buffer at an address that `take` returned."""
        del self._taken[(address - self.base) // 4]


# (module, form, make) -> the packed weights: `make()` the first time, the same tensor afterwards.
Packer = Callable[[nn.Module, str, Callable[[], Tensor]], Tensor]


class Planner:
    """Emits the rows of one network for one batch size, image size and number of threads.

    Addresses of buffers count from `base`: a first pass with base 0 finds out how much memory is needed, a
    second one emits the real addresses. Both share the tensors in `packer` and `maps`, whose addresses the
    rows hold.
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
        tiles: bool,
        packer: Packer,
        maps: dict[object, Tensor],
        base: int = 0,
    ):
        self.model, self.size, self.threads = model, size, threads
        self.batch = self.whole_batch = (
            batch_size  # samples that the next rows compute; all samples
        )
        self._first = 0
        self.choose, self.bf16, self.tiles, self.packer = choose, bf16, tiles, packer
        self.arena = Arena(base)
        self.rows: list[ops.Row] = []
        self.convolutions: list[tuple[int, ConvShape]] = []
        self.shared = self.scratch = self.embedding = 0
        self._maps = maps

    def plan(self) -> Plan:
        """The whole network, from the caller's input to the caller's output."""
        inputs: list[Any] = list(self.model.input_blocks)
        outputs: list[Any] = list(self.model.output_blocks)
        image = self._new(inputs[0][0].in_channels, self.size)
        self._emit(ops.input_row(image.channels, image.pixels, image.buffer))

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

    def _emit(self, row: ops.Row) -> None:
        if self.batch < self.whole_batch:
            row = ops.of_samples(row, self._first, self.batch)
        self.rows.append(row)

    def _block(self, block: Any, source: Map, out: Map) -> None:
        count, embedding = self._together(block, source, out), self.embedding
        for first in range(0, self.whole_batch, count):
            self.embedding = (
                embedding  # the block's own place in a row of the table, for all samples
            )
            self._first, self.batch = first, min(count, self.whole_batch - first)
            self._layers(block, source.samples(first), out.samples(first))
        self.batch, self._first = self.whole_batch, 0

    def _together(self, block: Any, source: Map, out: Map) -> int:
        """Samples that pass through a block together: with AMX, as many as the L2 cache holds."""
        if not self.tiles:
            return self.whole_batch
        floats = source.pixels * source.channels + 2 * out.pixels * out.channels
        weights = max(p.numel() for p in block.parameters()) / 2
        return max(1, int(max(_CACHED, weights) / floats))

    def _layers(self, block: Any, source: Map, out: Map) -> None:
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
            self._downsample(layer.op, source, out)
        elif isinstance(layer, Upsample):
            self._upsample(layer.conv, source, out)
        else:
            self._gathered(layer, source, out)

    def _res_block(self, layer: Any, source: Map, out: Map) -> None:
        h = self._new(out.channels, source.size)
        self._normed_conv(layer.in_layers[0], layer.in_layers[2], source, h)
        embedding = self.embedding
        self.embedding += layer.emb_layers[1].out_features
        residual = source
        if isinstance(layer.skip_connection, nn.Conv2d):
            # Not rounded to bfloat16: the whole residual stream passes through it.
            if self.tiles:
                self._tile_exact(layer.skip_connection, source, out)
            else:
                self._linear(layer.skip_connection, source, out)
            residual = out
        self._normed_conv(
            layer.out_layers[0],
            layer.out_layers[3],
            h,
            out,
            residual,
            in_place=True,
            embedding=embedding,
            scale_shift=layer.scale_shift,
        )
        self._free(h)

    def _normed_conv(
        self,
        norm: Any,
        conv: Any,
        source: Map,
        out: Map,
        residual: Map | None = None,
        *,
        in_place: bool = False,
        embedding: int = -1,
        scale_shift: bool = False,
    ) -> None:
        """out = conv(SiLU(norm(source))) + residual; in_place: source may be overwritten."""
        algorithm = self._algorithm(conv, source, out)
        if algorithm.tiles:
            image = self._image(source)
            operand = self._operand(image)
            self._norm(norm, source, operand, embedding=embedding, scale_shift=scale_shift)
            self._tile_conv(conv, image, out, residual)
            self._drop(image)
        else:
            normed = source if in_place else self._new(source.channels, source.size)
            self._norm(norm, source, normed.buffer, embedding=embedding, scale_shift=scale_shift)
            self._winograd(conv, algorithm, normed, out, residual)
            if not in_place:
                self._free(normed)

    def _attention(self, layer: Any, source: Map, out: Map) -> None:
        width = source.channels // layer.num_heads
        if width % 8:
            raise NotSupported(
                f"attention heads must be a multiple of 8 channels wide, got {width}"
            )
        qkv = self._new(3 * source.channels, source.size)
        shape = (source.pixels, layer.num_heads, width, qkv.buffer)
        if self.tiles:
            image = self._image(source, halo=False)
            operand = self._operand(image)
            self._norm(layer.norm, source, operand, silu=False)
            self._tile_linear(layer.qkv, image, qkv)
            self._emit(ops.attention_row(*shape, operand))
            self._need_scratch(_native.native().tile_attention_scratch(source.pixels, width))
            self._tile_linear(layer.proj_out, image, out, source)
            self._drop(image)
        else:
            normed = self._new(source.channels, source.size)
            self._norm(layer.norm, source, normed.buffer, silu=False)
            self._linear(layer.qkv, normed, qkv, bf16=self.bf16)
            self._emit(ops.attention_row(*shape, normed.buffer))
            self._need_scratch(_native.native().attention_workspace(source.pixels, width))
            self._linear(layer.proj_out, normed, out, source, bf16=self.bf16)
            self._free(normed)
        self._free(qkv)

    def _downsample(self, conv: Any, source: Map, out: Map) -> None:
        if not self.tiles:
            self._gathered(conv, source, out, stride=2)
            return
        image = self._image(out, source.channels, phases=4)
        self._round(source, image)
        self._tile_conv(conv, image, out, taps=STRIDED)
        self._drop(image)

    def _upsample(self, conv: Any, source: Map, out: Map) -> None:
        algorithm = self._algorithm(conv, source, out, upscale=1)
        if not algorithm.tiles:
            self._winograd(conv, algorithm, source, out, upscale=1)
            return
        image = self._image(source)
        self._round(source, image)
        height, width = out.size
        shape = self._shape(source, out, upscale=1)
        for phase in range(4):
            self.convolutions.append((len(self.rows), shape))
            first = phase // 2 * width + phase % 2
            buffer = ops.Buffer(out.buffer.address + 4 * first * out.buffer.pitch, out.buffer.pitch)
            self._product(
                conv,
                f"doubled {phase}",
                partial(doubled_filter, conv.weight, phase),
                self._operand(image, doubled_taps(phase), (2, 2 * width, height * width)),
                Map(buffer, out.channels, out.size),
            )
        self._drop(image)

    def _head(self, source: Map) -> None:
        head: Any = self.model.out
        norm, conv = head[0], head[2]
        columns = conv.out_channels
        out = self._new(columns + -columns % _ALIGN, source.size)
        self._normed_conv(norm, conv, source, out)
        self._emit(ops.output_row(columns, out.pixels, out.buffer))

    def _norm(
        self,
        norm: Any,
        source: Map,
        out: ops.Buffer | ops.Operand,
        *,
        silu: bool = True,
        embedding: int = -1,
        scale_shift: bool = False,
    ) -> None:
        weight = self.packer(norm, "weight", lambda: pack.pack_vector(norm.weight))
        bias = self.packer(norm, "bias", lambda: pack.pack_vector(norm.bias))
        self._emit(
            ops.group_norm_row(
                source.pixels,
                source.buffer,
                source.channels,
                norm.num_groups,
                weight,
                bias,
                out,
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
        self._emit(
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
        self._emit(
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

    def _shape(self, source: Map, out: Map, upscale: int = 0) -> ConvShape:
        return ConvShape(*out.size, source.channels, out.channels, self.whole_batch, bool(upscale))

    def _algorithm(self, layer: Any, source: Map, out: Map, upscale: int = 0) -> Algorithm:
        shape = self._shape(source, out, upscale)
        if layer is self.model.out[2]:
            # The last convolution, to few channels, would gain little and round the result itself.
            return self.choose(shape).in_float32
        return self.choose(shape)

    def _winograd(
        self,
        layer: Any,
        algorithm: Algorithm,
        source: Map,
        out: Map,
        residual: Map | None = None,
        *,
        upscale: int = 0,
    ) -> None:
        if layer is not self.model.out[2]:
            self.convolutions.append((len(self.rows), self._shape(source, out, upscale)))
        tile, bf16 = algorithm.tile, algorithm.bf16
        form = f"F({tile})"
        weight = self._weight(layer, form, lambda: pack.pack_winograd(layer.weight, tile), bf16)
        tiles = self.batch * -(-out.size[0] // tile) * -(-out.size[1] // tile)
        native = _native.native()
        block = native.winograd_block(tile, source.channels, out.channels, bf16)
        self._emit(
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

    def _image(
        self, source: Map, channels: int | None = None, *, halo: bool = True, phases: int = 1
    ) -> Image:
        layout = Layout(source.size, channels or source.channels, self.batch, halo, phases)
        return Image(self.arena.take(layout.floats), layout)

    def _drop(self, image: Image) -> None:
        self.arena.free(image.address)

    def _operand(
        self,
        image: Image,
        taps: tuple[Tap, ...] = ((0, 0, 0),),
        out: tuple[int, int, int] | None = None,
    ) -> ops.Operand:
        key = (image.layout, taps, out)
        if key not in self._maps:
            self._maps[key] = image.layout.map(taps, out)
        return ops.Operand(image.address + 2 * image.layout.first, self._maps[key])

    def _round(self, source: Map, image: Image) -> None:
        phase = image.layout.image if image.layout.phases > 1 else 0
        operand = self._operand(image)
        self._emit(ops.round_row(source.size, source.buffer, source.channels, operand, phase=phase))

    def _tile_conv(
        self,
        layer: Any,
        image: Image,
        out: Map,
        residual: Map | None = None,
        taps: tuple[Tap, ...] = CONVOLUTION,
    ) -> None:
        if taps is CONVOLUTION:
            shape = ConvShape(*out.size, image.layout.channels, out.channels, self.whole_batch)
            self.convolutions.append((len(self.rows), shape))
        source = self._operand(image, taps)
        self._product(layer, "tiles", lambda: layer.weight.flatten(2), source, out, residual)

    def _tile_linear(self, layer: Any, image: Image, out: Map, residual: Map | None = None) -> None:
        source, columns = self._operand(image), out.channels
        self._product(
            layer, "tiles", lambda: layer.weight.reshape(columns, -1, 1), source, out, residual
        )

    def _tile_exact(self, layer: Any, source: Map, out: Map) -> None:
        """A 1x1 convolution with 16 bits of its operands, as three bfloat16 products (`split_products`)."""
        image = self._image(source, halo=False, phases=2)
        rest = image.layout.image
        operand = self._operand(image)
        self._emit(ops.round_row(source.size, source.buffer, source.channels, operand, rest=rest))
        operand = self._operand(image, ((0, 0, 0), (0, 0, 1), (0, 0, 0)))
        self._product(
            layer, "exact", lambda: pack.split_products(layer.weight.flatten(1)), operand, out
        )
        self._drop(image)

    def _product(
        self,
        layer: Any,
        form: str,
        weight: Callable[[], Tensor],
        source: ops.Operand,
        out: Map,
        residual: Map | None = None,
    ) -> None:
        packed = self.packer(layer, form, lambda: pack.pack_tiles(weight()))
        self._emit(
            ops.tile_product_row(
                source,
                packed.shape[2],
                out.channels,
                packed,
                self._bias(layer),
                out.buffer,
                residual.buffer if residual else None,
            )
        )

    def _need_scratch(self, floats: int) -> None:
        self.scratch = max(self.scratch, floats)


def _shape_after(layers: Iterable[Any], source: Map) -> tuple[int, tuple[int, int]]:
    """Channels and size of the output of these layers."""
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

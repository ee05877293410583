"""The rows of the CPU engine's plan: one function for each struct of `csrc/unet_engine/plan.h`.

A row holds its kind (`_C.RowKind`), the words of the kind's struct and, last, the range of samples that
it computes (`of_samples`). A buffer is given by its address and its pitch, the floats from one pixel to
the next.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from iddpm_ext import _native

Row = list[int]


@dataclass(frozen=True)
class Buffer:
    """NHWC float32 pixels: address of the first channel, and floats from one pixel to the next."""

    address: int
    pitch: int

    def channel(self, first: int) -> Buffer:
        """The same pixels from channel `first` on."""
        return Buffer(self.address + 4 * first, self.pitch)


@dataclass(frozen=True)
class Operand:
    """bfloat16 pixels as AMX products read them: address of the first pixel, and the OperandMap."""

    address: int
    map: Tensor

    @property
    def pitch(self) -> int:
        """Elements from one position to the next."""
        return int(self.map[4])


def of_samples(row: Row, first: int, count: int) -> Row:
    """The row restricted to `count` samples from `first` on, however many the call has."""
    return [*row[:-1], first << 32 | count]


def _row(kind: str, *words: int) -> Row:
    native = _native.native()
    row = [int(getattr(native.RowKind, kind)), *words]
    return row + [0] * (native.ROW_WORDS - len(row))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _residual(residual: Buffer | None) -> tuple[int, int]:
    return (0, 0) if residual is None else (residual.address, residual.pitch)


def input_row(channels: int, pixels: int, out: Buffer) -> Row:
    """The caller's NCHW input -> out."""
    return _row("INPUT", channels, pixels, out.address, out.pitch)


def output_row(channels: int, pixels: int, source: Buffer) -> Row:
    """source -> the caller's NCHW output."""
    return _row("OUTPUT", channels, pixels, source.address, source.pitch)


def gemm_row(
    rows: int,
    source: Buffer,
    depth: int,
    columns: int,
    weight: Tensor,
    bias: Tensor | None,
    out: Buffer,
    residual: Buffer | None = None,
) -> Row:
    """out = source * weight + bias + residual over `rows` pixels per sample."""
    return _row(
        "GEMM_BF16" if weight.dtype == torch.bfloat16 else "GEMM",
        rows,
        source.address,
        source.pitch,
        depth,
        columns,
        _address(weight),
        _address(bias),
        *_residual(residual),
        out.address,
        out.pitch,
    )


def conv_row(
    size: tuple[int, int],
    source: Buffer,
    channels: int,
    columns: int,
    weight: Tensor,
    bias: Tensor | None,
    out: Buffer,
    residual: Buffer | None = None,
    *,
    stride: int = 1,
    upscale: int = 0,
) -> Row:
    """A 3x3 convolution by im2col; size is that of the input before upsampling."""
    return _row(
        "CONV",
        *size,
        source.address,
        source.pitch,
        channels,
        columns,
        _address(weight),
        _address(bias),
        *_residual(residual),
        out.address,
        out.pitch,
        stride,
        upscale,
    )


def winograd_row(
    size: tuple[int, int],
    source: Buffer,
    channels: int,
    columns: int,
    weight: Tensor,
    bias: Tensor | None,
    out: Buffer,
    residual: Buffer | None = None,
    *,
    tile: int,
    upscale: int = 0,
    block: int = 24,
) -> Row:
    """A 3x3 convolution by Winograd's F(tile, 3), `block` tiles at a time; size is that of the output."""
    return _row(
        "WINOGRAD_BF16" if weight.dtype == torch.bfloat16 else "WINOGRAD",
        *size,
        source.address,
        source.pitch,
        channels,
        columns,
        _address(weight),
        _address(bias),
        *_residual(residual),
        out.address,
        out.pitch,
        tile,
        upscale,
        block,
    )


def group_norm_row(
    pixels: int,
    source: Buffer,
    channels: int,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    out: Buffer | Operand,
    *,
    eps: float,
    silu: bool,
    embedding: int = -1,
    scale_shift: bool = False,
) -> Row:
    """GroupNorm, the timestep's scale and shift (or its sum alone), and SiLU.

    embedding: where in a sample's row of the table of embeddings they begin, in floats; -1 for none.
    """
    (eps_bits,) = struct.unpack("<q", struct.pack("<d", eps))
    return _row(
        "NORM_OPERAND" if isinstance(out, Operand) else "GROUP_NORM",
        pixels,
        source.address,
        source.pitch,
        channels,
        groups,
        _address(weight),
        _address(bias),
        embedding,
        int(scale_shift),
        int(silu),
        eps_bits,
        out.address,
        _address(out.map) if isinstance(out, Operand) else out.pitch,
    )


def attention_row(tokens: int, heads: int, width: int, qkv: Buffer, out: Buffer | Operand) -> Row:
    """Attention over `tokens` pixels per sample; channels of qkv are [heads][q, k, v][width]."""
    kind = "TILE_ATTENTION" if isinstance(out, Operand) else "ATTENTION"
    return _row(kind, tokens, heads, width, qkv.address, qkv.pitch, out.address, out.pitch)


def round_row(
    size: tuple[int, int],
    source: Buffer,
    channels: int,
    out: Operand,
    *,
    phase: int = 0,
    rest: int = 0,
) -> Row:
    """Rounds source to a bfloat16 operand.

    phase: elements from one of the four phases (even and odd pixels) to the next, 0 for one image. rest:
    elements to the operand of the rounding remainders, 0 for none.
    """
    return _row(
        "ROUND",
        *size,
        source.address,
        source.pitch,
        channels,
        out.address,
        _address(out.map),
        phase,
        rest,
    )


def tile_product_row(
    source: Operand,
    chunks: int,
    columns: int,
    weight: Tensor,
    bias: Tensor | None,
    out: Buffer,
    residual: Buffer | None = None,
) -> Row:
    """out = (sum of source * weight over the map's taps) + bias + residual, by AMX."""
    return _row(
        "TILE_PRODUCT",
        _address(source.map),
        source.address,
        chunks,
        columns,
        _address(weight),
        _address(bias),
        *_residual(residual),
        out.address,
        out.pitch,
    )

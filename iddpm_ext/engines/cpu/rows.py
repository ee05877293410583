"""The rows of the CPU engine's plan: one function for each struct of `csrc/unet_engine/plan.h`.

A row is its kind (`_C.RowKind`), then the words of the kind's struct. A buffer is its address and
its pitch: the floats between two pixels.
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
    """NHWC float32 pixels: address of the first channel used, floats between two pixels."""

    address: int
    pitch: int

    def channel(self, first: int) -> Buffer:
        """The same pixels from channel `first` on."""
        return Buffer(self.address + 4 * first, self.pitch)


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
    """out = source * weight + bias + residual over `rows` pixels a sample."""
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
    """A 3x3 convolution by gathered rows; size is the input's before up-sampling."""
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
    """A 3x3 convolution by Winograd's F(tile, 3), `block` tiles at a time; size is the output's."""
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
    out: Buffer,
    *,
    eps: float,
    silu: bool,
    embedding: int = -1,
    scale_shift: bool = False,
) -> Row:
    """GroupNorm, with the embedding at that offset of a sample's row, and SiLU."""
    (eps_bits,) = struct.unpack("<q", struct.pack("<d", eps))
    return _row(
        "GROUP_NORM",
        pixels,
        source.address,
        source.pitch,
        channels,
        groups,
        _address(weight),
        _address(bias),
        out.address,
        out.pitch,
        embedding,
        int(scale_shift),
        int(silu),
        eps_bits,
    )


def attention_row(tokens: int, heads: int, width: int, qkv: Buffer, out: Buffer) -> Row:
    """Attention over `tokens` pixels a sample; channels of qkv are [heads][q, k, v][width]."""
    return _row("ATTENTION", tokens, heads, width, qkv.address, qkv.pitch, out.address, out.pitch)

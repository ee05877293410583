"""The layers and blocks of the U-Net, and the way down that the classifier has in common with it.

Attribute names such as `in_layers` and `emb_layers`, and the numbering inside them, are the keys of
OpenAI's checkpoints and therefore fixed. The time embedding `emb` is [N, 4 * model_channels].
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from typing import TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iddpm_ext.networks import plain
from iddpm_ext.networks.config import NUM_GROUPS, UNetConfig
from iddpm_ext.ops import conv3x3, group_norm_silu, qkv_attention
from iddpm_ext.ops.conv3x3.compiled import rounds
from iddpm_ext.ops.qkv_attention.layout import is_by_token
from iddpm_ext.ops.rows import no_autocast


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoids [cos(t f_i), sin(t f_i)] with f_i = 10000^(-i / half) and i = 0 .. half - 1.

    timesteps: [N], float32 or float64, possibly fractional. dim: even, 2 * half.
    Returns [N, dim] in the dtype of `timesteps`.
    """
    half = dim // 2
    index = torch.arange(half, dtype=timesteps.dtype, device=timesteps.device)
    angles = timesteps[:, None] * torch.exp(-math.log(10_000) / half * index)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


_forced: ContextVar[str | None] = ContextVar("backend", default=None)


@contextlib.contextmanager
def plain_backend() -> Iterator[None]:
    """Within, and in this thread alone, every network computes as with the backend "plain"."""
    token = _forced.set("plain")
    try:
        yield
    finally:
        _forced.reset(token)


def backend_of(own: str) -> str:
    """The backend in force for a module whose own is `own`."""
    if torch.compiler.is_compiling():
        return own
    return "plain" if is_transformed() else _forced.get() or own


def is_transformed() -> bool:
    """Whether a transform of `torch.func` (vmap, jvp, grad) is at work.

    They know PyTorch's own functions only, and values are not there to be looked at.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


class GroupNormSiLU(nn.GroupNorm):
    """SiLU(GroupNorm(x + channel_bias) * (1 + scale) + shift), or without the SiLU, in 32 groups.

    Statistics are at least float32. In the checkpoints' numbering the SiLU has a place of its own,
    which an `nn.Identity` holds.
    """

    def __init__(self, channels: int, silu: bool = True):
        super().__init__(NUM_GROUPS, channels)
        self.silu = silu
        self.backend = "auto"

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        channel_bias: Tensor | None = None,
    ) -> Tensor:
        """x [N, C, H, W]; scale, shift and channel_bias, which is added to x, [N, C] -> like x."""
        backend = backend_of(self.backend)
        if backend == "plain":
            compute = plain.group_norm_silu
        else:
            compute = partial(group_norm_silu, backend=backend)
        return compute(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            eps=self.eps,
            scale=scale,
            shift=shift,
            silu=self.silu,
            channel_bias=channel_bias,
        )


def trains_on_cpu(x: Tensor, weight: Tensor, backend: str) -> bool:
    """Whether the project's own convolutions are used: on the CPU, and where gradients are recorded.

    Without gradients the module keeps PyTorch's convolutions: the sampling engine is the fast way there.
    """
    return (
        backend in ("auto", "cpu")
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and torch.is_grad_enabled()
        and weight.requires_grad
    )


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding 1; before it the image is doubled by nearest neighbour if `upscale`."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, 3, padding=1)
        self.backend = "auto"

    def forward(self, x: Tensor, upscale: bool = False) -> Tensor:
        """x [N, C, H, W] -> [N, K, H, W], or [N, K, 2H, 2W] with `upscale`."""
        backend = backend_of(self.backend)
        if trains_on_cpu(x, self.weight, backend):
            if torch.is_autocast_enabled("cpu"):
                x = x.to(
                    torch.get_autocast_dtype("cpu")
                )  # as autocast does; the weights stay whole
            # In float32 a gradient errs less than PyTorch's own by the transforms of small rounding
            # error, which take no longer here; bfloat16 rounds more than either.
            exact = x.dtype == torch.float32
            return conv3x3(x, self.weight, self.bias, upscale=upscale, exact=exact, backend=backend)
        return super().forward(_doubled(x) if upscale else x)


_Layer = TypeVar("_Layer", bound=nn.Module)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def upscaled(conv: nn.Module, h: Tensor) -> Tensor:
    """`conv`, the project's own or another, of the image doubled by nearest neighbour."""
    return conv(h, upscale=True) if isinstance(conv, Conv3x3) else conv(_doubled(h))


def is_bare(layer: nn.Module, kind: type[_Layer]) -> TypeGuard[_Layer]:
    """Whether a layer is that of PyTorch itself, so that its weights say all that it does."""
    return (
        type(layer) is kind
        and "forward" not in layer.__dict__
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    )


def _trains_by_tiles(x: Tensor, weight: Tensor, backend: str) -> bool:
    """Whether a convolution of one tap takes the project's kernel: under autocast, where AMX is.

    Elsewhere PyTorch's is the faster.
    """
    return (
        trains_on_cpu(x, weight, backend)
        and torch.is_autocast_enabled("cpu")
        and rounds(torch.get_autocast_dtype("cpu"))
    )


def _pointwise(conv: nn.Module, h: Tensor, backend: str) -> Tensor:
    """A convolution of one tap, h [N, C, T]; keeps the channels of a position side by side."""
    if not is_by_token(h) or not is_bare(conv, nn.Conv1d):
        return conv(h)
    weight, bias = conv.weight, conv.bias
    if h.device.type == "cpu":
        # As images of one row, which are read where they lie, faster than by a matrix product.
        image, filters = h.unsqueeze(2), weight.unsqueeze(2)
        if _trains_by_tiles(h, weight, backend):
            return conv3x3(image.bfloat16(), filters, bias, backend=backend).squeeze(2)
        return F.conv2d(image, filters, bias).squeeze(2)
    return F.linear(h.transpose(1, 2), weight.squeeze(2), bias).transpose(1, 2)


def zeroed(conv: nn.Module) -> nn.Module:
    """The last convolution of a residual branch starts at zero: the block starts as its skip."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions around the time embedding, and a skip connection.

    resample: "up" or "down" doubles or halves height and width before the first convolution and in
        the skip connection, by repetition or by average pooling.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        out_channels: int,
        dropout: float,
        scale_shift: bool,
        resample: str | None = None,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.backend = "auto"
        self.in_layers = nn.Sequential(
            GroupNormSiLU(channels),
            nn.Identity(),
            Conv3x3(channels, out_channels),
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if scale_shift else out_channels)
        )
        self.out_layers = nn.Sequential(
            GroupNormSiLU(out_channels),
            nn.Identity(),
            nn.Dropout(dropout),
            zeroed(Conv3x3(out_channels, out_channels)),
        )
        self.skip_connection = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [N, C, H, W], emb [N, emb_channels] -> [N, out_channels, H, W], or resampled."""
        if self.resample is None:
            h = self.in_layers(x)
        else:
            norm, act, conv = self.in_layers
            h = act(norm(x))
            h = upscaled(conv, h) if self.resample == "up" else conv(_resampled(h, "down"))
            x = _resampled(x, self.resample)
        # In float32, as all of the timestep's path: rounding it would take longer than these products.
        with no_autocast("cpu"):
            emb = self.emb_layers(emb)
        norm, *rest = self.out_layers
        if self.scale_shift:
            h = norm(h, *emb.chunk(2, dim=1))
        else:
            h = norm(h, channel_bias=emb)
        for layer in rest:
            h = layer(h)
        return self._skip(x) + h

    def _skip(self, x: Tensor) -> Tensor:
        conv, backend = self.skip_connection, backend_of(self.backend)
        if (
            is_bare(conv, nn.Conv2d)
            and conv.kernel_size == (1, 1)
            and conv.stride == (1, 1)
            and _trains_by_tiles(x, conv.weight, backend)
        ):
            return conv3x3(x.bfloat16(), conv.weight, conv.bias, backend=backend)
        return conv(x)


def _resampled(x: Tensor, how: str) -> Tensor:
    if how == "down":
        return F.avg_pool2d(x, 2)
    return _doubled(x)


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map, with a skip connection.

    order: how the rows of `qkv` are arranged, "legacy" or "new".
    """

    def __init__(self, channels: int, num_heads: int, order: str = "legacy"):
        super().__init__()
        self.num_heads = num_heads
        self.order = order
        self.backend = "auto"
        self.norm = GroupNormSiLU(channels, silu=False)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C, H, W]."""
        h, backend = self.norm(x).flatten(2), backend_of(self.backend)
        if backend == "plain":
            h = plain.qkv_attention(self.qkv(h), self.num_heads, self.order)
            return x + self.proj_out(h).view(x.shape)
        qkv = _pointwise(self.qkv, h, backend)
        h = qkv_attention(qkv, self.num_heads, order=self.order, backend=backend)
        return x + _pointwise(self.proj_out, h, backend).view(x.shape)


class Upsample(nn.Module):
    """Doubles height and width by repetition, then a 3x3 convolution if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = Conv3x3(channels, channels) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C, 2H, 2W]."""
        return upscaled(self.conv, x)


class Downsample(nn.Module):
    """Halves height and width by a strided 3x3 convolution, or by average pooling."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.op = (
            nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C, H/2, W/2]."""
        return self.op(x)


class Block(nn.Sequential):
    """Layers in sequence; residual blocks, and what is put in their places, get the time embedding."""

    def __init__(self, *layers: nn.Module):
        super().__init__(*layers)
        self.embedded = tuple(isinstance(layer, ResBlock) for layer in layers)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        """x [N, C, H, W], emb [N, emb_channels]."""
        for i, layer in enumerate(self):
            embedded = isinstance(layer, ResBlock) or (i < len(self.embedded) and self.embedded[i])
            x = layer(x, emb) if embedded else layer(x)
        return x


def res_block_of(
    c: UNetConfig, channels: int, out_channels: int, resample: str | None = None
) -> ResBlock:
    """A residual block as the configuration wants them."""
    emb_channels = 4 * c.model_channels
    scale_shift = c.use_scale_shift_norm
    return ResBlock(channels, emb_channels, out_channels, c.dropout, scale_shift, resample)


def time_embed_of(c: UNetConfig) -> nn.Sequential:
    """The layers between the sinusoids of a timestep and its embedding."""
    width, emb_channels = c.model_channels, 4 * c.model_channels
    return nn.Sequential(
        nn.Linear(width, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
    )


def encoder_of(c: UNetConfig) -> tuple[nn.ModuleList, Block, list[int]]:
    """The blocks on the way down, the middle block, and the width of each block on the way down."""
    width = c.channels(0)
    first_in = 2 * c.in_channels if c.super_resolution else c.in_channels
    blocks = nn.ModuleList([Block(Conv3x3(first_in, width))])
    widths = [width]
    last = len(c.channel_mult) - 1
    for level in range(len(c.channel_mult)):
        for _ in range(c.num_res_blocks):
            layers: list[nn.Module] = [res_block_of(c, width, c.channels(level))]
            width = c.channels(level)
            if c.has_attention(level):
                layers.append(AttentionBlock(width, c.heads(width), c.attention_order))
            blocks.append(Block(*layers))
            widths.append(width)
        if level != last:
            blocks.append(
                Block(
                    res_block_of(c, width, width, "down")
                    if c.resblock_updown
                    else Downsample(width, c.conv_resample)
                )
            )
            widths.append(width)
    middle = Block(
        res_block_of(c, width, width),
        AttentionBlock(width, c.heads(width), c.attention_order),
        res_block_of(c, width, width),
    )
    return blocks, middle, widths

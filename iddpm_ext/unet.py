"""The U-Net of Improved DDPM, with the state-dict keys and shapes of OpenAI's checkpoints.

Attribute names such as `in_layers`, `emb_layers` and `input_blocks`, and the numbering inside them,
are the checkpoints' keys and therefore fixed. The time embedding `emb` is [N, 4 * model_channels].
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iddpm_ext import unet_plain
from iddpm_ext.ops import REGISTRY, conv3x3, group_norm_silu, qkv_attention, spec
from iddpm_ext.ops.qkv_attention.layout import is_by_token
from iddpm_ext.ops.rows import no_autocast
from iddpm_ext.unet_config import NUM_GROUPS, UNetConfig

if TYPE_CHECKING:
    from iddpm_ext.diffusion import Diffusion

BACKENDS = ("auto", "plain", *spec.BACKENDS)


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoids [cos(t f_i), sin(t f_i)] with f_i = 10000^(-i / half) and i = 0 .. half - 1.

    timesteps: [N], float32 or float64, possibly fractional. dim: even, 2 * half.
    Returns [N, dim] in the dtype of `timesteps`.
    """
    half = dim // 2
    index = torch.arange(half, dtype=timesteps.dtype, device=timesteps.device)
    angles = timesteps[:, None] * torch.exp(-math.log(10_000) / half * index)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


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
        if self.backend == "plain":
            compute = unet_plain.group_norm_silu
        else:
            compute = partial(group_norm_silu, backend=self.backend)
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


def _trains_on_cpu(x: Tensor, weight: Tensor, backend: str) -> bool:
    """Whether the project's own convolutions serve: on the CPU, and where gradients are recorded.

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
    """A 3x3 convolution with padding 1, if asked of the image doubled by repetition."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, 3, padding=1)
        self.backend = "auto"

    def forward(self, x: Tensor, upscale: bool = False) -> Tensor:
        """x [N, C, H, W] -> [N, K, H, W], or [N, K, 2H, 2W] with `upscale`."""
        if _trains_on_cpu(x, self.weight, self.backend):
            if torch.is_autocast_enabled("cpu"):
                x = x.to(
                    torch.get_autocast_dtype("cpu")
                )  # as autocast does; the weights stay whole
            return conv3x3(x, self.weight, self.bias, upscale=upscale, backend=self.backend)
        return super().forward(_doubled(x) if upscale else x)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _linear(layer: nn.Module, h: Tensor) -> Tensor:
    """The linear layer, in the dtype of h."""
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    return F.linear(h, weight.to(h.dtype), bias.to(h.dtype))


def _pointwise(conv: nn.Module, h: Tensor) -> Tensor:
    """A convolution of one tap, h [N, C, T]; keeps the channels of a position side by side."""
    if not is_by_token(h):
        return conv(h)
    weight, bias = conv.get_parameter("weight"), conv.get_parameter("bias")
    if h.device.type == "cpu":
        # As images of one row, which oneDNN reads where they lie, faster than a matrix product.
        return F.conv2d(h.unsqueeze(2), weight.unsqueeze(2), bias).squeeze(2)
    return F.linear(h.transpose(1, 2), weight.squeeze(2), bias).transpose(1, 2)


def _zeroed(conv: nn.Module) -> nn.Module:
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
            _zeroed(Conv3x3(out_channels, out_channels)),
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
            h = conv(h, upscale=True) if self.resample == "up" else conv(_resampled(h, "down"))
            x = _resampled(x, self.resample)
        emb = self.emb_layers(emb)
        norm, *rest = self.out_layers
        if self.scale_shift:
            h = norm(h, *emb.chunk(2, dim=1))
        else:
            h = norm(h, channel_bias=emb)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


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
        self.proj_out = _zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C, H, W]."""
        h = self.norm(x).flatten(2)
        if self.backend == "plain":
            h = unet_plain.qkv_attention(self.qkv(h), self.num_heads, self.order)
            return x + self.proj_out(h).view(x.shape)
        qkv = _pointwise(self.qkv, h)
        h = qkv_attention(qkv, self.num_heads, order=self.order, backend=self.backend)
        return x + _pointwise(self.proj_out, h).view(x.shape)


class Upsample(nn.Module):
    """Doubles height and width by repetition, then a 3x3 convolution if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = Conv3x3(channels, channels) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C, 2H, 2W]."""
        if isinstance(self.conv, Conv3x3):
            return self.conv(x, upscale=True)
        return _doubled(x)


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
    """Layers in sequence; those that take the time embedding receive it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        """x [N, C, H, W], emb [N, emb_channels]."""
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
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


class UNet(nn.Module):
    """The network of Improved DDPM (Nichol & Dhariwal 2021, appendix A).

    config: a `UNetConfig`. The state dict has the keys and shapes of openai/improved-diffusion, and
        with its options those of openai/guided-diffusion.
    Attributes that change how, not what, it computes: `gradient_checkpointing` (False) recomputes
    each block in the backward pass instead of keeping its activations; `backend` ("auto"). Where
    gradients are recorded on the CPU, "auto" and "cpu" compute 3x3 convolutions by `ops.conv3x3`.
    `extra` holds JSON-ready facts that travel in the checkpoint, such as step schedules.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        if not isinstance(config, UNetConfig):
            raise TypeError(f"UNet: config must be a UNetConfig, got {type(config).__name__}")
        self.config = config
        self.gradient_checkpointing = False
        self._backend = "auto"
        self._diffusion: Diffusion | None = None
        self.extra: dict[str, Any] = {}

        c = config
        self.time_embed = time_embed_of(c)
        if c.num_classes is not None:
            self.label_emb = nn.Embedding(c.num_classes, 4 * c.model_channels)

        self.input_blocks, self.middle_block, skip_widths = encoder_of(c)
        width = skip_widths[-1]

        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(c.channel_mult))):
            for i in range(c.num_res_blocks + 1):
                layers: list[nn.Module] = [
                    res_block_of(c, width + skip_widths.pop(), c.channels(level))
                ]
                width = c.channels(level)
                if c.has_attention(level):
                    layers.append(AttentionBlock(width, c.heads(width, up=True), c.attention_order))
                if level and i == c.num_res_blocks:
                    layers.append(
                        res_block_of(c, width, width, "up")
                        if c.resblock_updown
                        else Upsample(width, c.conv_resample)
                    )
                self.output_blocks.append(Block(*layers))

        self.out = nn.Sequential(
            GroupNormSiLU(width),
            nn.Identity(),
            _zeroed(Conv3x3(width, c.out_channels)),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the convolutions' weights, and so of the activations."""
        return self.input_blocks[0].get_parameter("0.weight").dtype

    @property
    def diffusion(self) -> Diffusion | None:
        """The diffusion process that this network was trained for; it travels in the checkpoint."""
        return self._diffusion

    @diffusion.setter
    def diffusion(self, value: Diffusion | None) -> None:
        if value is not None:
            _require_channels_for(self.config, value.variance)
        self._diffusion = value

    @property
    def backend(self) -> str:
        """Which backend the operators take.

        "plain" is PyTorch's own functions without registered operators, as an export needs them.
        An operator without a kernel of that backend (attention has none in Triton) takes "auto".
        """
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        if value not in BACKENDS:
            raise ValueError(f"UNet: backend must be one of {', '.join(BACKENDS)}, got {value!r}")
        self._backend = value
        for module in self.modules():
            if isinstance(module, (GroupNormSiLU, Conv3x3)):
                module.backend = value
            elif isinstance(module, AttentionBlock):
                served = value in ("plain", *REGISTRY["qkv_attention"].kernels)
                module.backend = value if served else "auto"

    def forward(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, low_res: Tensor | None = None
    ) -> Tensor:
        """The network's output for noisy images.

        x: [N, C, H, W] floating point, H and W multiples of 2^(levels - 1).
        timesteps: [N], indices in the training chain, rescaled by the caller where that applies.
        y: [N] int64 labels of a class-conditional network, -1 for an unlabelled image. Their range
            is checked on the CPU only: elsewhere looking would stall the device.
        low_res: [N, C, h, w] of a super-resolution network.
        Returns [N, out_channels, H, W] in the dtype of x. Differentiable in x, low_res and weights.
        Raises ValueError or TypeError.
        """
        self._require_inputs(x, timesteps, y, low_res)
        emb = self._embed(timesteps, y)
        h = x if low_res is None else torch.cat([x, _upsample_to(low_res, x)], dim=1)
        h, emb = h.to(self.dtype), emb.to(self.dtype)
        trains = _trains_on_cpu(h, self.input_blocks[0].get_parameter("0.weight"), self._backend)
        if trains:
            h = h.contiguous(memory_format=torch.channels_last)  # as convolutions read and write it
        # The noise of the first steps is finer than bfloat16 can tell apart on pixels near -1 or 1,
        # so the network's two ends, and with them the residual stream, keep their precision.
        with no_autocast(x.device.type):
            h = self._run(self.input_blocks[0], h, emb)
        skips = [h]
        for block in self.input_blocks[1:]:
            h = self._run(block, h, emb)
            skips.append(h)
        h = self._run(self.middle_block, h, emb)
        for block in self.output_blocks:
            h = self._run(block, torch.cat([h, skips.pop()], dim=1), emb)
        with no_autocast(x.device.type):
            h = self.out(h.to(self.dtype)).to(x.dtype)
        return h.contiguous() if trains and x.is_contiguous() else h

    def _run(self, block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, h, emb, use_reentrant=False)
        return block(h, emb)

    def _embed(self, timesteps: Tensor, y: Tensor | None) -> Tensor:
        # bfloat16 cannot tell step 3999 from step 4000, so this path is at least float32.
        work = torch.promote_types(self.dtype, torch.float32)
        with no_autocast(timesteps.device.type):
            h = timestep_embedding(timesteps.to(work), self.config.model_channels)
            h = F.silu(_linear(self.time_embed[0], h))
            h = _linear(self.time_embed[2], h)
            if y is not None:
                h = h + self.label_emb(y.clamp(min=0)).to(work) * (y >= 0)[:, None]
        return h

    def _require_inputs(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None, low_res: Tensor | None
    ) -> None:
        c = self.config
        for name, value in (("x", x), ("timesteps", timesteps), ("y", y), ("low_res", low_res)):
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"UNet: {name} must be a tensor, got {type(value).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"UNet: x must be floating point, got {x.dtype}")
        if x.dim() != 4 or x.shape[1] != c.in_channels:
            raise ValueError(f"UNet: x must be [N, {c.in_channels}, H, W], got {list(x.shape)}")
        n, _, height, width = x.shape
        if min(height, width) < 1 or height % c.size_multiple or width % c.size_multiple:
            raise ValueError(
                f"UNet: x must have a height and a width that are multiples of {c.size_multiple}, "
                f"as its {len(c.channel_mult)} levels need, got {height}x{width}"
            )
        if timesteps.shape != (n,):
            raise ValueError(f"UNet: timesteps must be [{n}], got {list(timesteps.shape)}")
        _require_presence("y", y, c.num_classes is not None, f"num_classes={c.num_classes}")
        if y is not None and c.num_classes is not None:
            _require_labels(y, n, c.num_classes)
        flag = f"super_resolution={c.super_resolution}"
        _require_presence("low_res", low_res, c.super_resolution, flag)
        if low_res is not None and (low_res.dim() != 4 or low_res.shape[:2] != x.shape[:2]):
            raise ValueError(
                f"UNet: low_res must be [{n}, {c.in_channels}, h, w], got {list(low_res.shape)}"
            )


def _require_presence(name: str, value: Tensor | None, wanted: bool, because: str) -> None:
    if (value is not None) != wanted:
        rule = "given" if wanted else "None"
        got = "None" if value is None else f"shape {list(value.shape)}"
        raise ValueError(f"UNet: {name} must be {rule}, as the network has {because}, got {got}")


def _require_channels_for(config: UNetConfig, variance: str) -> None:
    learned = variance.startswith("learned")
    allowed = [2 * config.in_channels] if learned else [config.in_channels, 2 * config.in_channels]
    if config.out_channels not in allowed:
        raise ValueError(
            f"UNet: diffusion must have a variance that fits out_channels={config.out_channels} "
            f"(in_channels={config.in_channels}), got variance={variance!r}, which needs {allowed}"
        )


def _require_labels(y: Tensor, n: int, num_classes: int) -> None:
    if y.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"UNet: y must be int64, got {y.dtype}")
    if y.shape != (n,):
        raise ValueError(f"UNet: y must be [{n}], got {list(y.shape)}")
    if y.device.type == "cpu" and n and not torch.compiler.is_compiling():
        low, high = (int(v) for v in y.aminmax())
        if low < -1 or high >= num_classes:
            raise ValueError(f"UNet: y must lie in [-1, {num_classes - 1}], got {low} .. {high}")


def _upsample_to(low_res: Tensor, x: Tensor) -> Tensor:
    """low_res [N, C, h, w] -> [N, C, H, W] bilinearly, in the dtype of x [N, C, H, W]."""
    return F.interpolate(low_res.to(x.dtype), x.shape[2:], mode="bilinear")

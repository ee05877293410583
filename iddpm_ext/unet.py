"""The U-Net of Improved DDPM, with the state-dict keys and shapes of OpenAI's released checkpoints.

Attribute names such as `in_layers`, `emb_layers`, `input_blocks` and the numbering inside them are the
checkpoints' keys: they are fixed. Shapes are N C H W throughout; the time embedding is [N, 4 * model_channels].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from iddpm_ext.diffusion import Diffusion

NUM_GROUPS = 32


@dataclass(frozen=True)
class UNetConfig:
    """What determines the tensors of a `UNet` and what it computes.

    image_size: the side that `attention_resolutions` are counted from; `forward` takes other sizes too.
    in_channels, out_channels: of the image and of the output (2 * in_channels with a learned variance).
    model_channels: width of the first level; level i has model_channels * channel_mult[i] channels.
    attention_resolutions: feature-map sides that get attention, when image_size / 2^level equals one.
    num_heads, num_heads_upsample: attention heads, on the way down and up (None: the same).
    num_classes: rows of the label embedding; None for an unconditional network.
    use_scale_shift_norm: the time embedding scales and shifts a normalised map, else is added to it.
    conv_resample: resample by a learned convolution, else by average pooling and repetition.
    super_resolution: the network takes `low_res`, upsampled and concatenated to its input.
    """

    image_size: int = 32
    in_channels: int = 3
    model_channels: int = 128
    out_channels: int = 6
    num_res_blocks: int = 3
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    attention_resolutions: tuple[int, ...] = (16, 8)
    num_heads: int = 4
    num_heads_upsample: int | None = None
    dropout: float = 0.0
    num_classes: int | None = None
    use_scale_shift_norm: bool = True
    conv_resample: bool = True
    super_resolution: bool = False

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attention_resolutions"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)):
                raise TypeError(f"UNetConfig: {name} must be a tuple of integers, got {value!r}")
            object.__setattr__(self, name, tuple(value))
            for entry in value:
                _require_positive_int(name, entry)
        if not self.channel_mult:
            raise ValueError("UNetConfig: channel_mult must have at least one level, got ()")
        for name in (
            "image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks", "num_heads",
        ):  # fmt: skip
            _require_positive_int(name, getattr(self, name))
        for name in ("num_heads_upsample", "num_classes"):
            if getattr(self, name) is not None:
                _require_positive_int(name, getattr(self, name))
        for name in ("use_scale_shift_norm", "conv_resample", "super_resolution"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"UNetConfig: {name} must be a bool, got {getattr(self, name)!r}")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)):
            raise TypeError(f"UNetConfig: dropout must be a number, got {self.dropout!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"UNetConfig: dropout must lie in [0, 1), got {self.dropout}")
        if self.model_channels % NUM_GROUPS:
            raise ValueError(
                f"UNetConfig: model_channels must be a multiple of {NUM_GROUPS} (the groups of every "
                f"normalisation), got {self.model_channels}"
            )
        if self.image_size % self.size_multiple:
            raise ValueError(
                f"UNetConfig: image_size must be a multiple of {self.size_multiple} "
                f"(2^(levels - 1) for {len(self.channel_mult)} levels), got {self.image_size}"
            )
        self._require_heads_divide_channels()

    def _require_heads_divide_channels(self) -> None:
        widths = {self.model_channels * self.channel_mult[-1]}
        for level, mult in enumerate(self.channel_mult):
            if self.has_attention(level):
                widths.add(self.model_channels * mult)
        for name, heads in (("num_heads", self.num_heads), ("num_heads_upsample", self.heads_up)):
            for width in sorted(widths):
                if width % heads:
                    raise ValueError(
                        f"UNetConfig: {name} must divide the {width} channels of an attention block, got {heads}"
                    )

    @property
    def size_multiple(self) -> int:
        """Image heights and widths must be multiples of this: 2^(levels - 1)."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def heads_up(self) -> int:
        """Attention heads of the decoder."""
        return self.num_heads if self.num_heads_upsample is None else self.num_heads_upsample

    def has_attention(self, level: int) -> bool:
        """Whether the blocks of `level` (0 is the full image size) carry attention."""
        return self.image_size // 2**level in self.attention_resolutions

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, with lists for tuples; `from_dict` is its inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
        """The configuration of a dict; a missing key takes its default, an unknown one raises ValueError."""
        if not isinstance(values, Mapping):
            raise TypeError(f"UNetConfig.from_dict: values must be a mapping, got {values!r}")
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"UNetConfig.from_dict: keys must be fields of UNetConfig, got {unknown}"
            )
        return cls(**values)


def _require_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"UNetConfig: {name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"UNetConfig: {name} must be at least 1, got {value}")


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding [cos(t f_i), sin(t f_i)] with f_i = 10000^(-i / half), i = 0 .. half - 1.

    timesteps: [N], float32 or float64, possibly fractional. dim: even. Returns [N, dim] in the dtype of `timesteps`.
    """
    half = dim // 2
    index = torch.arange(half, dtype=timesteps.dtype, device=timesteps.device)
    angles = timesteps[:, None] * torch.exp(-math.log(10_000) / half * index)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    # Half-precision statistics lose digits, so everything up to the result is at least float32.
    work = torch.promote_types(x.dtype, torch.float32)
    h = F.group_norm(x.to(work), num_groups, weight.to(work), bias.to(work), eps)
    if scale is not None and shift is not None:
        per_channel = (*scale.shape, *[1] * (x.dim() - 2))
        h = h * (1 + scale.to(work).view(per_channel)) + shift.to(work).view(per_channel)
    return (F.silu(h) if silu else h).to(x.dtype)


def _qkv_attention(qkv: Tensor, num_heads: int) -> Tensor:
    # Legacy order: heads are split first, then each head's channels into q, k and v.
    n, width, length = qkv.shape
    q, k, v = qkv.reshape(n * num_heads, width // num_heads, length).chunk(3, dim=1)
    # Scaling q and k by the fourth root each keeps the product in range for half precision.
    root = 1 / math.sqrt(math.sqrt(q.shape[1]))
    logits = torch.einsum("bct,bcs->bts", q * root, k * root)
    work = torch.promote_types(qkv.dtype, torch.float32)
    attention = torch.softmax(logits.to(work), dim=-1).to(v.dtype)
    return torch.einsum("bts,bcs->bct", attention, v).reshape(n, width // 3, length)


def _norm_silu(
    norm: nn.GroupNorm,
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """SiLU(GroupNorm(x) * (1 + scale) + shift): the one place where the network normalises."""
    return _group_norm_silu(
        x,
        norm.num_groups,
        norm.weight,
        norm.bias,
        eps=norm.eps,
        scale=scale,
        shift=shift,
        silu=silu,
    )


def _zeroed(conv: nn.Module) -> nn.Module:
    """The last convolution of a residual branch starts at zero, so that the branch starts as the identity."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions around the time embedding, and a skip connection. [N, C, H, W] -> [N, C', H, W]."""

    def __init__(
        self, channels: int, emb_channels: int, out_channels: int, dropout: float, scale_shift: bool
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, channels),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if scale_shift else out_channels)
        )
        self.out_layers = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            _zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [N, C, H, W], emb [N, emb_channels]."""
        in_norm, _, in_conv = self.in_layers
        out_norm, _, dropout, out_conv = self.out_layers
        h = in_conv(_norm_silu(in_norm, x))
        emb = self.emb_layers(emb)
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = _norm_silu(out_norm, h, scale, shift)
        else:
            h = _norm_silu(out_norm, h + emb[:, :, None, None])
        return self.skip_connection(x) + out_conv(dropout(h))


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map, with a skip connection. [N, C, H, W] -> the same."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(NUM_GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W]."""
        qkv = self.qkv(_norm_silu(self.norm, x, silu=False).flatten(2))
        return x + self.proj_out(_qkv_attention(qkv, self.num_heads)).view(x.shape)


class Upsample(nn.Module):
    """Doubles height and width by repetition, then a 3x3 convolution if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C, 2H, 2W]."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


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


class UNet(nn.Module):
    """The network of Improved DDPM (Nichol & Dhariwal 2021, appendix A).

    config: a `UNetConfig`. `gradient_checkpointing` (default False) trades computation for memory in training.
    The state dict has the keys and shapes of openai/improved-diffusion.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        if not isinstance(config, UNetConfig):
            raise TypeError(f"UNet: config must be a UNetConfig, got {type(config).__name__}")
        self.config = config
        self.gradient_checkpointing = False
        self._diffusion: Diffusion | None = None

        c = config
        emb_channels = 4 * c.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(c.model_channels, emb_channels),
            nn.SiLU(),
            nn.Linear(emb_channels, emb_channels),
        )
        if c.num_classes is not None:
            self.label_emb = nn.Embedding(c.num_classes, emb_channels)

        def res_block(channels: int, out_channels: int) -> ResBlock:
            return ResBlock(channels, emb_channels, out_channels, c.dropout, c.use_scale_shift_norm)

        width = c.model_channels
        first_in = 2 * c.in_channels if c.super_resolution else c.in_channels
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(first_in, width, 3, padding=1))])
        skip_widths = [width]
        last = len(c.channel_mult) - 1
        for level, mult in enumerate(c.channel_mult):
            for _ in range(c.num_res_blocks):
                layers: list[nn.Module] = [res_block(width, mult * c.model_channels)]
                width = mult * c.model_channels
                if c.has_attention(level):
                    layers.append(AttentionBlock(width, c.num_heads))
                self.input_blocks.append(Block(*layers))
                skip_widths.append(width)
            if level != last:
                self.input_blocks.append(Block(Downsample(width, c.conv_resample)))
                skip_widths.append(width)

        self.middle_block = Block(
            res_block(width, width), AttentionBlock(width, c.num_heads), res_block(width, width)
        )

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(c.channel_mult))):
            for i in range(c.num_res_blocks + 1):
                layers = [res_block(width + skip_widths.pop(), mult * c.model_channels)]
                width = mult * c.model_channels
                if c.has_attention(level):
                    layers.append(AttentionBlock(width, c.heads_up))
                if level and i == c.num_res_blocks:
                    layers.append(Upsample(width, c.conv_resample))
                self.output_blocks.append(Block(*layers))

        self.out = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, width),
            nn.SiLU(),
            _zeroed(nn.Conv2d(width, c.out_channels, 3, padding=1)),
        )

    @property
    def diffusion(self) -> Diffusion | None:
        """The diffusion process that this network was trained for; it travels in the checkpoint."""
        return self._diffusion

    @diffusion.setter
    def diffusion(self, value: Diffusion | None) -> None:
        if value is not None:
            _require_channels_for(self.config, value.variance)
        self._diffusion = value

    def forward(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, low_res: Tensor | None = None
    ) -> Tensor:
        """The network's output for noisy images.

        x: [N, C, H, W] floating point, H and W multiples of 2^(levels - 1).
        timesteps: [N], the training chain's index, already rescaled where the diffusion asks for it.
        y: [N] integer labels of a class-conditional network, -1 for an unlabelled image. Their range is
            checked on the CPU only, since elsewhere looking would stall the device.
        low_res: [N, C, h, w] of a super-resolution network.
        Returns [N, out_channels, H, W] in the dtype of x. Raises ValueError or TypeError. Differentiable.
        """
        self._require_inputs(x, timesteps, y, low_res)
        emb = self._embed(timesteps, y)
        dtype = self.input_blocks[0][0].weight.dtype
        h = x if low_res is None else torch.cat([x, _upsample_to(low_res, x)], dim=1)
        h, emb = h.to(dtype), emb.to(dtype)
        # The noise of the first steps is finer than bfloat16 can tell apart on pixels near -1 or 1,
        # so the network's two ends, and with them the residual stream, keep their precision.
        with torch.autocast(x.device.type, enabled=False):
            h = self._run(self.input_blocks[0], h, emb)
        skips = [h]
        for block in self.input_blocks[1:]:
            h = self._run(block, h, emb)
            skips.append(h)
        h = self._run(self.middle_block, h, emb)
        for block in self.output_blocks:
            h = self._run(block, torch.cat([h, skips.pop()], dim=1), emb)
        norm, _, conv = self.out
        with torch.autocast(x.device.type, enabled=False):
            return conv(_norm_silu(norm, h).to(conv.weight.dtype)).to(x.dtype)

    def _run(self, block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, h, emb, use_reentrant=False)
        return block(h, emb)

    def _embed(self, timesteps: Tensor, y: Tensor | None) -> Tensor:
        """[N, 4 * model_channels]. bfloat16 cannot tell step 3999 from 4000, so this path is at least float32."""
        first, _, second = self.time_embed
        work = torch.promote_types(first.weight.dtype, torch.float32)
        with torch.autocast(timesteps.device.type, enabled=False):
            h = timestep_embedding(timesteps.to(work), self.config.model_channels)
            h = F.silu(F.linear(h, first.weight.to(work), first.bias.to(work)))
            h = F.linear(h, second.weight.to(work), second.bias.to(work))
            if y is not None:
                h = h + self.label_emb(y.clamp(min=0)).to(work) * (y >= 0)[:, None]
        return h

    def _require_inputs(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None, low_res: Tensor | None
    ) -> None:
        c = self.config
        if not x.is_floating_point():
            raise TypeError(f"UNet: x must be floating point, got {x.dtype}")
        if x.dim() != 4 or x.shape[1] != c.in_channels:
            raise ValueError(
                f"UNet: x must have shape [N, {c.in_channels}, H, W], got {list(x.shape)}"
            )
        n, _, height, width = x.shape
        if height < 1 or width < 1 or height % c.size_multiple or width % c.size_multiple:
            raise ValueError(
                f"UNet: x must have a height and width that are multiples of {c.size_multiple} "
                f"({len(c.channel_mult)} levels), got {height}x{width}"
            )
        if timesteps.shape != (n,):
            raise ValueError(f"UNet: timesteps must have shape [{n}], got {list(timesteps.shape)}")
        if (y is None) != (c.num_classes is None):
            rule = (
                "absent: the network has no classes"
                if c.num_classes is None
                else "given: the network has classes"
            )
            raise ValueError(
                f"UNet: y must be {rule}, got {'None' if y is None else list(y.shape)}"
            )
        if y is not None and c.num_classes is not None:
            _require_labels(y, n, c.num_classes)
        if (low_res is None) == c.super_resolution:
            rule = (
                "given: super_resolution is on"
                if c.super_resolution
                else "absent: super_resolution is off"
            )
            raise ValueError(
                f"UNet: low_res must be {rule}, got {'None' if low_res is None else list(low_res.shape)}"
            )
        if low_res is not None and (low_res.dim() != 4 or low_res.shape[:2] != x.shape[:2]):
            raise ValueError(
                f"UNet: low_res must have shape [{n}, {c.in_channels}, h, w], got {list(low_res.shape)}"
            )


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
        raise ValueError(f"UNet: y must have shape [{n}], got {list(y.shape)}")
    if y.device.type == "cpu" and n and not torch.compiler.is_compiling():
        low, high = (int(v) for v in y.aminmax())
        if low < -1 or high >= num_classes:
            raise ValueError(f"UNet: y must lie in [-1, {num_classes - 1}], got {low} .. {high}")


def _upsample_to(low_res: Tensor, x: Tensor) -> Tensor:
    """low_res [N, C, h, w] -> [N, C, H, W] bilinearly, in the dtype of x [N, C, H, W]."""
    return F.interpolate(low_res.to(x.dtype), x.shape[2:], mode="bilinear")

"""The configuration of the U-Net: what determines its tensors and what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from iddpm_ext.scalars import make_fields_plain
from iddpm_ext.sizes import ImageSize, checked_size, height_and_width

NUM_GROUPS = 32
ATTENTION_ORDERS = ("legacy", "new")
_COUNTS = (
    "in_channels",
    "model_channels",
    "out_channels",
    "num_res_blocks",
    "num_heads",
)
_FLAGS = ("use_scale_shift_norm", "conv_resample", "super_resolution", "resblock_updown")


_Config = TypeVar("_Config", bound="JsonConfig")


class JsonConfig:
    """A configuration dataclass that is stored as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, with lists for tuples; `from_dict` is its inverse."""
        values = asdict(self)  # type: ignore[call-overload]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
        """The configuration of a dict; a missing key takes its default, an unknown one raises."""
        name = cls.__name__
        if not isinstance(values, Mapping):
            raise TypeError(f"{name}.from_dict: values must be a mapping, got {values!r}")
        unknown = sorted(set(values) - {f.name for f in fields(cls)})  # type: ignore[arg-type]
        if unknown:
            raise ValueError(f"{name}.from_dict: keys must be fields of {name}, got {unknown}")
        return cls(**values)


@dataclass(frozen=True)
class UNetConfig(JsonConfig):
    """What determines the tensors of a `UNet` and what it computes. Raises ValueError or TypeError.

    image_size: the side, or (height, width), of the images; `attention_resolutions` refer to the longer
        side; `forward` takes other sizes too.
    in_channels, out_channels: of image and output (2 * in_channels for a learned variance).
    model_channels, channel_mult: level i has model_channels * channel_mult[i] channels, a multiple of
        32; a multiplier may be a fraction.
    num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
    attention_resolutions: the feature-map sides, image_size / 2^level, whose levels get attention.
    num_heads, num_heads_upsample: attention heads of encoder and decoder (None: the same).
    dropout: probability, in every residual block.
    num_classes: rows of the label embedding; None for an unconditional network.
    use_scale_shift_norm: the time embedding scales and shifts normalised features; else it is added.
    conv_resample: resample by a learned convolution, else by average pooling and repetition.
    super_resolution: the network takes `low_res`, upsampled and concatenated to its input.
    num_head_channels: width of a head in every attention block, instead of the numbers of heads.
    attention_order: "legacy" splits qkv into heads first, "new" into q, k and v first. Weights have the
        same shapes in both, and mean different things.
    resblock_updown: a residual block resamples between levels, instead of a single convolution.
    The last three are options of openai/guided-diffusion.
    """

    image_size: ImageSize = 32
    in_channels: int = 3
    model_channels: int = 128
    out_channels: int = 6
    num_res_blocks: int = 3
    channel_mult: tuple[int | float, ...] = (1, 2, 2, 2)
    attention_resolutions: tuple[int, ...] = (16, 8)
    num_heads: int = 4
    num_heads_upsample: int | None = None
    dropout: float = 0.0
    num_classes: int | None = None
    use_scale_shift_norm: bool = True
    conv_resample: bool = True
    super_resolution: bool = False
    num_head_channels: int | None = None
    attention_order: str = "legacy"
    resblock_updown: bool = False

    def __post_init__(self) -> None:
        make_fields_plain(self)
        object.__setattr__(self, "image_size", checked_size("UNetConfig", self.image_size))
        for name in _COUNTS:
            _require_count(name, getattr(self, name))
        for name in ("num_heads_upsample", "num_classes", "num_head_channels"):
            if getattr(self, name) is not None:
                _require_count(name, getattr(self, name))
        resolutions = _count_tuple("attention_resolutions", self.attention_resolutions)
        object.__setattr__(self, "attention_resolutions", resolutions)
        object.__setattr__(self, "channel_mult", _multipliers(self.channel_mult))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"UNetConfig: {name} must be a bool, got {getattr(self, name)!r}")
        if self.attention_order not in ATTENTION_ORDERS:
            raise ValueError(
                f"UNetConfig: attention_order must be one of {', '.join(ATTENTION_ORDERS)}, "
                f"got {self.attention_order!r}"
            )
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)):
            raise TypeError(f"UNetConfig: dropout must be a number, got {self.dropout!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"UNetConfig: dropout must lie in [0, 1), got {self.dropout}")
        if not self.channel_mult:
            raise ValueError("UNetConfig: channel_mult must have at least one level, got ()")
        if self.model_channels % NUM_GROUPS:
            raise ValueError(
                f"UNetConfig: model_channels must be a multiple of {NUM_GROUPS} "
                f"(the groups of every normalisation), got {self.model_channels}"
            )
        if any(side % self.size_multiple for side in self.size):
            raise ValueError(
                f"UNetConfig: image_size must be a multiple of {self.size_multiple} "
                f"(2^(levels - 1) for {len(self.channel_mult)} levels), got {self.image_size}"
            )
        levels = range(len(self.channel_mult))
        for mult in self.channel_mult:
            if self.model_channels * mult % NUM_GROUPS:
                raise ValueError(
                    f"UNetConfig: channel_mult must give every level a multiple of {NUM_GROUPS} "
                    f"channels, got {mult} of {self.model_channels}"
                )
        attended = {self.channels(level) for level in levels if self.has_attention(level)}
        if self.num_head_channels is not None:
            widths = attended | {self.channels(levels[-1])}
            _require_heads("num_head_channels", self.num_head_channels, widths)
            return
        _require_heads("num_heads", self.num_heads, attended | {self.channels(levels[-1])})
        _require_heads("num_heads_upsample", self.heads_up, attended)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return height_and_width(self.image_size)

    @property
    def side(self) -> int:
        """The longer of height and width."""
        return max(self.size)

    @property
    def size_multiple(self) -> int:
        """Image heights and widths must be multiples of this: 2^(levels - 1)."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def heads_up(self) -> int:
        """Attention heads of the decoder."""
        return self.num_heads if self.num_heads_upsample is None else self.num_heads_upsample

    def channels(self, level: int) -> int:
        """Channels of `level`, where 0 is the full image size."""
        return int(self.model_channels * self.channel_mult[level])

    def heads(self, channels: int, *, up: bool = False) -> int:
        """Attention heads of a block with `channels` channels, in the encoder or (`up`) the decoder."""
        if self.num_head_channels is not None:
            return channels // self.num_head_channels
        return self.heads_up if up else self.num_heads

    def has_attention(self, level: int) -> bool:
        """Whether the blocks of `level` carry attention."""
        return self.side // 2**level in self.attention_resolutions


def _require_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"UNetConfig: {name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"UNetConfig: {name} must be at least 1, got {value}")


def _count_tuple(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"UNetConfig: {name} must be a tuple of integers, got {value!r}")
    for entry in value:
        _require_count(name, entry)
    return tuple(value)


def _multipliers(value: object) -> tuple[int | float, ...]:
    """Whole multipliers become ints, so that 1.0 and 1 are one configuration."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"UNetConfig: channel_mult must be a tuple of numbers, got {value!r}")
    for entry in value:
        if isinstance(entry, bool) or not isinstance(entry, (int, float)):
            raise TypeError(f"UNetConfig: channel_mult must be a tuple of numbers, got {entry!r}")
        if not 0 < entry < float("inf"):
            raise ValueError(f"UNetConfig: channel_mult must be above 0, got {entry}")
    return tuple(int(entry) if entry == int(entry) else entry for entry in value)


def _require_heads(name: str, heads: int, widths: set[int]) -> None:
    for width in sorted(widths):
        if width % heads:
            raise ValueError(
                f"UNetConfig: {name} must divide the {width} channels of an attention block, "
                f"got {heads}"
            )

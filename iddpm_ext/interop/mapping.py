"""The correspondence of `UNet2DModel` and `UNet`: their parts and their configurations.

Apart from names, only the attention's projections differ: one qkv tensor instead of three. In the legacy
order its rows are [heads, (q, k, v), width of a head], in the new one [(q, k, v), heads, width].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from iddpm_ext.networks.config import NUM_GROUPS, UNetConfig

# Names of the modules of residual and attention blocks: UNet's -> UNet2DModel's; qkv is treated separately.
RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}

# Settings that a UNet2DModel must have for a UNet to compute the same; the first value is used for writing.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (0,),
    "flip_sin_to_cos": (True,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (1,),
    "act_fn": ("silu", "swish"),
    "norm_num_groups": (NUM_GROUPS,),
    "norm_eps": (1e-5,),
    "add_attention": (True,),
    "class_embed_type": (None,),
}
# Names of the blocks without and with attention, by how they resample: (down, up).
_BLOCK_TYPES = {
    "conv": (("DownBlock2D", "AttnDownBlock2D"), ("UpBlock2D", "AttnUpBlock2D")),
    "resnet": (
        ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        ("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
    ),
}
_NEEDED = (
    "block_out_channels",
    "down_block_types",
    "in_channels",
    "layers_per_block",
    "out_channels",
    "up_block_types",
)


class Block(NamedTuple):
    """A part of both networks. kind: "res", "attention" or "plain" (equal tensors, another name)."""

    ours: str
    theirs: str
    kind: str
    heads: int = 0


def blocks(config: UNetConfig) -> Iterator[Block]:
    """Every part that has tensors, in the order of the UNet's state dict."""
    yield Block("time_embed.0", "time_embedding.linear_1", "plain")
    yield Block("time_embed.2", "time_embedding.linear_2", "plain")
    if config.num_classes is not None:
        yield Block("label_emb", "class_embedding", "plain")
    yield Block("input_blocks.0.0", "conv_in", "plain")
    resampled = config.resblock_updown
    down, up = heads_of(config)
    levels, n = len(config.channel_mult), 0
    for level in range(levels):
        for i in range(config.num_res_blocks):
            n += 1
            yield Block(f"input_blocks.{n}.0", f"down_blocks.{level}.resnets.{i}", "res")
            if config.has_attention(level):
                theirs = f"down_blocks.{level}.attentions.{i}"
                yield Block(f"input_blocks.{n}.1", theirs, "attention", down[level])
        if level != levels - 1:
            n += 1
            theirs = f"down_blocks.{level}.downsamplers.0"
            if resampled:
                yield Block(f"input_blocks.{n}.0", theirs, "res")
            else:
                yield Block(f"input_blocks.{n}.0.op", f"{theirs}.conv", "plain")
    yield Block("middle_block.0", "mid_block.resnets.0", "res")
    yield Block("middle_block.1", "mid_block.attentions.0", "attention", down[levels - 1])
    yield Block("middle_block.2", "mid_block.resnets.1", "res")
    n = 0
    for k, level in enumerate(reversed(range(levels))):
        for i in range(config.num_res_blocks + 1):
            attended = config.has_attention(level)
            yield Block(f"output_blocks.{n}.0", f"up_blocks.{k}.resnets.{i}", "res")
            if attended:
                theirs = f"up_blocks.{k}.attentions.{i}"
                yield Block(f"output_blocks.{n}.1", theirs, "attention", up[level])
            if level and i == config.num_res_blocks:
                ours, theirs = f"output_blocks.{n}.{1 + attended}", f"up_blocks.{k}.upsamplers.0"
                if resampled:
                    yield Block(ours, theirs, "res")
                else:
                    yield Block(f"{ours}.conv", f"{theirs}.conv", "plain")
            n += 1
    yield Block("out.0", "conv_norm_out", "plain")
    yield Block("out.2", "conv_out", "plain")


def heads_of(config: UNetConfig) -> tuple[list[int], list[int]]:
    """Attention heads of every level, in the encoder and in the decoder."""
    width = config.num_head_channels
    levels = range(len(config.channel_mult))
    if width is not None:
        heads = [int(config.channels(level)) // width for level in levels]
        return heads, heads
    return [config.num_heads for _ in levels], [config.heads_up for _ in levels]


def is_stock(config: UNetConfig) -> bool:
    """Whether the stock `UNet2DModel` computes the same as a UNet of this configuration."""
    return (
        len(_head_widths(config)) == 1
        and config.num_classes is None  # label -1
        and not config.super_resolution
    )


def _head_widths(config: UNetConfig) -> set[int]:
    down, up = heads_of(config)
    last = len(config.channel_mult) - 1
    attended = [level for level in range(last + 1) if config.has_attention(level)]
    pairs = [(level, down[level]) for level in {*attended, last}]
    pairs += [(level, up[level]) for level in attended]
    return {int(config.channels(level)) // heads for level, heads in pairs}


def unet2d_arguments(config: UNetConfig, *, stock: bool) -> dict[str, Any]:
    """The arguments of `UNet2DModel`, or of `IDDPMUNet2DModel`, for the network of a UNet.

    Raises ValueError if that class has no such network.
    """
    if not config.conv_resample:
        raise ValueError(
            "to_diffusers: conv_resample must be True, as UNet2DModel always resamples by "
            "convolutions, got False"
        )
    widths = _head_widths(config)
    if stock and (len(widths) > 1 or config.super_resolution):
        reason = "super_resolution" if config.super_resolution else f"heads of widths {widths}"
        raise ValueError(
            "to_diffusers: stock must be False for what the stock UNet2DModel cannot compute, "
            f"{reason}, got True"
        )
    levels = range(len(config.channel_mult))
    attended = [config.has_attention(level) for level in levels]
    channels = [int(config.channels(level)) for level in levels]
    if channels[0] != config.model_channels:
        raise ValueError(f"to_diffusers: channel_mult must begin with 1, got {config.channel_mult}")
    resample = "resnet" if config.resblock_updown else "conv"
    down, up = _BLOCK_TYPES[resample]
    arguments = {name: allowed[0] for name, allowed in _REQUIRED.items()}
    arguments |= {
        "sample_size": config.image_size,
        "in_channels": config.in_channels * (2 if config.super_resolution else 1),
        "out_channels": config.out_channels,
        "down_block_types": [down[a] for a in attended],
        "up_block_types": [up[a] for a in reversed(attended)],
        "block_out_channels": channels,
        "layers_per_block": config.num_res_blocks,
        "downsample_type": resample,
        "upsample_type": resample,
        "dropout": config.dropout,
        "attention_head_dim": math.gcd(
            *widths
        ),  # divides all widths; the number of heads is set later
        "attn_norm_num_groups": NUM_GROUPS,
        "resnet_time_scale_shift": "scale_shift" if config.use_scale_shift_norm else "default",
        "num_class_embeds": config.num_classes,
    }
    if not stock:
        arguments["super_resolution"] = config.super_resolution
        if len(widths) > 1:
            arguments["num_attention_heads"] = config.num_heads
            arguments["num_attention_heads_up"] = config.num_heads_upsample
    return arguments


def config_of_unet2d(theirs: Mapping[str, Any]) -> UNetConfig:
    """The configuration of a UNet that computes what a `UNet2DModel` of this configuration does.

    Raises ValueError if there is none, listing all differences.
    """
    absent = [name for name in _NEEDED if name not in theirs]
    if absent:
        raise ValueError(f"from_diffusers: unet must say its {', '.join(absent)}, got nothing")
    problems = [
        f"{name}={' or '.join(map(repr, allowed))} (got {theirs.get(name, allowed[0])!r})"
        for name, allowed in _REQUIRED.items()
        if theirs.get(name, allowed[0]) not in allowed
    ]
    channels = list(theirs["block_out_channels"])
    multiples = [_ratio(c, channels[0]) for c in channels]
    if theirs.get("time_embedding_dim") not in (None, 4 * channels[0]):
        problems.append(f"time_embedding_dim=None (got {theirs['time_embedding_dim']})")
    scale_shift = theirs.get("resnet_time_scale_shift", "default")
    if scale_shift not in ("default", "scale_shift"):
        problems.append(f"resnet_time_scale_shift='scale_shift' (got {scale_shift!r})")
    groups = theirs.get("attn_norm_num_groups")
    if groups not in ((NUM_GROUPS, None) if scale_shift == "default" else (NUM_GROUPS,)):
        problems.append(f"attn_norm_num_groups={NUM_GROUPS} (got {groups})")
    size = theirs.get("sample_size")
    sides: list[Any] = list(size) if isinstance(size, (tuple, list)) else [size]
    if len(sides) not in (1, 2) or not all(isinstance(side, int) for side in sides):
        problems.append(f"sample_size=a whole number, or two (got {size!r})")
    kinds = {_resampling(theirs, name) for name in ("downsample_type", "upsample_type")}
    resample = kinds.pop()
    if kinds or resample not in _BLOCK_TYPES:
        problems.append(
            f"downsample_type and upsample_type alike (got {sorted({resample, *kinds})})"
        )
    down, up = list(theirs["down_block_types"]), list(theirs["up_block_types"])
    attended = [kind == "AttnDownBlock2D" for kind in down]
    ours_down, ours_up = _BLOCK_TYPES.get(resample, _BLOCK_TYPES["conv"])
    if down != [ours_down[a] for a in attended] or up != [ours_up[a] for a in reversed(attended)]:
        problems.append(f"block types that mirror each other (got {down} and {up})")
    heads, options = _heads_of_unet2d(theirs, channels, attended)
    options["resblock_updown"] = resample == "resnet"
    if problems:
        raise ValueError(f"from_diffusers: unet must have {'; '.join(problems)}")
    super_resolution = bool(theirs.get("super_resolution", False))
    return UNetConfig.from_dict(
        {
            "image_size": size,
            "in_channels": theirs["in_channels"] // (2 if super_resolution else 1),
            "model_channels": channels[0],
            "out_channels": theirs["out_channels"],
            "num_res_blocks": theirs["layers_per_block"],
            "channel_mult": multiples,
            "attention_resolutions": [max(sides) // 2**i for i, a in enumerate(attended) if a],
            "num_heads": heads,
            "num_heads_upsample": theirs.get("num_attention_heads_up"),
            "dropout": theirs.get("dropout", 0.0),
            "num_classes": theirs.get("num_class_embeds"),
            "use_scale_shift_norm": scale_shift == "scale_shift",
            "super_resolution": super_resolution,
            **options,
        }
    )


def _heads_of_unet2d(
    theirs: Mapping[str, Any], channels: list[int], attended: list[bool]
) -> tuple[int, dict[str, Any]]:
    """(num_heads, further options) of the UNet's configuration."""
    if theirs.get("num_attention_heads") is not None:
        return theirs["num_attention_heads"], {}
    width = theirs.get("attention_head_dim", 8)
    last = len(channels) - 1
    widths = {channels[i] for i in {*(i for i, a in enumerate(attended) if a), last}}
    if width is None:
        return 1, {}
    counts = {w // width for w in widths}
    if len(counts) == 1:
        return counts.pop(), {}
    return 1, {"num_head_channels": width}


def _resampling(theirs: Mapping[str, Any], name: str) -> str:
    """How it resamples; some types of blocks use a residual block, whatever the setting."""
    side = "down_block_types" if name == "downsample_type" else "up_block_types"
    if any(kind.startswith("Resnet") for kind in theirs[side]):
        return "resnet"
    return theirs.get(name) or "conv"


def _ratio(a: int, b: int) -> int | float:
    return a // b if a % b == 0 else a / b

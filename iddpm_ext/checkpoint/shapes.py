"""Infers the configuration of a U-Net from the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from iddpm_ext.networks.config import UNetConfig

Shapes = Mapping[str, tuple[int, ...]]


class Unlike(ValueError):
    """The tensors are not those of OpenAI's U-Net; says why."""


@dataclass(frozen=True)
class Structure:
    """The part of a `UNetConfig` that shapes determine. attention_levels: 0 is the full image size."""

    in_channels: int
    model_channels: int
    out_channels: int
    num_res_blocks: int
    channel_mult: tuple[int | float, ...]
    attention_levels: tuple[int, ...]
    num_classes: int | None
    use_scale_shift_norm: bool
    conv_resample: bool
    super_resolution: bool
    resblock_updown: bool

    @classmethod
    def of_config(cls, config: UNetConfig) -> Structure:
        """The structure that the tensors of this configuration's network have."""
        levels = range(len(config.channel_mult))
        values: dict[str, Any] = {f.name: getattr(config, f.name, None) for f in fields(cls)}
        values["attention_levels"] = tuple(i for i in levels if config.has_attention(i))
        # Resampling by residual blocks has no weights, so then the tensors do not show conv_resample.
        values["conv_resample"] = config.conv_resample or config.resblock_updown
        return cls(**values)

    def config(self, image_size: int, **more: Any) -> UNetConfig:
        """The configuration, given what shapes cannot tell."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        levels = values.pop("attention_levels")
        sides = tuple(image_size >> level for level in levels)
        return UNetConfig(
            **{**values, "attention_resolutions": sides, **more}, image_size=image_size
        )


def infer(shapes: Shapes) -> Structure:
    """The structure of the U-Net that these tensors belong to. Raises Unlike."""
    blocks, channels = _count_blocks(shapes), _shape(shapes, "time_embed.0.weight", 2)[1]
    ups = {
        (kind, i)
        for i in range(blocks)
        for k in (1, 2)
        for kind in ("conv", "in_layers.0")
        if f"output_blocks.{i}.{k}.{kind}.weight" in shapes
    }
    updown = any(kind == "in_layers.0" for kind, _ in ups)
    # Layers without weights leave gaps in the numbering.
    gaps = sum(not _has_block(shapes, f"input_blocks.{i}") for i in range(blocks))
    levels = 1 + (len(ups) or gaps)
    res_blocks, rest = divmod(blocks, levels)
    if rest or res_blocks < 2:
        raise Unlike(f"{blocks} input blocks cannot be {levels} levels")
    firsts = [1 + level * res_blocks for level in range(levels)]
    widths = [_shape(shapes, f"input_blocks.{i}.0.out_layers.3.weight", 4)[0] for i in firsts]
    mults = [width / channels for width in widths]
    embedded = _shape(shapes, "input_blocks.1.0.emb_layers.1.weight", 2)[0]
    if embedded not in (widths[0], 2 * widths[0]):
        raise Unlike(f"the time embedding gives {embedded} numbers to {widths[0]} channels")
    taken = _shape(shapes, "input_blocks.0.0.weight", 4)[1]
    given = _shape(shapes, "out.2.weight", 4)[0]
    # A low-resolution input doubles the in-channels, so that there are more of them than out-channels unless
    # the variance is learned. Six and six is ambiguous: taken for an upsampler of 3 channels.
    upsamples = taken % 2 == 0 and (given == taken // 2 or given == taken == 6)
    labelled = "label_emb.weight" in shapes
    return Structure(
        in_channels=taken // 2 if upsamples else taken,
        model_channels=channels,
        out_channels=given,
        num_res_blocks=res_blocks - 1,
        channel_mult=tuple(int(m) if m == int(m) else m for m in mults),
        attention_levels=tuple(
            level for level, i in enumerate(firsts) if f"input_blocks.{i}.1.qkv.weight" in shapes
        ),
        num_classes=_shape(shapes, "label_emb.weight", 2)[0] if labelled else None,
        use_scale_shift_norm=embedded == 2 * widths[0],
        conv_resample=updown or levels == 1 or bool(ups),
        super_resolution=upsamples,
        resblock_updown=updown,
    )


def _count_blocks(shapes: Shapes) -> int:
    if not any(name.startswith("output_blocks.") for name in shapes) and any(
        name.startswith("out.") for name in shapes
    ):
        raise Unlike("it has no way up, as a classifier: load_classifier reads those")
    counts = []
    for part in ("input_blocks", "output_blocks"):
        numbers = [name.split(".")[1] for name in shapes if name.startswith(f"{part}.")]
        found = {int(n) for n in numbers if n.isascii() and n.isdigit() and len(n) < 6}
        if not found:
            names = ", ".join(sorted(shapes)[:4]) or "no tensor"
            raise Unlike(f"there is no {part}; the first names are {names}")
        counts.append(max(found) + 1)
    if counts[0] != counts[1] or counts[0] > len(shapes):
        raise Unlike(f"there are {counts[0]} input blocks and {counts[1]} output blocks")
    return counts[0]


def _has_block(shapes: Shapes, prefix: str) -> bool:
    names = (".0.weight", ".0.op.weight", ".0.in_layers.0.weight")
    return any(prefix + name in shapes for name in names)


def _shape(shapes: Shapes, name: str, dims: int) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None:
        raise Unlike(f"{name} is missing")
    if len(shape) != dims or 0 in shape:
        raise Unlike(f"{name} is {list(shape)}")
    return shape

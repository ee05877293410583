"""The card of a network: what people read of it on the hub, written from what the checkpoint says."""

from __future__ import annotations

import json
from typing import Any

from iddpm_ext.networks.unet import UNet
from iddpm_ext.text import printable

_SHOWN = 20
_LONGEST = 80


def card_of(model: UNet, name: str | None = None) -> str:
    """Markdown with the front matter of the hub. name: "org/name", None for a folder.

    It says what the checkpoint says and no more: of licence, data and quality only those who trained know.
    """
    conditional = model.config.num_classes is not None
    front = [
        "---",
        "library_name: iddpm_ext",
        *([] if conditional else ["pipeline_tag: unconditional-image-generation"]),
        "tags:",
        *(f"- {tag}" for tag in ("diffusion", "improved-ddpm", "image-generation", "safetensors")),
        "---",
    ]
    title = name.rpartition("/")[2] if name else "An Improved DDPM"
    rows = [*_network(model), *_process(model), *_training(model)]
    table = ["| | |", "|---|---|", *(f"| {what} | {fact} |" for what, fact in rows)]
    return "\n".join(
        [
            *front, "", f"# {title}", "",
            "A network of [Improved DDPM](https://arxiv.org/abs/2102.09672) in one safetensors file, for the "
            "Python package `iddpm_ext`. This card was written from the file.",
            "", *table, "", "## Use", "", "```python", *_use(model, name), "```", "",
            *_classes(model),
            "## What this card does not know", "",
            "Licence, training data and its rights, intended use and quality: who trained the network can "
            "say them here.", "",
        ]
    )  # fmt: skip


def _network(model: UNet) -> list[tuple[str, str]]:
    config = model.config
    height, width = config.size
    widths = ", ".join(str(config.model_channels * factor) for factor in config.channel_mult)
    sides = ", ".join(map(str, config.attention_resolutions))
    attention = f"attention at {sides}" if sides else "no attention"
    rows = [
        ("images", f"{width}x{height} pixels, {_count(config.in_channels, 'channel')}"),
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("network", f"{widths} channels, {_count(config.num_res_blocks, 'residual block')} a level, "
                    f"{attention}"),
    ]  # fmt: skip
    if config.num_classes is not None:
        rows.append(("classes", str(config.num_classes)))
    if config.super_resolution:
        rows.append(("task", "enlarges low-resolution images"))
    return rows


def _process(model: UNet) -> list[tuple[str, str]]:
    process = model.diffusion
    if process is None:
        return [("diffusion", "not in the file")]
    terminal = ", zero terminal SNR" if process.zero_terminal_snr else ""
    return [
        ("diffusion", f"{process.schedule} schedule, T = {process.num_train_timesteps}, predicts "
                      f"{process.prediction}, variance {process.variance}{terminal}"),
    ]  # fmt: skip


def _training(model: UNet) -> list[tuple[str, str]]:
    """What `extra` says, but for what has a section of its own and what is long."""
    rows = []
    for key, value in model.extra.items():
        if key == "class_names":
            continue
        if key == "step_schedules" and isinstance(value, dict):
            rows.append(("step schedules", ", ".join(f"optimal-{_text(n)}" for n in value)))
        elif isinstance(value, (str, int, float, bool)):
            rows.append((_text(key.replace("_", " ")), _text(value)))
    return rows


def _use(model: UNet, name: str | None) -> list[str]:
    source = f'iddpm_ext.UNet.from_pretrained("{name}")' if name else 'iddpm_ext.load("FOLDER")'
    lines = ["import iddpm_ext", "", f"model = {source}"]
    if model.diffusion is None:
        return lines
    labels = ", labels=[0, 0, 1, 1]" if model.config.num_classes is not None else ", n=4"
    small = ", low_res=small" if model.config.super_resolution else ""
    return [
        *lines,
        f"x = iddpm_ext.sample(model, steps=50{labels}{small}, seed=0)",
        'iddpm_ext.save_images(x, "samples.png")',
    ]


def _classes(model: UNet) -> list[str]:
    names = model.extra.get("class_names")
    if not isinstance(names, list) or not names:
        return []
    shown = [f"{i}: {_text(value)}" for i, value in enumerate(names[:_SHOWN])]
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return ["## Classes", "", "; ".join([*shown, *more]) + ".", ""]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _text(value: Any) -> str:
    """A value of the file inside a table of Markdown, without a character that would end it."""
    text = value if isinstance(value, str) else json.dumps(value)
    plain = printable(text, _LONGEST)
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>|#" else c for c in plain)

"""What OpenAI published of its checkpoints, and a small network and flags like theirs."""

from __future__ import annotations

import json
from pathlib import Path

from iddpm_ext.networks.unet import UNetConfig

# The eight of March 2021: flags, parameter counts, names and shapes of tensors.
MARCH = json.loads((Path(__file__).parent / "golden" / "openai_checkpoints.json").read_text())
CHANNEL_MULT = {256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)}
OWN = UNetConfig(
    image_size=16,
    in_channels=3,
    model_channels=32,
    out_channels=6,
    num_res_blocks=1,
    channel_mult=(1, 2),
    attention_resolutions=(8,),
    num_heads=2,
)
FLAGS = {
    "image_size": 16,
    "num_heads": 2,
    "noise_schedule": "linear",
    "diffusion_steps": 200,
    "rescale_timesteps": False,
}


def config_of_flags(flags: dict) -> UNetConfig:
    size = flags.get("large_size") or flags["image_size"]
    return UNetConfig(
        image_size=size,
        model_channels=flags["num_channels"],
        out_channels=6 if flags["learn_sigma"] else 3,
        num_res_blocks=flags["num_res_blocks"],
        channel_mult=CHANNEL_MULT[size],
        attention_resolutions=tuple(int(r) for r in flags["attention_resolutions"].split(",")),
        num_heads=flags["num_heads"],
        dropout=flags["dropout"],
        num_classes=1000 if flags["class_cond"] else None,
        use_scale_shift_norm=flags["use_scale_shift_norm"],
        super_resolution="large_size" in flags,
    )

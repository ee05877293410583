"""State-dict keys, shapes and parameter counts of the eight checkpoints that OpenAI released."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from iddpm_ext.networks.unet import UNet, UNetConfig

RELEASED = json.loads((Path(__file__).parent / "golden" / "openai_checkpoints.json").read_text())
CHANNEL_MULT = {256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)}
# Scaling experiment: million parameters of an ImageNet-64 network by model_channels.
SCALING = {64: 30.3, 96: 68.1, 128: 121.1, 192: 272.3}


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


@pytest.mark.parametrize("name", RELEASED)
def test_state_dict_has_the_released_keys_and_shapes_in_order(name):
    entry = RELEASED[name]
    tensors = entry.get("tensors") or RELEASED[entry["same_tensors_as"]]["tensors"]
    with torch.device("meta"):
        model = UNet(config_of_flags(entry["flags"]))
    assert [[k, list(v.shape)] for k, v in model.state_dict().items()] == [
        [k, shape] for k, shape in tensors.items()
    ]
    assert sum(p.numel() for p in model.parameters()) == entry["parameters"]


@pytest.mark.parametrize("channels", SCALING)
def test_scaling_experiment_has_the_known_sizes(channels):
    config = UNetConfig(image_size=64, model_channels=channels, channel_mult=(1, 2, 3, 4))
    with torch.device("meta"):
        model = UNet(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == SCALING[channels]


def test_forward_on_the_meta_device_gives_the_output_shape():
    with torch.device("meta"):
        model = UNet(config_of_flags(RELEASED["upsample_cond_500K.pt"]["flags"]))
        out = model(
            torch.empty(2, 3, 256, 256),
            torch.empty(2),
            torch.zeros(2, dtype=torch.int64),
            torch.empty(2, 3, 64, 64),
        )
    assert out.shape == (2, 6, 256, 256)

"""State-dict keys, shapes and parameter counts of the eight checkpoints that OpenAI released."""

from __future__ import annotations

import pytest
import torch
from openai_files import MARCH, config_of_flags

from iddpm_ext.networks.unet import UNet, UNetConfig

# Scaling experiment: million parameters of an ImageNet-64 network by model_channels.
SCALING = {64: 30.3, 96: 68.1, 128: 121.1, 192: 272.3}


@pytest.mark.parametrize("name", MARCH)
def test_state_dict_has_the_released_keys_and_shapes_in_order(name):
    entry = MARCH[name]
    tensors = entry.get("tensors") or MARCH[entry["same_tensors_as"]]["tensors"]
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
        model = UNet(config_of_flags(MARCH["upsample_cond_500K.pt"]["flags"]))
        out = model(
            torch.empty(2, 3, 256, 256),
            torch.empty(2),
            torch.zeros(2, dtype=torch.int64),
            torch.empty(2, 3, 64, 64),
        )
    assert out.shape == (2, 6, 256, 256)

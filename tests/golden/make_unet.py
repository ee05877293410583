"""Golden outputs of the original U-Net: weights by formula on both sides, so outputs suffice.

`python tests/golden/make_unet.py CLONE`, with a clone of openai/improved-diffusion (1bc7bbb),
writes tests/golden/unet.json anew. Only the original's code computes what is stored there.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).with_name("unet.json")
PICKS = 24

CASES: dict[str, dict[str, Any]] = {
    "scale_shift": {"image_size": 32, "channel_mult": [1, 2, 2], "attention_resolutions": [16, 8]},
    "added_embedding_one_head": {
        "image_size": 32,
        "channel_mult": [1, 2, 2],
        "attention_resolutions": [16],
        "num_heads": 1,
        "use_scale_shift_norm": False,
    },
    "class_conditional_28": {
        "image_size": 28,
        "in_channels": 1,
        "out_channels": 2,
        "channel_mult": [1, 2, 2],
        "attention_resolutions": [14, 7],
        "num_classes": 10,
    },
    "super_resolution": {
        "image_size": 16,
        "channel_mult": [1, 2],
        "attention_resolutions": [8],
        "num_classes": 5,
        "super_resolution": True,
    },
    "wide_image_unequal_heads": {
        "image_size": 16,
        "channel_mult": [1, 2, 3],
        "num_res_blocks": 2,
        "attention_resolutions": [16, 4],
        "num_heads": 4,
        "num_heads_upsample": 2,
        "size": [16, 24],
    },
}


def config_of(case: dict[str, Any]) -> dict[str, Any]:
    """The UNetConfig fields of a case, its defaults filled in."""
    small = {"in_channels": 3, "out_channels": 6, "model_channels": 32, "num_res_blocks": 1}
    return {**small, "num_heads": 4, **{k: v for k, v in case.items() if k != "size"}}


@torch.no_grad()
def fill_by_formula(model: nn.Module) -> None:
    """Every weight a fixed sine of its tensor's rank by name and its own position; none is zero."""
    for rank, (name, weight) in enumerate(sorted(model.state_dict().items())):
        index = torch.arange(weight.numel(), dtype=torch.float64)
        wave = torch.sin(12.9898 * index + 78.233 * (rank + 1)).reshape(weight.shape)
        if weight.dim() > 1:
            fan_in = weight[0].numel()
            wave = wave * math.sqrt(2.0 / fan_in)
        elif name.endswith("weight"):
            wave = 1 + 0.2 * wave
        else:
            wave = 0.2 * wave
        weight.copy_(wave)


def inputs_of(case: dict[str, Any]) -> dict[str, Tensor]:
    """x, timesteps, y and low_res of a case, by formula, float32, two images."""
    config = config_of(case)
    height, width = case.get("size", [config["image_size"]] * 2)
    channels = config["in_channels"]

    def wave(*shape: int, phase: float) -> Tensor:
        index = torch.arange(math.prod(shape), dtype=torch.float64)
        return torch.sin(0.37 * index * (1 + 0.01 * index.sqrt()) + phase).reshape(shape).float()

    inputs = {
        "x": wave(2, channels, height, width, phase=0.5),
        "timesteps": torch.tensor([3.25, 871.0]),
    }
    if config.get("num_classes"):
        inputs["y"] = torch.tensor([0, config["num_classes"] - 1])
    if config.get("super_resolution"):
        inputs["low_res"] = wave(2, channels, height // 2, width // 2, phase=1.5)
    return inputs


def summary(output: Tensor) -> dict[str, Any]:
    """A few evenly spread values, and the mean square of all."""
    flat = output.detach().double().flatten()
    picks = torch.linspace(0, flat.numel() - 1, PICKS).round().long()
    return {
        "shape": list(output.shape),
        "values": [float(f"{v:.9g}") for v in flat[picks]],
        "mean_square": float(f"{flat.square().mean():.9g}"),
    }


def main(clone: str) -> None:
    """Writes tests/golden/unet.json from the original's code."""
    sys.path.insert(0, clone)
    from improved_diffusion.unet import SuperResModel, UNetModel

    golden = {}
    for name, case in CASES.items():
        config = config_of(case)
        super_resolution = config.pop("super_resolution", False)
        size = config.pop("image_size")
        config["attention_resolutions"] = [size // r for r in config["attention_resolutions"]]
        config.setdefault("use_scale_shift_norm", True)
        model = (SuperResModel if super_resolution else UNetModel)(**config).eval()
        fill_by_formula(model)
        with torch.no_grad():
            golden[name] = summary(model(**inputs_of(case)))
    source = "openai/improved-diffusion 1bc7bbb, float32 on the CPU, by tests/golden/make_unet.py"
    GOLDEN.write_text(json.dumps({"source": source, "cases": golden}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

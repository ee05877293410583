"""Golden outputs and key digests of openai/guided-diffusion, made as in make_unet.py.

`python tests/golden/make_guided.py CLONE`, with a clone of openai/guided-diffusion (22e0df8),
writes tests/golden/guided.json anew. Only the original's code computes what is stored there.
"""

from __future__ import annotations

import hashlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from golden.make_unet import fill_by_formula, inputs_of, summary

GOLDEN = Path(__file__).with_name("guided.json")

# UNetConfig fields, but for `size`; with `pool` those of a ClassifierConfig.
SMALL = {"in_channels": 3, "model_channels": 64, "num_res_blocks": 1, "use_scale_shift_norm": True}
CASES: dict[str, dict[str, Any]] = {
    "new_order_resblock_updown": {
        "image_size": 16,
        "out_channels": 6,
        "channel_mult": [1, 2, 3],
        "attention_resolutions": [8, 4],
        "num_head_channels": 32,
        "attention_order": "new",
        "resblock_updown": True,
        "num_classes": 7,
    },
    "legacy_order_resblock_updown": {
        "image_size": 16,
        "out_channels": 6,
        "channel_mult": [1, 2],
        "attention_resolutions": [8],
        "num_heads": 4,
        "resblock_updown": True,
        "size": [16, 24],
    },
    "half_width_first_level": {
        "image_size": 16,
        "out_channels": 3,
        "channel_mult": [0.5, 1, 1],
        "attention_resolutions": [4],
        "num_head_channels": 64,
        "use_scale_shift_norm": False,
    },
    "super_resolution_updown": {
        "image_size": 16,
        "out_channels": 6,
        "channel_mult": [1, 2],
        "attention_resolutions": [16],
        "num_head_channels": 64,
        "resblock_updown": True,
        "num_classes": 5,
        "super_resolution": True,
    },
    **{
        f"classifier_{pool}": {
            "image_size": 16,
            "num_classes": 11,
            "channel_mult": [0.5, 1, 2],
            "attention_resolutions": [8],
            "num_head_channels": 32,
            "resblock_updown": pool != "spatial",
            "pool": pool,
        }
        for pool in ("attention", "adaptive", "spatial", "spatial_v2")
    },
}

# The flags that the original's README gives for each released file.
_ADM = "--class_cond True --learn_sigma True --resblock_updown True --use_scale_shift_norm True"
_SIDES = "--attention_resolutions 32,16,8"
_LSUN = (
    f"{_ADM} {_SIDES} --class_cond False --image_size 256 --noise_schedule linear "
    "--num_channels 256 --num_head_channels 64 --num_res_blocks 2"
)
_LARGE = f"{_ADM} {_SIDES} --noise_schedule linear --num_channels 256 --num_res_blocks 2"
_UPSAMPLE = f"{_ADM} --noise_schedule linear --num_channels 192 --num_res_blocks 2"
RELEASED = {
    "64x64_diffusion.pt": f"{_ADM} {_SIDES} --image_size 64 --noise_schedule cosine "
    "--num_channels 192 --num_head_channels 64 --num_res_blocks 3 --use_new_attention_order True "
    "--dropout 0.1",
    "128x128_diffusion.pt": f"{_LARGE} --image_size 128 --num_heads 4",
    "256x256_diffusion.pt": f"{_LARGE} --image_size 256 --num_head_channels 64",
    "256x256_diffusion_uncond.pt": _LSUN,
    "512x512_diffusion.pt": f"{_LARGE} --image_size 512 --num_head_channels 64",
    "64_256_upsampler.pt": f"{_UPSAMPLE} {_SIDES} --large_size 256 --small_size 64 --num_heads 4",
    "128_512_upsampler.pt": f"{_UPSAMPLE} --attention_resolutions 32,16 --large_size 512 "
    "--small_size 128 --num_head_channels 64",
    "lsun_bedroom.pt": f"{_LSUN} --dropout 0.1",
    "lsun_cat.pt": f"{_LSUN} --dropout 0.1",
    "lsun_horse.pt": f"{_LSUN} --dropout 0.1",
    "lsun_horse_nodropout.pt": _LSUN,
    "64x64_classifier.pt": "--image_size 64 --classifier_depth 4",
    "128x128_classifier.pt": "--image_size 128",
    "256x256_classifier.pt": "--image_size 256",
    "512x512_classifier.pt": "--image_size 512",
}


def digest(model: nn.Module) -> dict[str, Any]:
    """Number of tensors and parameters, and a hash of every name and shape in order."""
    listed = [[name, list(value.shape)] for name, value in model.state_dict().items()]
    return {
        "tensors": len(listed),
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
    }


def _original(case: dict[str, Any]) -> nn.Module:
    from guided_diffusion.unet import EncoderUNetModel, SuperResModel, UNetModel

    config = {**SMALL, **{k: v for k, v in case.items() if k != "size"}}
    size = config["image_size"]
    config["attention_resolutions"] = [size // r for r in config["attention_resolutions"]]
    config["use_new_attention_order"] = config.pop("attention_order", "legacy") == "new"
    if "pool" in config:
        config["out_channels"] = config.pop("num_classes")
        return EncoderUNetModel(**config)
    return (SuperResModel if config.pop("super_resolution", False) else UNetModel)(**config)


def _released(flags: str) -> nn.Module:
    import argparse

    from guided_diffusion import script_util as original

    if "classifier" in flags or flags.startswith("--image_size"):
        defaults, create = original.classifier_defaults(), original.create_classifier
    elif "large_size" in flags:
        defaults = original.sr_model_and_diffusion_defaults()
        create = original.sr_create_model_and_diffusion
    else:
        defaults = original.model_and_diffusion_defaults()
        create = original.create_model_and_diffusion
    parser = argparse.ArgumentParser()
    original.add_dict_to_argparser(parser, defaults)
    made = create(**vars(parser.parse_args(flags.split())))
    return made[0] if isinstance(made, tuple) else made


def main(clone: str) -> None:
    """Writes tests/golden/guided.json from the original's code."""
    sys.path.insert(0, clone)
    # Its logger wants MPI, which no network needs.
    sys.modules["guided_diffusion.logger"] = types.ModuleType("guided_diffusion.logger")
    outputs = {}
    for name, case in CASES.items():
        model = _original(case).eval()
        fill_by_formula(model)
        inputs = inputs_of({**SMALL, **case})
        if "pool" in case:
            inputs.pop("y")
        with torch.no_grad():
            outputs[name] = summary(model(**inputs))
    with torch.device("meta"):
        released = {name: digest(_released(flags)) for name, flags in RELEASED.items()}
    source = "openai/guided-diffusion 22e0df8, float32 on the CPU, by tests/golden/make_guided.py"
    golden = {"source": source, "cases": outputs, "released": released}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

"""The checkpoints that OpenAI released, and the flags that belong to each.

A file is recognised by the structure of its tensors. Files that share a structure also share every flag that
the network or its process depends on.
"""

from __future__ import annotations

from typing import Any

from .flags import read_flags

# improved-diffusion's march-2021 files, then guided-diffusion's of july 2021: the defaults of their
# scripts, and what their READMEs give for each file.
_IMPROVED = (
    "--num_heads 4 --attention_resolutions 16,8 --dropout 0 --use_scale_shift_norm True "
    "--diffusion_steps 1000 --noise_schedule linear --rescale_timesteps True --learn_sigma True "
    "--class_cond False"
)
_GUIDED = (
    "--attention_resolutions 32,16,8 --dropout 0 --use_scale_shift_norm True --resblock_updown True "
    "--diffusion_steps 1000 --noise_schedule linear --rescale_timesteps False --learn_sigma True "
    "--class_cond True --use_new_attention_order False"
)
_COSINE_4000 = "--diffusion_steps 4000 --noise_schedule cosine"
_IMAGENET = f"{_COSINE_4000} --image_size 64 --num_channels 128 --num_res_blocks 3"
_CIFAR = f"{_COSINE_4000} --image_size 32 --num_channels 128 --num_res_blocks 3 --dropout 0.3"
_LSUN = (
    "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 "
    "--attention_resolutions 16 --use_scale_shift_norm False --rescale_timesteps False"
)
_GUIDED_256 = "--image_size 256 --num_channels 256 --num_res_blocks 2 --num_head_channels 64"
_GUIDED_LSUN = f"{_GUIDED_256} --class_cond False --dropout 0.1"

_FLAGS = {
    "imagenet64_uncond_100M_1500K.pt": (_IMPROVED, _IMAGENET),
    "cifar10_uncond_50M_500K.pt": (_IMPROVED, _CIFAR),
    "imagenet64_cond_270M_250K.pt": (
        _IMPROVED,
        f"{_COSINE_4000} --image_size 64 --num_channels 192 --num_res_blocks 3 --class_cond True "
        "--rescale_timesteps False",
    ),
    "upsample_cond_500K.pt": (
        _IMPROVED,
        "--diffusion_steps 4000 --large_size 256 --num_channels 192 --num_res_blocks 2 "
        "--class_cond True --rescale_timesteps False",
    ),
    "lsun_uncond_100M_1200K_bs128.pt": (_IMPROVED, _LSUN),
    "lsun_uncond_100M_2400K_bs64.pt": (_IMPROVED, _LSUN),
    "imagenet64_uncond_vlb_100M_1500K.pt": (_IMPROVED, _IMAGENET),
    "cifar10_uncond_vlb_50M_500K.pt": (_IMPROVED, _CIFAR),
    "64x64_diffusion.pt": (
        _GUIDED,
        "--image_size 64 --noise_schedule cosine --num_channels 192 --num_head_channels 64 "
        "--num_res_blocks 3 --use_new_attention_order True --dropout 0.1",
    ),
    "128x128_diffusion.pt": (
        _GUIDED,
        "--image_size 128 --num_channels 256 --num_res_blocks 2 --num_heads 4",
    ),
    "256x256_diffusion.pt": (_GUIDED, _GUIDED_256),
    "256x256_diffusion_uncond.pt": (_GUIDED, f"{_GUIDED_256} --class_cond False"),
    "512x512_diffusion.pt": (
        _GUIDED,
        "--image_size 512 --num_channels 256 --num_res_blocks 2 --num_head_channels 64",
    ),
    "64_256_upsampler.pt": (
        _GUIDED,
        "--large_size 256 --num_channels 192 --num_res_blocks 2 --num_heads 4",
    ),
    "128_512_upsampler.pt": (
        _GUIDED,
        "--large_size 512 --num_channels 192 --num_res_blocks 2 --num_head_channels 64 "
        "--attention_resolutions 32,16 --channel_mult 1,1,2,2,4,4",
    ),
    "lsun_bedroom.pt": (_GUIDED, _GUIDED_LSUN),
    "lsun_cat.pt": (_GUIDED, _GUIDED_LSUN),
    "lsun_horse.pt": (_GUIDED, _GUIDED_LSUN),
    "lsun_horse_nodropout.pt": (_GUIDED, f"{_GUIDED_LSUN} --dropout 0"),
}
_CLASSIFIER = (
    "--classifier_width 128 --classifier_depth 2 --classifier_attention_resolutions 32,16,8 "
    "--classifier_use_scale_shift_norm True --classifier_resblock_updown True "
    "--classifier_pool attention"
)
_CLASSIFIERS = {
    "64x64_classifier.pt": "--image_size 64 --classifier_depth 4",
    "128x128_classifier.pt": "--image_size 128",
    "256x256_classifier.pt": "--image_size 256",
    "512x512_classifier.pt": "--image_size 512",
}
RELEASED = tuple(_FLAGS)
RELEASED_CLASSIFIERS = tuple(_CLASSIFIERS)

# The scripts' default channel_mult, by image size.
CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}


def flags_of(name: str) -> dict[str, Any]:
    """The flags of a released file, by this package's names: all that `describe` needs."""
    if name in _CLASSIFIERS:
        flags = {**read_flags(_CLASSIFIER), **read_flags(_CLASSIFIERS[name])}
    else:
        defaults, own = _FLAGS[name]
        flags = {**read_flags(defaults), **read_flags(own)}
    return {"channel_mult": CHANNEL_MULT[flags["image_size"]], **flags}

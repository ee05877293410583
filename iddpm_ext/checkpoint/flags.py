"""Translates the flags of improved-diffusion's and guided-diffusion's scripts."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any

Flags = Mapping[str, object] | str

# The original's name -> this package's, for flags with the same values.
_RENAMED = {
    "num_channels": "model_channels",
    "noise_schedule": "schedule",
    "diffusion_steps": "num_timesteps",
    "large_size": "image_size",
    "classifier_width": "model_channels",
    "classifier_depth": "num_res_blocks",
    "classifier_attention_resolutions": "attention_resolutions",
    "classifier_use_scale_shift_norm": "use_scale_shift_norm",
    "classifier_resblock_updown": "resblock_updown",
    "classifier_pool": "pool",
}
_COUNTS = (
    "image_size", "in_channels", "out_channels", "model_channels", "num_res_blocks", "num_heads",
    "num_heads_upsample", "num_head_channels", "num_classes", "num_timesteps",
)  # fmt: skip
_BOOLS = (
    "class_cond", "learn_sigma", "sigma_small", "predict_xstart", "rescale_timesteps",
    "use_scale_shift_norm", "conv_resample", "super_resolution", "resblock_updown",
    "use_new_attention_order",
)  # fmt: skip
_WORDS = ("schedule", "variance", "prediction", "attention_order", "pool")
# Flags of training and running that do not affect the network or its process.
_WITHOUT_EFFECT = frozenset(
    """
    use_kl rescale_learned_sigmas use_checkpoint use_fp16 timestep_respacing small_size lr batch_size
    microbatch weight_decay schedule_sampler lr_anneal_steps ema_rate log_interval save_interval
    resume_checkpoint fp16_scale_growth data_dir model_path num_samples clip_denoised use_ddim
    base_samples classifier_use_fp16 classifier_path classifier_scale
    """.split()
)


def read_flags(flags: Flags) -> dict[str, Any]:
    """Flags by this package's names, with checked types, without those that have no effect here.

    flags: names and values, or a command line, "--image_size 64 --num_heads 4", with or without the
        dashes and with blanks or "=". Names are the original's (num_channels, noise_schedule,
        predict_xstart, ...) or this package's (model_channels, ...).
    Raises ValueError or TypeError for an unknown name, a value of a wrong kind, or a contradiction.
    """
    if isinstance(flags, str):
        flags = _split(flags)
    if not isinstance(flags, Mapping):
        raise TypeError(f"load: flags must be a mapping or a string, got {type(flags).__name__}")
    read: dict[str, Any] = {}
    for given, value in flags.items():
        if given in _WITHOUT_EFFECT:
            continue
        name = _RENAMED.get(given, given)
        convert = _CONVERT.get(name)
        if convert is None:
            raise ValueError(
                f"load: flags must be among {', '.join(sorted({*_RENAMED, *_CONVERT}))}, got {given!r}"
            )
        try:
            entries = _in_our_terms(name, convert(value))
        except (TypeError, ValueError):
            raise ValueError(
                f"load: flags must give {given} as {convert.__doc__}, got {value!r}"
            ) from None
        if given == "large_size":
            entries["super_resolution"] = True
        for name, entry in entries.items():
            if name in read and read[name] != entry:
                raise ValueError(
                    f"load: flags must agree on {name}, got {read[name]!r} and {entry!r}"
                )
            read[name] = entry
    return read


def _in_our_terms(name: str, value: Any) -> dict[str, Any]:
    if name == "predict_xstart":
        return {"prediction": "x_0" if value else "epsilon"}
    if name == "use_new_attention_order":
        return {"attention_order": "new" if value else "legacy"}
    if name in ("num_heads_upsample", "num_head_channels") and value == -1:
        return {name: None}
    if name == "channel_mult" and value == ():
        return {}
    return {name: value}


def _split(text: str) -> dict[str, object]:
    words = shlex.split(text.replace("=", " "))
    names, values = words[::2], words[1::2]
    if len(names) != len(values) or any(value.startswith("--") for value in values):
        raise ValueError(f"load: flags must read '--name value --name value', got {text!r}")
    return {n.removeprefix("--"): value for n, value in zip(names, values, strict=True)}


def _count(value: object) -> int:
    """an integer"""
    if isinstance(value, str):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _number(value: object) -> float:
    """a number"""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    return float(value)


def _bool(value: object) -> bool:
    """True or False"""
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if isinstance(value, str):
        value = known.get(value.casefold())
    if not isinstance(value, bool):
        raise TypeError
    return value


def _numbers(value: object) -> tuple[float, ...]:
    """numbers, such as 1,2,2"""
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value,)
    if isinstance(value, str):
        value = [part for part in value.split(",") if part.strip()]
    if not isinstance(value, (tuple, list)):
        raise TypeError
    numbers = [_number(entry) for entry in value]
    return tuple(int(n) if n.is_integer() else n for n in numbers)


def _word(value: object) -> str:
    """a name"""
    if not isinstance(value, str):
        raise TypeError
    return value


_CONVERT: dict[str, Callable[[object], Any]] = {
    **dict.fromkeys(_COUNTS, _count),
    **dict.fromkeys(_BOOLS, _bool),
    **dict.fromkeys(_WORDS, _word),
    "channel_mult": _numbers,
    "attention_resolutions": _numbers,
    "dropout": _number,
}

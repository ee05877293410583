"""Whether a run may continue from a checkpoint, and messages about it."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from iddpm_ext.checkpoint.runs import newest_checkpoint, read_state
from iddpm_ext.data import ImageData
from iddpm_ext.data.classes import difference
from iddpm_ext.sizes import checked_size, height_and_width

from .config import TrainConfig
from .design import network_of_metadata

# Settings that determine the weights, the meaning of the optimiser's state or the order of the data.
_FIXED = (
    "channels", "image_size", "class_cond", "classifier", "pool", "super_resolution",
    "model_channels", "num_res_blocks", "channel_mult", "attention_resolutions", "num_heads",
    "num_heads_upsample", "num_head_channels", "attention_order", "resblock_updown", "scale_shift",
    "schedule", "diffusion_steps", "variance", "prediction", "rescale_timesteps",
    "sigma_data", "zero_terminal_snr", "seed", "ema_profile",
)  # fmt: skip
_FREE = (
    "out", "resume", "progress", "device", "workers", "cache", "log_every", "tensorboard",
    "init_from", "init_ema", "init_optimizer",
)  # fmt: skip


def find_resume(folder: Path, config: TrainConfig, processes: int) -> tuple[Path | None, list[str]]:
    """The checkpoint in `folder` to continue from, or None, and messages for the user.

    Raises ValueError if the run may not continue: resume="never", or one of the settings in `_FIXED` differs
    from the checkpoint's.
    """
    newest, skipped = newest_checkpoint(folder)
    notes = [f"skipped a checkpoint that is not sound: {line}" for line in skipped]
    if newest is None:
        return None, notes
    if config.resume == "never":
        raise ValueError(f"train: out must hold no checkpoint with resume='never', got {newest}")
    state = read_state(newest)
    # Settings that are newer than the checkpoint had their default values.
    before, now = {**TrainConfig().to_dict(), **state["config"]}, config.to_dict()
    changed = [name for name in now if name not in _FREE and before.get(name) != now[name]]
    broken = [name for name in changed if name in _FIXED]
    if config.ema_profile == "power" and "ema" in changed:  # which counts from the first step
        broken.append("ema")
    if broken:
        differences = ", ".join(f"{n}={now[n]!r} (was {before.get(n)!r})" for n in broken)
        raise ValueError(f"train: settings must be those of {newest}, got {differences}")
    notes.append(f"resumed from {newest}, after {state['images']} images")
    notes += [f"{name} is now {now[name]!r}, was {before.get(name)!r}" for name in changed]
    if processes != state["processes"]:
        notes.append(f"the run has {processes} processes now, {state['processes']} before")
    return newest, notes


def require_same_data(newest: Path, config: TrainConfig, data: ImageData) -> list[str]:
    """Messages on differences from the data that the checkpoint was trained on.

    Raises ValueError if image size, channels or classes differ.
    """
    with safe_open(newest / "model.safetensors", framework="pt", device="cpu") as file:
        metadata = file.metadata()
    network, extra = network_of_metadata(metadata), json.loads(metadata.get("extra", "{}"))
    channels, height, width = data.image_shape
    found = []
    before = height_and_width(checked_size("train", network["image_size"]))
    if (height, width) != before:
        found.append(f"images of {width}x{height}, which were {before[1]}x{before[0]}")
    if channels != network["in_channels"]:
        found.append(f"{channels} channels, which were {network['in_channels']}")
    names, known = data.class_names, extra.get("class_names")
    if known is not None and list(names or ()) != known:
        found.append(f"other classes ({difference(names or (), known)})")
    if found:
        raise ValueError(
            f"train: data must be that of the run in {newest}, got {'; '.join(found)}: {config.data}"
        )
    images = read_state(newest).get("data_images")
    if images is None or images == len(data):
        return []
    return [f"the data has {len(data)} images now, {images} before: its order begins anew"]

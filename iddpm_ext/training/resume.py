"""Whether a run may go on from a checkpoint, and what is worth saying about it."""

from __future__ import annotations

from pathlib import Path

from iddpm_ext.checkpoint.runs import newest_checkpoint, read_state

from .config import TrainConfig

# What the weights, the meaning of the optimiser's state or the order of the data depend on.
_FIXED = (
    "channels", "image_size", "class_cond", "model_channels", "num_res_blocks", "channel_mult",
    "attention_resolutions", "num_heads", "scale_shift", "schedule", "diffusion_steps", "variance",
    "prediction", "rescale_timesteps", "seed",
)  # fmt: skip
_FREE = (
    "out", "resume", "progress", "device", "workers", "log_every", "tensorboard",
    "init_from", "init_ema", "init_optimizer",
)  # fmt: skip


def find_resume(folder: Path, config: TrainConfig, processes: int) -> tuple[Path | None, list[str]]:
    """The checkpoint in `folder` to go on from, or None, and messages for the user.

    Raises ValueError when the run may not go on: resume="never", or a setting that the weights depend on
    is another than the checkpoint's.
    """
    newest, skipped = newest_checkpoint(folder)
    notes = [f"skipped a checkpoint that is not sound: {line}" for line in skipped]
    if newest is None:
        return None, notes
    if config.resume == "never":
        raise ValueError(f"train: out must hold no checkpoint with resume='never', got {newest}")
    state = read_state(newest)
    before, now = state["config"], config.to_dict()
    changed = [name for name in now if name not in _FREE and before.get(name) != now[name]]
    broken = [name for name in changed if name in _FIXED]
    if broken:
        differences = ", ".join(f"{n}={now[n]!r} (was {before.get(n)!r})" for n in broken)
        raise ValueError(f"train: settings must be those of {newest}, got {differences}")
    notes.append(f"resumed from {newest}, after {state['images']} images")
    notes += [f"{name} is now {now[name]!r}, was {before.get(name)!r}" for name in changed]
    if processes != state["processes"]:
        notes.append(f"the run has {processes} processes now, {state['processes']} before")
    return newest, notes

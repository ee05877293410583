"""The training loop."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import Tensor

from iddpm_ext.data import ArrayData, Order, open_data
from iddpm_ext.random import STREAM_CHOICE, STREAM_FORWARD, NoiseKey, uniform

from .checkpoints import newest_checkpoint
from .config import TrainConfig
from .rates import learning_rate
from .state import TrainState, new_state


def train(config: TrainConfig) -> Path:
    """Trains a network as `config` says, resuming what its folder holds; returns the last checkpoint's path."""
    data = open_data(config.data)
    channels, height, width = data.image_shape
    classes = len(data.class_names) if data.class_names is not None else None
    if config.class_cond and classes is None:
        raise ValueError(
            f"train: class_cond must be off for data without classes, got {config.data}"
        )
    state = new_state(config, channels, max(height, width), classes)
    out = Path(config.out)
    folder = out / "ckpt"
    newest, skipped = newest_checkpoint(folder)
    for line in skipped:
        print(f"skipped a damaged checkpoint: {line}", flush=True)
    if newest is not None:
        if config.resume == "never":
            raise ValueError(
                f"train: out must hold no checkpoint with resume='never', got {newest}"
            )
        state.restore(newest)
        print(f"resumed from {newest}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)

    order = Order(len(data), config.seed)
    started, images_at_start, seconds_before = time.monotonic(), state.images, state.seconds
    log: list[Tensor] = []
    with open(out / "metrics.jsonl", "a") as metrics:
        while state.step < config.steps:
            log.append(_step(config, state, data, order))
            elapsed = time.monotonic() - started
            state.seconds = seconds_before + elapsed
            if state.step % config.log_every == 0 or state.step == config.steps:
                loss, mse, vlb, norm = torch.stack(log).mean(0).tolist()
                log.clear()
                record = {
                    "step": state.step,
                    "images": state.images,
                    "seconds": round(state.seconds, 1),
                    "images_per_second": round((state.images - images_at_start) / elapsed, 2),
                    "lr": state.optimizer.param_groups[0]["lr"],
                    "loss": loss,
                    "mse": mse,
                    "vlb_bpd": vlb,
                    "grad_norm": norm,
                }
                metrics.write(json.dumps(record) + "\n")
                metrics.flush()
            if state.step % config.save_every == 0 or state.step == config.steps:
                newest = state.save(folder, config)
    assert newest is not None
    return newest


def _step(config: TrainConfig, state: TrainState, data: ArrayData, order: Order) -> Tensor:
    """One optimiser step; returns the means of loss, mse and vlb and the gradient's norm, [4]."""
    model, optimizer = state.model, state.optimizer
    rate = learning_rate(
        state.step,
        peak=config.lr,
        warmup=config.lr_warmup,
        decay_to=config.steps if config.lr_decay else None,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    means = torch.zeros(3)
    part = config.batch_size // config.accumulate
    for first in range(state.images, state.images + config.batch_size, part):
        losses = _losses(config, state, data, order, torch.arange(first, first + part))
        loss = losses["loss"].mean() / config.accumulate
        loss.backward()
        means += torch.stack([losses[k].detach().mean() for k in ("loss", "mse", "vlb")])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or float("inf"))
    optimizer.step()
    optimizer.zero_grad()
    state.update_averages(config.ema_warmup)
    state.step += 1
    state.images += config.batch_size
    return torch.cat([means / config.accumulate, norm[None]])


def _losses(
    config: TrainConfig, state: TrainState, data: ArrayData, order: Order, positions: Tensor
) -> dict[str, Tensor]:
    """The losses of the images at these positions of the run; all randomness comes from the position."""
    diffusion = state.model.diffusion
    assert diffusion is not None
    indices = order.at(positions)
    choice = uniform(NoiseKey(config.seed, STREAM_CHOICE, positions, 0), (len(positions), 2))
    t = (choice[:, 0] * diffusion.num_timesteps).long()
    kwargs = {}
    if config.class_cond:
        labels = data.labels(indices)
        assert labels is not None
        kwargs["y"] = torch.where(choice[:, 1] < config.label_dropout, -1, labels)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16"):
        return diffusion.training_losses(
            state.model,
            data.images(indices),
            t,
            NoiseKey(config.seed, STREAM_FORWARD, positions, t),
            objective=config.objective,
            vlb_weight=config.vlb_weight,
            model_kwargs=kwargs,
        )

"""What a run carries from step to step, and how it goes to disk and back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iddpm_ext.diffusion import Diffusion
from iddpm_ext.unet import UNet, UNetConfig

from .checkpoints import read_state, read_tensors, write_checkpoint
from .config import TrainConfig
from .rates import ema_decay

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainState:
    """model, optimizer and averages after `step` steps and `images` images.

    emas: decay -> averaged parameters by name. seconds: spent training so far, over all processes' lives.
    """

    model: UNet
    optimizer: torch.optim.AdamW
    emas: dict[float, dict[str, Tensor]]
    step: int = 0
    images: int = 0
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    def update_averages(self, warmup: bool) -> None:
        """Moves every average towards the model's parameters; `step` counts the updates before."""
        parameters = [p.detach() for p in self.model.parameters()]
        for decay, average in self.emas.items():
            weight = 1 - ema_decay(self.step, decay, warmup=warmup)
            torch._foreach_lerp_(list(average.values()), parameters, weight)

    def save(self, folder: Path, config: TrainConfig) -> Path:
        """Writes the checkpoint of this step into `folder`; returns its path."""
        parameters = dict(self.model.named_parameters())
        metadata = describe(self.model)
        tensors = {"model.safetensors": (dict(self.model.state_dict()), metadata)}
        for decay, average in self.emas.items():
            tensors[f"ema_{decay}.safetensors"] = (average, metadata)
        moments = {
            f"{moment}.{name}": self.optimizer.state[parameter][moment]
            for name, parameter in parameters.items()
            for moment in _MOMENTS
            if self.optimizer.state[parameter]
        }
        state = {
            "step": self.step,
            "images": self.images,
            "seconds": self.seconds,
            "config": config.to_dict(),
            "schema": 1,
        }
        tensors["optim.safetensors"] = (moments, None)
        return write_checkpoint(folder, self.step, tensors, state, config.keep)

    def restore(self, path: Path) -> None:
        """Takes everything from the checkpoint directory `path`."""
        state = read_state(path)
        self.step, self.images, self.seconds = state["step"], state["images"], state["seconds"]
        self.model.load_state_dict(read_tensors(path, "model.safetensors"))
        for decay, average in self.emas.items():
            saved = read_tensors(path, f"ema_{decay}.safetensors")
            for name, value in average.items():
                value.copy_(saved[name])
        moments = read_tensors(path, "optim.safetensors")
        for name, parameter in self.model.named_parameters():
            values = {m: moments[f"{m}.{name}"].to(parameter.device) for m in _MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **values}


def describe(model: UNet) -> dict[str, str]:
    """The metadata of a weights file: the network's configuration and its diffusion's, as JSON."""
    assert model.diffusion is not None
    return {
        "unet": json.dumps(model.config.to_dict()),
        "diffusion": json.dumps(model.diffusion.to_dict()),
    }


def new_state(
    config: TrainConfig, channels: int, image_size: int, num_classes: int | None
) -> TrainState:
    """The state before the first step, initialised from the seed."""
    diffusion = Diffusion(
        config.schedule, config.diffusion_steps, config.variance, config.prediction
    )
    learned = config.variance.startswith("learned")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = UNet(
            UNetConfig(
                image_size=image_size,
                in_channels=channels,
                model_channels=config.model_channels,
                out_channels=2 * channels if learned else channels,
                num_res_blocks=config.num_res_blocks,
                channel_mult=config.channel_mult,
                attention_resolutions=config.attention_resolutions,
                num_heads=config.num_heads,
                dropout=config.dropout,
                num_classes=num_classes if config.class_cond else None,
                use_scale_shift_norm=config.scale_shift,
            )
        )
    model.diffusion = diffusion
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    emas = {decay: {name: p.detach().clone() for name, p in _named(model)} for decay in config.ema}
    return TrainState(model, optimizer, emas)


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())

"""The state of a run, and its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iddpm_ext.checkpoint import metadata_of
from iddpm_ext.checkpoint.runs import WEIGHTS, ema_file, read_state, read_tensors
from iddpm_ext.diffusion.timestep_samplers import TimestepSampler, make_timestep_sampler
from iddpm_ext.networks.classifier import Classifier
from iddpm_ext.networks.config import UNetConfig
from iddpm_ext.networks.unet import UNet
from iddpm_ext.sizes import height_and_width

from .averages import exponent, power_decay, store
from .captured import CapturedPass, why_not_fused
from .checkpoints import write_checkpoint
from .config import TrainConfig
from .design import Design, ImageShape, design_of_settings
from .fused import FusedTraining
from .optimizer import MOMENTS, AdamWEMA
from .parallel import Parallel, copy_whole, whole
from .rates import ema_decay

_SCHEMA = 1


@dataclass
class TrainState:
    """The state of a run after `step` steps and `images` images.

    model: the network. module: the module to call in training, `model` or a wrapper of it.
    emas: decay -> averaged parameters by name. seconds: of training, over all processes that resumed the run.
    skipped: consecutive steps without a finite gradient, a tensor on the run's device.
    fused: the network's form for training on a GPU, used instead of `module`; None before the first step.
    captured: forward and backward pass as a CUDA graph; None before it exists.
    label_dropout: the largest that the weights were trained with; None if unknown.
    data_images: how many images the data has.
    low_res: side of the input images of a super-resolution network; None for other networks.
    """

    model: UNet | Classifier
    module: nn.Module
    optimizer: AdamWEMA
    scaler: torch.amp.GradScaler
    timestep_sampler: TimestepSampler
    emas: dict[float, dict[str, Tensor]]
    class_names: tuple[str, ...] | None
    skipped: Tensor
    step: int = 0
    images: int = 0
    seconds: float = 0.0
    fused: FusedTraining | None = None
    captured: CapturedPass | None = None
    label_dropout: float | None = 0.0
    data_images: int | None = None
    low_res: int | None = None

    @property
    def image_shape(self) -> ImageShape:
        """(C, H, W) of the images."""
        c = self.model.config
        height, width = height_and_width(c.image_size)
        return c.in_channels, height, width

    def decays(self, config: TrainConfig) -> list[float]:
        """The decay of each average in the next update, by the number of updates before."""
        if config.ema_profile == "power":
            return [power_decay(self.step, exponent(width)) for width in self.emas]
        # An average from another run contains no random initial weights.
        warmup = config.ema_warmup and not config.init_ema
        return [ema_decay(self.step, decay, warmup=warmup) for decay in self.emas]

    def store_averages(self, out: Path, parallel: Parallel) -> None:
        """Keeps the averages of this step, by one process; every process must call it."""
        for width, average in self.emas.items():
            values = {name: _on_cpu(value) for name, value in average.items()}
            if parallel.rank == 0:
                store(out, self.step, width, values, self.describe())
        parallel.barrier()

    def save(self, folder: Path, config: TrainConfig, parallel: Parallel) -> Path:
        """Writes the checkpoint of this step into `folder`; all processes must call it, one writes."""
        metadata = self.describe()
        weights = {name: _on_cpu(value) for name, value in self.model.state_dict().items()}
        tensors: dict[str, tuple[dict[str, Tensor], dict[str, str] | None]] = {
            WEIGHTS: (weights, metadata)
        }
        for decay, average in self.emas.items():
            values = {name: _on_cpu(value) for name, value in average.items()}
            tensors[ema_file(decay)] = (values, metadata)
        moments = {
            f"{moment}.{name}": _on_cpu(self.optimizer.state[parameter][moment])
            for name, parameter in self.model.named_parameters()
            for moment in MOMENTS
        }
        tensors["optim.safetensors"] = (moments, None)
        history = self.timestep_sampler.state_dict()
        if history:
            values = {name: _on_cpu(value) for name, value in history.items()}
            tensors["timesteps.safetensors"] = (values, None)
        state = {
            "schema": _SCHEMA,
            "step": self.step,
            "images": self.images,
            "seconds": round(self.seconds, 3),
            "updates": int(self.optimizer.updates),
            "scaler": self.scaler.state_dict(),
            "processes": parallel.size,
            "label_dropout": self.label_dropout,
            "data_images": self.data_images,
            "config": config.to_dict(),
        }
        path = folder / f"step-{self.step}"
        if parallel.rank == 0:
            write_checkpoint(folder, self.step, tensors, state, config.keep)
        parallel.barrier()
        return path

    def restore(self, path: Path) -> list[str]:
        """Restores everything from the checkpoint directory `path`; returns messages on what it lacks."""
        state = read_state(path)
        self.step, self.images, self.seconds = state["step"], state["images"], state["seconds"]
        self.trained_before(state.get("label_dropout", state["config"]["label_dropout"]))
        notes = []
        weights = read_tensors(path, WEIGHTS)
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                copy_whole(value, weights[name])
            for decay, average in self.emas.items():
                if (path / ema_file(decay)).exists():
                    saved = read_tensors(path, ema_file(decay))
                else:
                    saved = weights
                    notes.append(f"the average with decay {decay} is new: it starts at the weights")
                for name, value in average.items():
                    copy_whole(value, saved[name])
            self.optimizer.updates.fill_(state["updates"])
            moments = read_tensors(path, "optim.safetensors")
            for name, parameter in self.model.named_parameters():
                entry = self.optimizer.state[parameter]
                for moment in MOMENTS:
                    copy_whole(entry[moment], moments[f"{moment}.{name}"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if (path / "timesteps.safetensors").exists() and self.timestep_sampler.state_dict():
            self.timestep_sampler.load_state_dict(read_tensors(path, "timesteps.safetensors"))
        return notes

    def trained_before(self, label_dropout: float | None) -> None:
        """Notes that the weights were trained with this `label_dropout` before; None if unknown."""
        if label_dropout is None and not self.label_dropout:
            self.label_dropout = None
        elif self.label_dropout is not None and label_dropout is not None:
            self.label_dropout = max(self.label_dropout, label_dropout)

    def describe(self) -> dict[str, str]:
        """The metadata of a weights file, as `iddpm_ext.load` reads it."""
        extra: dict[str, Any] = {"step": self.step, "images": self.images}
        if self.model.config.num_classes is not None and self.class_names is not None:
            extra["class_names"] = list(self.class_names)
        if self.model.config.num_classes is not None and self.label_dropout is not None:
            extra["label_dropout"] = self.label_dropout
        if self.low_res is not None:
            extra["low_res_size"] = self.low_res
        return metadata_of(self.model, extra)

    def averaged_model(self, parallel: Parallel) -> UNet | None:
        """A copy of the network with the first average's weights, on process 0 (None on the others)."""
        values = {k: whole(v) for k, v in next(iter(self.emas.values())).items()}
        if parallel.rank != 0:
            return None
        assert isinstance(self.model, UNet)
        model = UNet(self.model.config).to(parallel.device)
        model.load_state_dict(values)
        model.diffusion = self.model.diffusion
        return model.eval()


def new_state(
    config: TrainConfig, image_shape: ImageShape, class_names: tuple[str, ...] | None,
    parallel: Parallel, design: Design | None = None,
) -> TrainState:  # fmt: skip
    """The state before the first step, initialised from the seed, the same in every process.

    design: of the network; None for the one that the settings describe.
    """
    if design is None:
        design = design_of_settings(config, image_shape, class_names)
    network = design.network
    model: UNet | Classifier
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = UNet(network) if isinstance(network, UNetConfig) else Classifier(network)
    model.diffusion = design.diffusion
    if isinstance(model, UNet):
        model.gradient_checkpointing = config.gradient_checkpointing
    if config.plain:
        for module in model.modules():
            if hasattr(module, "backend"):
                setattr(module, "backend", "plain")  # noqa: B010
    fused = why_not_fused(config, parallel.device) is None
    last = config.channels_last or parallel.device.type == "cuda" or fused
    memory_format = torch.channels_last if last else torch.contiguous_format
    model.to(parallel.device, memory_format=memory_format)  # type: ignore[call-overload]
    parallel.shard(model)
    emas = {d: {n: p.detach().clone() for n, p in model.named_parameters()} for d in config.ema}
    module = model if fused else parallel.wrap(model)
    return TrainState(
        model=model,
        module=torch.compile(module) if config.compile else module,  # type: ignore[arg-type]
        optimizer=AdamWEMA(
            model.parameters(), emas, lr=config.lr, weight_decay=config.weight_decay
        ),
        scaler=torch.amp.GradScaler(parallel.device.type, enabled=config.dtype == "float16"),
        timestep_sampler=make_timestep_sampler(
            config.timestep_sampler,
            design.diffusion.num_timesteps,
            seed=config.seed,
            device=parallel.device,
            alphas_cumprod=design.diffusion.alphas_cumprod,
        ),
        emas=emas,
        class_names=class_names,
        skipped=torch.zeros((), dtype=torch.float32, device=parallel.device),
        label_dropout=config.label_dropout,
        low_res=design.low_res,
    )


def _on_cpu(value: Tensor) -> Tensor:
    return whole(value.detach()).cpu().contiguous()

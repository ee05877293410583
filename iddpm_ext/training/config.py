"""Everything that determines a training run, in one dataclass."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from iddpm_ext.scalars import make_fields_plain
from iddpm_ext.sizes import checked_size

_POSITIVE = (
    "steps", "batch_size", "accumulate", "model_channels", "num_res_blocks", "num_heads",
    "diffusion_steps", "save_every", "log_every", "keep", "lr", "sample_steps", "sample_count",
)  # fmt: skip
_NOT_NEGATIVE = (
    "lr_warmup", "sample_every", "weight_decay", "vlb_weight", "seed", "workers", "ema_every",
)  # fmt: skip
_CHOICES = {
    "dtype": ("float32", "bfloat16", "float16"),
    "resume": ("auto", "never"),
    "objective": ("simple", "hybrid", "vlb"),
    "timestep_sampler": ("uniform", "loss-second-moment", "log-normal"),
    "bad_images": ("skip", "stop"),
    "split": ("train", "test", "all"),
    "alpha": ("refuse", "drop", "black", "white"),
    "schedule": ("cosine", "linear", "sigmoid", "karras"),
    "variance": ("learned_range", "learned", "fixed_large", "fixed_small"),
    "prediction": ("epsilon", "x_0", "x_prev", "velocity", "edm"),
    "attention_order": ("legacy", "new"),
    "ema_profile": ("exponential", "power"),
    "pool": ("attention", "adaptive", "spatial", "spatial_v2"),
}


#: Relative width of the mean of all steps, the widest that a power-function average can be.
WIDEST_AVERAGE = 12**-0.5


@dataclass(frozen=True)
class TrainConfig:
    """What `train` does: data, network, objective, optimiser, and what is written when.

    Attributes:
        data: what `iddpm_ext.data.open_data` reads; must be given.
        out: the run's folder; must be given.
        steps: optimiser steps in all, including those before a run was resumed.
        batch_size: images per step, over all processes and accumulated parts.
        accumulate: number of parts in which each process computes its share of a batch.
        image_size: side, or height,width, that images are resized and cropped to; None keeps the data's.
        random_crop: crop images to image_size at a random place and scale, as guided-diffusion can, instead
            of at the centre; not with cache.
        channels: 1 or 3; None for those of the data.
        flip: mirror half of the images.
        workers: processes that decode images; 0 does it in the training process.
        cache: decode all images once, when the run begins, and keep them in memory.
        bad_images: skip (and count) or stop at unreadable images.
        split: train, test, or all, for which folders of these names are not splits.
        classes: source of the classes: auto; folders, names or file (dataset.json); ids, for labels that are
            arbitrary numbers; a column of a Hugging Face data set; none.
        value_range: the values of black and white, 0,1 or 0,4095 or =-1,1, if the type does not imply them.
        alpha: handling of transparent pixels: refuse; drop (keep their colours); black or white.
        class_cond: train a class-conditional network.
        label_dropout: probability of training an image without its class, for guidance.
        super_resolution: train a network that enlarges images of this side, the longer one, to image_size;
            its inputs are the data's images, reduced by averaging.
        classifier: train a classifier of noisy images, which guides the samples of another network.
        model_channels: width of the first level; with 32, every channel is a GroupNorm group of its own,
            and samples are tinted.
        num_res_blocks: residual blocks per level.
        channel_mult: width of each level, in model_channels.
        attention_resolutions: feature-map sides with attention.
        num_heads: attention heads.
        num_heads_upsample: attention heads of the decoder; None for the same number.
        num_head_channels: width of an attention head, instead of the numbers of heads.
        attention_order: order of queries, keys and values: legacy, or new, an option of guided-diffusion.
        resblock_updown: let residual blocks resample between the levels, an option of guided-diffusion.
        pool: how a classifier's features become logits: attention (needs num_head_channels), adaptive,
            spatial or spatial_v2.
        dropout: probability of dropping a feature.
        scale_shift: let the time embedding scale and shift features, not only shift them.
        schedule: noise schedule; karras has the noise levels of EDM.
        diffusion_steps: T.
        variance: of the reverse process.
        prediction: what the network predicts; velocity is also called v, edm is the network inside EDM's
            preconditioning.
        sigma_data: standard deviation of the data that edm assumes.
        rescale_timesteps: give the network t * 1000/T.
        zero_terminal_snr: rescale the schedule so that the chain ends in pure noise; not with epsilon, edm.
        objective: simple, hybrid (simple + vlb_weight T vlb) or vlb.
        vlb_weight: see objective.
        min_snr: gamma of min-SNR weighting of the squared error, usually 5; None for none. Not with vlb.
        timestep_sampler: uniform; loss-second-moment, the importance sampler; or log-normal, EDM's
            distribution of noise levels.
        lr: peak learning rate.
        lr_warmup: steps over which it rises linearly.
        lr_decay: decay the rate linearly to zero at the last step.
        weight_decay: of AdamW.
        ema: decays of the averaged weights; the first average draws the samples. With ema_profile power,
            their widths, such as 0.05,0.1.
        ema_profile: how an average weights the steps: exponential, by a decay; or power, by a power of the
            step, from which `iddpm average` computes any width after training.
        ema_every: steps between the averages of ema_profile power that are stored for that; 0 for as
            often as checkpoints.
        ema_warmup: limit the decay of update n to (1 + n) / (10 + n).
        grad_clip: largest norm of the gradient; None for no limit.
        dtype: float32, or the dtype of autocast with float32 weights; float16 uses loss scaling.
        gradient_checkpointing: trade computation for memory.
        channels_last: use that memory format on the CPU too; a CUDA device always uses it.
        compile: run the network through torch.compile.
        plain: compute the network by PyTorch's own functions alone, without this package's kernels.
        cuda_graph: on a CUDA device, replay forward and backward pass as a graph; not with accumulate above
            1, compile, fsdp or gradient_checkpointing; a message then says so.
        fsdp: split weights and optimiser over the processes of torchrun.
        noise_scale: log the gradient-noise scale; needs accumulate of at least 2.
        save_every: steps between checkpoints.
        keep: number of checkpoints to keep.
        sample_every: steps between grids of samples, of which there is also a last one; 0 for none.
        sample_steps: sampling steps of a grid.
        sample_count: images of a grid.
        log_every: steps between records in metrics.jsonl.
        tensorboard: log for TensorBoard too, grids of samples among it.
        progress: show a progress bar.
        seed: of everything random.
        device: auto, cpu or cuda.
        resume: auto continues from the newest valid checkpoint in out; never refuses a folder with any.
        init_from: weights to start from, anything that load reads: a bundled name, a file, a run's folder.
            Settings of network and process at their defaults are taken from it; the others must agree.
        init_ema: files of averaged weights, one for each decay of ema in order; by default init_from.
        init_optimizer: an optNNNNNN.pt of improved-diffusion; the run continues at its step.
    """

    data: str = ""
    out: str = ""
    steps: int = 100_000
    batch_size: int = 128
    accumulate: int = 1
    image_size: int | tuple[int, ...] | None = None
    random_crop: bool = False
    channels: int | None = None
    flip: bool = False
    workers: int = 0
    cache: bool = False
    bad_images: Literal["skip", "stop"] = "skip"
    split: Literal["train", "test", "all"] = "train"
    classes: str = "auto"
    value_range: tuple[float, ...] | None = None
    alpha: Literal["refuse", "drop", "black", "white"] = "refuse"
    class_cond: bool = False
    label_dropout: float = 0.0
    super_resolution: int | None = None
    classifier: bool = False
    model_channels: int = 64
    num_res_blocks: int = 2
    channel_mult: tuple[float, ...] = (1, 2, 2)
    attention_resolutions: tuple[int, ...] = (8,)
    num_heads: int = 4
    num_heads_upsample: int | None = None
    num_head_channels: int | None = None
    attention_order: Literal["legacy", "new"] = "legacy"
    resblock_updown: bool = False
    pool: Literal["attention", "adaptive", "spatial", "spatial_v2"] = "attention"
    dropout: float = 0.0
    scale_shift: bool = True
    schedule: Literal["cosine", "linear", "sigmoid", "karras"] = "cosine"
    diffusion_steps: int = 4000
    variance: Literal["learned_range", "learned", "fixed_large", "fixed_small"] = "learned_range"
    prediction: Literal["epsilon", "x_0", "x_prev", "velocity", "edm"] = "epsilon"
    sigma_data: float = 0.5
    rescale_timesteps: bool = True
    zero_terminal_snr: bool = False
    objective: Literal["simple", "hybrid", "vlb"] = "hybrid"
    vlb_weight: float = 1e-3
    min_snr: float | None = None
    timestep_sampler: Literal["uniform", "loss-second-moment", "log-normal"] = "uniform"
    lr: float = 1e-4
    lr_warmup: int = 0
    lr_decay: bool = False
    weight_decay: float = 0.0
    ema: tuple[float, ...] = (0.9999,)
    ema_profile: Literal["exponential", "power"] = "exponential"
    ema_every: int = 0
    ema_warmup: bool = True
    grad_clip: float | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    plain: bool = False
    cuda_graph: bool = True
    fsdp: bool = False
    noise_scale: bool = False
    save_every: int = 1000
    keep: int = 3
    sample_every: int = 1000
    sample_steps: int = 50
    sample_count: int = 16
    log_every: int = 50
    tensorboard: bool = False
    progress: bool = True
    seed: int = 0
    device: str = "auto"
    resume: Literal["auto", "never"] = "auto"
    init_from: str = ""
    init_ema: tuple[str, ...] = ()
    init_optimizer: str = ""

    def __post_init__(self) -> None:
        make_fields_plain(self)
        for name in ("channel_mult", "attention_resolutions", "ema", "init_ema"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        whole = tuple(int(m) if m == int(m) else m for m in self.channel_mult)
        object.__setattr__(self, "channel_mult", whole)
        if self.image_size is not None:
            object.__setattr__(self, "image_size", checked_size("train", self.image_size))
        if self.random_crop and (self.image_size is None or self.cache):
            raise ValueError(
                "train: random_crop must go with an image_size and without cache, "
                f"got image_size {self.image_size} and cache {self.cache}"
            )
        if self.value_range is not None:
            object.__setattr__(self, "value_range", tuple(self.value_range))
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"train: {name} must be above 0, got {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ValueError(f"train: {name} must be at least 0, got {getattr(self, name)}")
        for name, value in (("label_dropout", self.label_dropout), *(("ema", e) for e in self.ema)):
            if not 0 <= value < 1:
                raise ValueError(f"train: {name} must lie in [0, 1), got {value}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"train: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if not self.ema or len(set(self.ema)) < len(self.ema):
            raise ValueError(f"train: ema must be different decays, at least one, got {self.ema}")
        if self.ema_profile == "power":
            if not all(0 < width < WIDEST_AVERAGE for width in self.ema):
                raise ValueError(
                    f"train: ema must be widths above 0 and below {WIDEST_AVERAGE:.3f} with ema_profile "
                    f"power, such as 0.05,0.1, got {self.ema}"
                )
            if self.init_ema:
                raise ValueError(
                    f"train: init_ema must be left out with ema_profile power, got {self.init_ema}"
                )
        elif self.ema_every:
            raise ValueError(
                f"train: ema_every must be 0 without ema_profile power, got {self.ema_every}"
            )
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"train: grad_clip must be above 0, got {self.grad_clip}")
        if self.noise_scale and self.accumulate < 2:
            raise ValueError(
                f"train: accumulate must be at least 2 for noise_scale, got {self.accumulate}"
            )
        if self.noise_scale and self.fsdp:
            raise ValueError(
                "train: noise_scale must be off with fsdp, which keeps no gradient of a part, got on"
            )
        if (
            self.objective == "hybrid"
            and not self.classifier
            and not self.variance.startswith("learned")
        ):
            raise ValueError(
                f"train: objective must be simple or vlb for variance {self.variance}, got hybrid"
            )
        if (self.init_ema or self.init_optimizer) and not self.init_from:
            raise ValueError(
                "train: init_from must be given with init_ema or init_optimizer, got ''"
            )
        if self.init_ema and len(self.init_ema) != len(self.ema):
            raise ValueError(
                f"train: init_ema must have a file for each decay {self.ema}, got {self.init_ema}"
            )
        if not 0 < self.sigma_data < float("inf"):
            raise ValueError(f"train: sigma_data must be above 0, got {self.sigma_data}")
        if self.zero_terminal_snr and not self.init_from:
            if self.prediction in ("epsilon", "edm"):
                raise ValueError(
                    "train: prediction must be x_0, x_prev or velocity with zero_terminal_snr, "
                    f"got {self.prediction!r}"
                )
            if self.timestep_sampler == "log-normal":
                raise ValueError(
                    "train: timestep_sampler must be uniform or loss-second-moment with "
                    "zero_terminal_snr, whose last sigma is infinite, got 'log-normal'"
                )
        if self.min_snr is not None and (self.objective == "vlb" or not self.min_snr > 0):
            raise ValueError(
                "train: min_snr must be above 0, and left out for objective vlb, "
                f"got {self.min_snr} for {self.objective}"
            )
        if self.super_resolution is not None and self.super_resolution < 1:
            raise ValueError(
                f"train: super_resolution must be at least 1, got {self.super_resolution}"
            )
        if self.classifier:
            for name in (
                "super_resolution",
                "class_cond",
                "gradient_checkpointing",
                "init_optimizer",
            ):
                if getattr(self, name):
                    raise ValueError(
                        f"train: {name} must be left out with classifier, got {getattr(self, name)}"
                    )
            if self.pool == "attention" and not self.num_head_channels and not self.init_from:
                raise ValueError(
                    "train: num_head_channels must be given for a classifier with pool attention, "
                    "got None"
                )
        if self.label_dropout and not self.class_cond:
            raise ValueError(
                f"train: label_dropout must be 0 without class_cond, got {self.label_dropout}"
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, with lists for tuples; `from_dict` is its inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration of a dict; an unknown key raises ValueError."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"TrainConfig: keys must be fields of it, got {unknown}")
        return cls(**values)

    @classmethod
    def from_json(cls, path: str | Path) -> TrainConfig:
        """The configuration in a JSON file, such as the config.json of a run."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"TrainConfig: path must be a file, got {path}")
        try:
            values = json.loads(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"TrainConfig: {path} must be a JSON file, got {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"TrainConfig: {path} must hold a JSON object, got {values!r}")
        return cls.from_dict(values)

"""Everything that determines a training run, in one dataclass."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

_POSITIVE = (
    "steps", "batch_size", "accumulate", "model_channels", "num_res_blocks", "num_heads",
    "diffusion_steps", "save_every", "log_every", "keep", "lr",
)  # fmt: skip
_NOT_NEGATIVE = ("lr_warmup", "sample_every", "weight_decay", "vlb_weight", "seed")


@dataclass(frozen=True)
class TrainConfig:
    """What `train` does: the data, the network, the objective, the optimiser, and what is written when.

    data: what `iddpm_ext.data.open_data` reads. out: the run's folder.
    steps: optimiser steps in all; a resumed run counts those already made.
    batch_size: images a step, over all processes and accumulated parts.
    accumulate: parts that a step's batch is computed in, one after the other.
    image_size: side that images are brought to; None keeps the data's.
    class_cond: give the network the class. label_dropout: chance that an image's class is withheld.
    channel_mult, attention_resolutions, num_heads, dropout, scale_shift: see `UNetConfig`.
    schedule, diffusion_steps, variance, prediction: see `Diffusion`.
    objective: simple, hybrid (with vlb_weight) or vlb, as in `Diffusion.training_losses`.
    lr, lr_warmup, lr_decay: the rate rises linearly over lr_warmup steps and, with lr_decay, falls
        linearly to zero at the last step.
    ema: decays of the averaged weights. ema_warmup: at update n use no more than (1 + n) / (10 + n).
    grad_clip: largest norm of the gradient; None for no limit.
    dtype: float32, or bfloat16 for autocast with float32 weights.
    save_every, keep: steps between checkpoints, and how many stay. sample_every: steps between grids
        of samples, 0 for none. log_every: steps between records in metrics.jsonl.
    resume: "auto" continues from the newest sound checkpoint in out, "never" refuses a folder with any.
    """

    data: str
    out: str
    steps: int = 100_000
    batch_size: int = 128
    accumulate: int = 1
    image_size: int | None = None
    class_cond: bool = False
    label_dropout: float = 0.0
    model_channels: int = 128
    num_res_blocks: int = 2
    channel_mult: tuple[int, ...] = (1, 2, 2)
    attention_resolutions: tuple[int, ...] = (16, 8)
    num_heads: int = 4
    dropout: float = 0.0
    scale_shift: bool = True
    schedule: str = "cosine"
    diffusion_steps: int = 4000
    variance: str = "learned_range"
    prediction: str = "epsilon"
    objective: str = "hybrid"
    vlb_weight: float = 1e-3
    lr: float = 1e-4
    lr_warmup: int = 0
    lr_decay: bool = False
    weight_decay: float = 0.0
    ema: tuple[float, ...] = (0.9999,)
    ema_warmup: bool = True
    grad_clip: float | None = None
    dtype: str = "float32"
    save_every: int = 1000
    keep: int = 3
    sample_every: int = 0
    log_every: int = 50
    seed: int = 0
    device: str = "auto"
    resume: str = "auto"

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attention_resolutions", "ema"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"train: {name} must be above 0, got {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"train: {name} must be at least 0, got {getattr(self, name)}")
        for name, value in (("label_dropout", self.label_dropout), *(("ema", e) for e in self.ema)):
            if not 0 <= value < 1:
                raise ValueError(f"train: {name} must lie in [0, 1), got {value}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train: accumulate must divide batch_size {self.batch_size}, got {self.accumulate}"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"train: dtype must be float32 or bfloat16, got {self.dtype!r}")
        if self.resume not in ("auto", "never"):
            raise ValueError(f"train: resume must be 'auto' or 'never', got {self.resume!r}")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, with lists for tuples; `from_dict` is its inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The configuration of a dict; an unknown key raises ValueError."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"TrainConfig: keys must be fields of it, got {unknown}")
        return cls(**values)

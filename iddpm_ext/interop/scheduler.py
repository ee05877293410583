"""The paper's samplers as a scheduler of diffusers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iddpm_ext import ops
from iddpm_ext.diffusion import Diffusion
from iddpm_ext.diffusion.solvers import SOLVERS, SolverWalk
from iddpm_ext.interop.diffusers_api import (
    ConfigMixin,
    DDPMSchedulerOutput,
    SchedulerMixin,
    randn_tensor,
    register_to_config,
)
from iddpm_ext.interop.process import config_of, diffusion_of, ends_of
from iddpm_ext.scalars import plain

_SAMPLERS = ("ddpm", "ddim", *SOLVERS)


class IDDPMScheduler(SchedulerMixin, ConfigMixin):
    """Samples networks with a learned variance inside the pipelines of diffusers.

    Tables are float64, rounded once; steps are spaced as in the original code, both ends included;
    the last step adds no noise. `timesteps` are the network's inputs: int64 indices or, for networks that
    were trained on rescaled timesteps, floats, index * 1000 / T. `step` and `add_noise` take either: a
    floating timestep is rescaled, an integer one is the index.

    Training code of diffusers draws integer indices, which it passes to `add_noise` and to the network.
    With `rescale_timesteps` the network must get `model_timesteps(t)` instead.

    `betas`, `alphas` and `alphas_cumprod` are those of the whole training chain, float32 [T] on the CPU.

    Args:
        num_train_timesteps: T.
        beta_schedule: "squaredcos_cap_v2" (the paper's cosine), "linear", "scaled_linear" or diffusers'
            "sigmoid".
        beta_start, beta_end: of the last three; None for 1e-4 and 0.02, times 1000 / T.
        trained_betas: a custom schedule, [T] in (0, 1), instead of a named one.
        variance_type: "learned_range", "learned" (the output is the log-variance), "fixed_large" or
            "fixed_small".
        prediction_type: "epsilon", "sample" (x_0), "x_prev" or "v_prediction" (the velocity).
        clip_sample: clamp every predicted x_0 to [-1, 1].
        rescale_timesteps: the network's timestep input is index * 1000 / T instead of the index, as for
            OpenAI's; `from_diffusion` takes it from the process.
        rescale_betas_zero_snr: the chain ends in pure noise; not with "epsilon".
        sampler: "ddpm" (ancestral), "ddim", or one of the solvers of `iddpm_ext.sample`: "dpm++",
            "dpm++3", "dpm++sde", "unipc", "unipc3"; only "ddpm" uses a learned variance.
        eta: noise of DDIM, from 0 to 1.
        extrapolation_limit: of DPM-Solver++, see `Diffusion.multistep_weights`; None for no limit, as in
            diffusers' own solver.

    Raises ValueError for other values.

    Source: Nichol & Dhariwal 2021; Song et al. 2021; Lu et al. 2022.
    """

    config: Any
    # The schedulers of diffusers that accept a learned variance.
    _compatibles = [  # noqa: RUF012
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
    ]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 4000,
        beta_schedule: str = "squaredcos_cap_v2",
        beta_start: float | None = None,
        beta_end: float | None = None,
        trained_betas: Sequence[float] | None = None,
        variance_type: str = "learned_range",
        prediction_type: str = "epsilon",
        clip_sample: bool = True,
        rescale_timesteps: bool = False,
        rescale_betas_zero_snr: bool = False,
        sampler: str = "ddpm",
        eta: float = 0.0,
        extrapolation_limit: float | None = 0.5,
    ) -> None:
        self.register_to_config(**plain(dict(self.config)))
        num_train_timesteps, eta = plain((num_train_timesteps, eta))
        if sampler not in _SAMPLERS:
            raise ValueError(
                f"IDDPMScheduler: sampler must be one of {', '.join(_SAMPLERS)}, got {sampler!r}"
            )
        # Otherwise a class that is built from this configuration would replace values that are marked as
        # defaults by its own defaults. A configuration that was read from a file has no such marks.
        if "_use_default_values" in self.config:
            self.register_to_config(_use_default_values=[])
        self.diffusion = diffusion_of(self.config)
        if trained_betas is None and beta_schedule == "linear":
            # Schedulers of diffusers do not accept None here.
            first, last = ends_of(self.config, num_train_timesteps)
            self.register_to_config(beta_start=first, beta_end=last)
        _require_eta(sampler, eta)
        self.betas = self.diffusion.betas.float()
        self.alphas = (1 - self.diffusion.betas).float()
        self.alphas_cumprod = self.diffusion.alphas_cumprod.float()
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self._take(self.diffusion, None)

    @classmethod
    def from_diffusion(cls, diffusion: Diffusion, **arguments: Any) -> IDDPMScheduler:
        """The scheduler of a process such as `iddpm_ext.load(...).diffusion`.

        arguments: sampler, eta and clip_sample, as for the class.
        """
        if not isinstance(diffusion, Diffusion):
            raise TypeError(
                f"IDDPMScheduler: diffusion must be a Diffusion, got {type(diffusion).__name__}"
            )
        return cls(**config_of(diffusion), **arguments)

    @classmethod
    def from_config(cls, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The scheduler of a configuration, of this class or of a scheduler of diffusers.

        The latter's networks take the index itself. Its "learned" means a variance, and is refused, as are
        `thresholding` and a `clip_sample_range` other than 1, which this class does not have. Its spacing
        and offset of steps are ignored.
        """
        values = dict(config)
        if values.get("thresholding"):
            raise ValueError(
                "IDDPMScheduler: thresholding must be False, as x_0 is clipped to [-1, 1] or not at all, "
                "got True"
            )
        if values.get("clip_sample") and values.get("clip_sample_range", 1.0) != 1.0:
            raise ValueError(
                f"IDDPMScheduler: clip_sample_range must be 1, got {values['clip_sample_range']}"
            )
        if "rescale_timesteps" not in values:
            # This class has other defaults.
            values.pop("_use_default_values", None)
            values["rescale_timesteps"] = False
            if values.get("variance_type") == "learned":
                raise ValueError(
                    "IDDPMScheduler: variance_type must not be 'learned' where it comes from another "
                    "scheduler, whose head is the variance, not its logarithm, got 'learned'"
                )
        made = super().from_config(values, *args, **kwargs)
        if "_use_default_values" in values:  # of a living scheduler, not of a file
            scheduler = made[0] if isinstance(made, tuple) else made
            scheduler.register_to_config(_use_default_values=[])
        return made

    @property
    def compatibles(self) -> list[type]:
        """Classes of diffusers that run this chain if they are built from this configuration.

        None if they would misread it: they pass the index to the network, do not support x_{t-1} as a
        prediction, and take "learned" for a variance.
        """
        config = self.config
        told_otherwise = config.rescale_timesteps and len(self) != 1000
        if (
            told_otherwise
            or config.prediction_type == "x_prev"
            or config.variance_type == "learned"
        ):
            return []
        return super().compatibles

    def set_timesteps(
        self,
        num_inference_steps: int | str | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Chooses the steps of the next chain.

        Args:
            num_inference_steps: as in `Diffusion.respace`: 50, "ddim50", "10,15,20".
            device: of `timesteps`.
            timesteps: descending indices in the training chain, instead of num_inference_steps.
        """
        num_inference_steps, timesteps = plain(num_inference_steps), plain(timesteps)
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                "IDDPMScheduler: exactly one of num_inference_steps and timesteps must be given, "
                f"got {num_inference_steps!r} and {timesteps!r}"
            )
        if timesteps is not None:
            indices = [int(i) for i in timesteps]
            if indices != sorted(set(indices), reverse=True):
                raise ValueError(
                    f"IDDPMScheduler: timesteps must be descending indices, got {timesteps!r}"
                )
            chain = self.diffusion.respace(indices)
        else:
            assert num_inference_steps is not None
            chain = self.diffusion.respace(num_inference_steps)
        self.num_inference_steps = chain.num_timesteps
        self._take(chain, device)

    def _take(self, chain: Diffusion, device: torch.device | str | None) -> None:
        steps = torch.arange(chain.num_timesteps, dtype=torch.int64, device="cpu")
        told = chain.model_timesteps(steps)
        if not self.config.rescale_timesteps:
            told = told.long()
        self.chain = chain
        self.timesteps = told.flip(0).to(device)
        self._by_told = {float(value): i for i, value in enumerate(told)}
        self._by_index = {int(value): i for i, value in enumerate(chain.timesteps)}
        limit = self.config.extrapolation_limit
        solver = SOLVERS.get(self.config.sampler)
        # A new chain has no previous predictions.
        self._solver = None
        if solver is not None:
            self._solver = SolverWalk(chain, solver, math.inf if limit is None else limit)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself: the paper's networks take x_t."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float | int,
        sample: Tensor,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_{t-1} from x_t and the network's output, by `iddpm_ext.ops.reverse_step`.

        Args:
            model_output: floating [N, 2C, H, W] where the variance is learned, else [N, C, H, W].
            timestep: one of `timesteps`, or an integer index of this chain's steps.
            sample: x_t, floating [N, C, H, W]; half precision is computed in float32.
            eta: of DDIM, instead of the configuration's.
            generator: of the noise, as in `randn_tensor` of diffusers.
            variance_noise: like sample, instead of drawn noise.
            return_dict: False for a tuple.

        Returns:
            `prev_sample` and `pred_original_sample` (clipped where `clip_sample`), like sample.

        Not differentiable.
        """
        sampler = self.config.sampler
        eta = self.config.eta if eta is None else plain(eta)
        _require_eta(sampler, eta)
        i = self._position(timestep)
        state = sample if sample.dtype == torch.float64 else sample.float()
        if sampler in SOLVERS:
            eta = SOLVERS[sampler].eta
        table = self.chain.table(
            sample.device,
            sampler="ddpm" if sampler == "ddpm" else "ddim",
            eta=eta,
            dtype=state.dtype,
        )
        noise = None
        if i > 0 and (sampler == "ddpm" or eta > 0):
            if variance_noise is None:
                variance_noise = randn_tensor(
                    sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
                )
            noise = variance_noise.to(state.dtype)
        t = torch.full((len(sample),), i, dtype=torch.int64, device=sample.device)
        x_prev, x_0 = ops.reverse_step(
            state, model_output, t, table, noise, clip=self.config.clip_sample
        )
        if self._solver is not None:
            x_prev = self._solver(i, state, x_prev, x_0)
        x_prev, x_0 = x_prev.to(sample.dtype), x_0.to(sample.dtype)
        return DDPMSchedulerOutput(x_prev, x_0) if return_dict else (x_prev, x_0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of x_0 and noise (equation 8), with float32 coefficients whatever the dtype.

        Args:
            original_samples: x_0, floating [N, C, H, W].
            noise: like original_samples.
            timesteps: [N] or one for all: integer indices in the training chain, or floating inputs of the
                network.

        Returns:
            like original_samples.
        """
        t = self._training_index(timesteps, len(original_samples), original_samples.device)
        return self.diffusion.q_sample(original_samples, t, noise)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a network of "v_prediction" is to predict, sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0.

        Args:
            sample: x_0; the others as of `add_noise`.

        Returns:
            like sample.
        """
        return self.add_noise(noise, -sample, timesteps)

    def previous_timestep(self, timestep: Tensor | float | int) -> Tensor:
        """The timestep after a step from this one, as in `timesteps`; -1 after the last.

        Args:
            timestep: as in `step`.
        """
        i = self._position(timestep)
        if i == 0:
            return torch.full((), -1, dtype=self.timesteps.dtype, device=self.timesteps.device)
        return self.timesteps[len(self.timesteps) - i]

    def model_timesteps(self, t: Tensor) -> Tensor:
        """The network's timestep inputs for training steps t, int64 [N] -> float32 [N]."""
        return self.diffusion.model_timesteps(t)

    def __len__(self) -> int:
        return self.diffusion.num_timesteps

    def _position(self, timestep: Tensor | float | int) -> int:
        """The index of a step in the chain."""
        value = timestep.item() if isinstance(timestep, Tensor) else plain(timestep)
        known: dict[Any, int] = self._by_index if isinstance(value, int) else self._by_told
        if value not in known:
            raise ValueError(
                "IDDPMScheduler: timestep must be one of `timesteps`, or the integer index of one, "
                f"got {value!r}; call set_timesteps first"
            )
        return known[value]

    def _training_index(self, timesteps: Tensor, n: int, device: torch.device) -> Tensor:
        t = timesteps if isinstance(timesteps, Tensor) else torch.from_numpy(np.asarray(timesteps))
        t = t.to(device)
        if t.is_floating_point():
            scale = len(self) / 1000 if self.config.rescale_timesteps else 1.0
            t = (t.double() * scale).round().long()
        return t.long().reshape(-1).expand(n) if t.numel() == 1 else t.long()


def _require_eta(sampler: str, eta: float) -> None:
    if not 0 <= eta <= 1 or (eta and sampler != "ddim"):
        raise ValueError(
            f"IDDPMScheduler: eta must be from 0 to 1, and 0 for a sampler other than 'ddim', "
            f"got {eta} with {sampler!r}"
        )


# Where diffusers looks the class up when it reads a pipeline's model_index.json, so that `import iddpm_ext`
# is sufficient.
IDDPMScheduler.__module__ = "iddpm_ext"

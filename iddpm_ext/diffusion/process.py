"""The diffusion process: forward, reverse, variational bound and training losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iddpm_ext import ops
from iddpm_ext.diffusion.output import output_tensor
from iddpm_ext.ops import ReverseStep, checks
from iddpm_ext.ops.columns import Column
from iddpm_ext.ops.rows import Rows, compute_dtype
from iddpm_ext.random import NoiseKey, normal
from iddpm_ext.scalars import plain

from .multistep import multistep_weights
from .respace import space_timesteps
from .schedule import check_betas, named_betas, rescale_zero_terminal_snr
from .table import (
    PREDICTIONS,
    SAMPLERS,
    VARIANCES,
    Chain,
    build_table,
    fixed_point_alpha_bars,
)

OBJECTIVES = ("hybrid", "simple", "vlb")


class MeanVariance(NamedTuple):
    """p(x_{t-1} | x_t): mean, log-variance and the predicted x_0, each [N, C, H, W]."""

    mean: Tensor
    log_variance: Tensor
    x_0: Tensor


class Diffusion:
    """A Gaussian diffusion process over T steps, including the meaning of the network's output.

    Immutable: every method is a pure function. t counts the steps of this chain from 0, int64 [N].
    Images are floating [N, C, H, W] in [-1, 1]; computations are in float64 for float64 images, else in
    float32.

    Args:
        schedule: ``"cosine"``, ``"linear"``, ``"sigmoid"`` or ``"karras"`` (noise levels of EDM);
            ignored where betas are given.
        num_timesteps: T, at least 2.
        variance: ``"learned_range"`` (equation 15), ``"learned"`` (the output is the
            log-variance), ``"fixed_large"`` (beta_t) or ``"fixed_small"`` (beta~_t).
        prediction: what the network predicts: ``"epsilon"``, ``"x_0"``, ``"x_prev"``,
            ``"velocity"``, sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x_0, also called v, or
            ``"edm"``: F of x_0 = c_skip x + c_out F(c_in x, c_noise), x = x_t / sqrt(alpha_bar), with the
            coefficients of Karras et al. 2022. The network's inputs are c_in x and c_noise = log(sigma) / 4.
        rescale_timesteps: the network's timestep input is t * 1000/T instead of t.
        betas: a custom schedule, [T] in (0, 1), instead of a named one.
        zero_terminal_snr: rescale the schedule so that the chain ends in pure noise, alpha_bar = 0
            (Lin et al. 2024). There x_0 cannot be computed from epsilon or EDM's F, so another prediction is
            needed.
        sigma_data: standard deviation of the data that ``"edm"`` assumes; unused by other predictions.

    Attributes:
        betas, alphas_cumprod: float64 [T] on the CPU.
        timesteps: int64 [T] on the CPU, each step's index in the training chain.

    Source: Nichol & Dhariwal 2021; Ho et al. 2020.
    """

    schedule: str
    num_timesteps: int
    num_train_timesteps: int
    variance: str
    prediction: str
    rescale_timesteps: bool
    zero_terminal_snr: bool
    sigma_data: float
    betas: Tensor
    alphas_cumprod: Tensor
    timesteps: Tensor
    _train_betas: list[float]
    _train_alpha_bars: list[int]
    _chain: Chain
    _tables: dict[tuple[torch.device, str, float, torch.dtype], Tensor]

    def __init__(
        self,
        schedule: str = "cosine",
        num_timesteps: int = 4000,
        variance: str = "learned_range",
        prediction: str = "epsilon",
        rescale_timesteps: bool = True,
        betas: Tensor | Sequence[float] | None = None,
        zero_terminal_snr: bool = False,
        sigma_data: float = 0.5,
    ) -> None:
        num_timesteps, sigma_data = plain((num_timesteps, sigma_data))
        if betas is None:
            train_betas = check_betas(named_betas(schedule, num_timesteps))
        else:
            schedule, train_betas = "custom", check_betas(betas)
            if num_timesteps not in (4000, len(train_betas)):
                raise ValueError(
                    f"Diffusion: num_timesteps must be the number of betas {len(train_betas)}, "
                    f"got {num_timesteps}"
                )
        _check_name("variance", variance, VARIANCES)
        if zero_terminal_snr:
            given = torch.tensor(train_betas, dtype=torch.float64, device="cpu")
            train_betas = check_betas(rescale_zero_terminal_snr(given))
        _check_prediction(prediction, train_betas)
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"Diffusion: sigma_data must be above 0, got {sigma_data}")
        alpha_bars = fixed_point_alpha_bars(train_betas)
        self._set(
            schedule=schedule,
            num_train_timesteps=len(train_betas),
            variance=variance,
            prediction=prediction,
            rescale_timesteps=bool(rescale_timesteps),
            # Custom betas are stored after rescaling.
            zero_terminal_snr=bool(zero_terminal_snr) and schedule != "custom",
            sigma_data=float(sigma_data),
            _train_betas=train_betas,
            _train_alpha_bars=alpha_bars,
        )
        self._visit(list(range(len(train_betas))))

    def _visit(self, steps: list[int]) -> None:
        chain = Chain.from_fixed_point([self._train_alpha_bars[i] for i in steps])
        self._set(
            num_timesteps=len(steps),
            timesteps=torch.tensor(steps, dtype=torch.int64, device="cpu"),
            betas=chain.beta,
            alphas_cumprod=chain.alpha_bar,
            _chain=chain,
            _tables={},
        )

    @property
    def learns_variance(self) -> bool:
        """Whether the network has channels for the variance."""
        return self.variance in ("learned_range", "learned")

    def respace(self, spec: int | str | Sequence[int]) -> Diffusion:
        """The chain that visits only some of this one's steps, with the same alpha_bar at each.

        Args:
            spec: see ``space_timesteps``; indices count the steps of this chain.

        Returns:
            a Diffusion whose ``timesteps`` are still those of the training chain.

        Raises:
            ValueError: the steps do not exist, or are fewer than two.
        """
        steps = [int(self.timesteps[i]) for i in space_timesteps(self.num_timesteps, spec)]
        if len(steps) < 2:
            raise ValueError(f"respace: spec must leave at least 2 steps, got {spec!r}")
        shorter = object.__new__(type(self))
        shorter._set(**self.__dict__)
        shorter._visit(steps)
        return shorter

    def predicting(self, prediction: str) -> Diffusion:
        """The same chain for a network with another prediction."""
        _check_prediction(prediction, self._train_betas)
        other = object.__new__(type(self))
        other._set(**{**self.__dict__, "prediction": prediction, "_tables": {}})
        return other

    def table(
        self,
        device: torch.device | str = "cpu",
        *,
        sampler: str = "ddpm",
        eta: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Every coefficient of this chain, [T, 16] on ``device``, columns as in ``COLUMNS``.

        Computed in float64, rounded once, and cached.

        Args:
            device: of the result.
            sampler: ``"ddpm"`` or ``"ddim"``.
            eta: noise of DDIM, 0 <= eta <= 1; ignored by ``"ddpm"``.
            dtype: float32, or float64 for reference computations.
        """
        _check_name("sampler", sampler, SAMPLERS)
        eta = plain(eta)
        if not 0 <= eta <= 1:
            raise ValueError(f"Diffusion: eta must be from 0 to 1, got {eta}")
        device = torch.device(device)
        key = (device, sampler, float(eta) if sampler == "ddim" else 0.0, dtype)
        if key not in self._tables:
            # Cached for later calls, which may need gradients: no inference tensor.
            with torch.inference_mode(False):
                table = build_table(
                    self._chain,
                    self.timesteps,
                    self.variance,
                    self.prediction,
                    sampler,
                    key[2],
                    self.sigma_data,
                )
                self._tables[key] = table.to(dtype).to(device)
        return self._tables[key]

    def multistep_weights(self, limit: float = math.inf) -> Tensor:
        """The weights of `multistep_update` for every step of this chain, float64 [T] on the CPU.

        limit: the largest factor of extrapolation, h_t / (2 h_{t+1}); 1/2 for steps evenly spaced in t.
        """
        return multistep_weights(self._chain, limit)

    def model_timesteps(self, t: Tensor) -> Tensor:
        """The network's timestep input at step t: the index in the training chain, rescaled if so set.

        Args:
            t: int64 [N].

        Returns:
            float32 [N]: timesteps[t], times 1000/T of the training chain if ``rescale_timesteps``; of
            the prediction ``"edm"`` log(sigma_t) / 4.
        """
        checks.timesteps("model_timesteps", t, len(t), self.num_timesteps, t.device)
        if self.prediction == "edm":
            return self._numbers("c_noise", t.device, torch.float32)[t]
        steps = self.table(t.device)[t, Column.STEP]
        return steps * (1000.0 / self.num_train_timesteps) if self.rescale_timesteps else steps

    @property
    def scales_input(self) -> bool:
        """Whether the network is given something else than x_t: see ``model_input``."""
        return self.prediction == "edm"

    def model_input(self, x_t: Tensor, t: Tensor | int) -> Tensor:
        """What the network is given: x_t, or of the prediction ``"edm"`` c_in x, of unit variance.

        Args:
            x_t: floating [N, C, H, W].
            t: int64 [N], or one step.

        Returns:
            like x_t.
        """
        if not self.scales_input:
            return x_t
        scale = self._numbers("c_in", x_t.device, compute_dtype(x_t))[t]
        return (x_t * scale.reshape(-1, 1, 1, 1)).to(x_t.dtype)

    def _numbers(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """One number a step of what EDM's networks are given, [T]."""
        key = (device, name, 0.0, dtype)
        if key not in self._tables:
            with torch.inference_mode(False):
                values = {
                    "c_noise": lambda: self._chain.log_sigma / 4,
                    "c_in": lambda: self._chain.input_scale(self.sigma_data),
                }[name]()
                self._tables[key] = values.to(dtype).to(device)
        return self._tables[key]

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor | NoiseKey) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (equation 8): ``ops.q_sample``.

        Args:
            x_0: floating [N, C, H, W].
            t: int64 [N].
            noise: like x_0, or a `NoiseKey`, by which it is drawn.

        Returns:
            like x_0. Differentiable in x_0.
        """
        checks.image_batch("q_sample", "x_0", x_0)
        table = self.table(x_0.device, dtype=compute_dtype(x_0))
        return ops.q_sample(x_0, t, table, noise)

    def p_mean_variance(
        self, model_output: Tensor, x_t: Tensor, t: Tensor, clip: bool = True
    ) -> MeanVariance:
        """The network's p(x_{t-1} | x_t).

        Args:
            model_output: floating [N, 2C, H, W] where the variance is learned, else [N, C, H, W]
                (or [N, 2C, H, W], the second half unused).
            x_t: floating [N, C, H, W].
            t: int64 [N].
            clip: clamp x_0 to [-1, 1] before computing the mean. (For networks that predict x_prev too,
                where the original clamps only the x_0 that it returns.)

        Returns:
            mean, log_variance and x_0, like x_t, at least float32. Differentiable in model_output
            and x_t.
        """
        row = self._rows("p_mean_variance", t, x_t)
        checks.model_output("p_mean_variance", model_output, x_t, self.table())
        channels = x_t.shape[1]
        x_0 = row[Column.X0_FROM_XT] * x_t + row[Column.X0_FROM_OUT] * model_output[:, :channels]
        x_0 = x_0.clamp(-1, 1) if clip else x_0
        mean = row[Column.MEAN_X0] * x_0 + row[Column.MEAN_XT] * x_t
        log_variance = row[Column.LOG_VARIANCE_BIAS]
        if self.learns_variance:
            v = model_output[:, channels:]
            log_variance = log_variance + row[Column.LOG_VARIANCE_SCALE] * v
        return MeanVariance(mean, log_variance.expand_as(mean), x_0)

    def reverse_step(
        self,
        model_output: Tensor,
        x_t: Tensor,
        t: Tensor,
        noise: Tensor | NoiseKey | None = None,
        sampler: str = "ddpm",
        eta: float = 0.0,
        clip: bool = True,
        backend: str = "auto",
    ) -> ReverseStep:
        """x_{t-1} from x_t and the network's output, ancestral or DDIM, by ``ops.reverse_step``.

        Args:
            model_output: as in ``p_mean_variance``; DDIM ignores the variance.
            x_t: floating [N, C, H, W].
            t: int64 [N].
            noise: like x_t, or a `NoiseKey`, by which it is drawn; may be None for DDIM with eta = 0.
            sampler: ``"ddpm"`` or ``"ddim"``.
            eta: noise of DDIM, 0 <= eta <= 1.
            clip: clamp x_0 to [-1, 1] before computing x_{t-1}.
            backend: of the op.

        Returns:
            x_prev and x_0, like x_t. Not differentiable.

        Source: Ho et al. 2020, algorithm 2; Song et al. 2021, equation 12.
        """
        # The table on the CPU, whose values can be read without waiting for a device.
        cpu_table = self.table(sampler=sampler, eta=eta)
        if noise is None and (sampler == "ddpm" or eta > 0):
            raise ValueError(
                "reverse_step: noise must be given, except to DDIM with eta=0, got None"
            )
        checks.image_batch("reverse_step", "x_t", x_t)
        checks.model_output("reverse_step", model_output, x_t, cpu_table)
        table = self.table(x_t.device, sampler=sampler, eta=eta, dtype=compute_dtype(x_t))
        return ops.reverse_step(x_t, model_output, t, table, noise, clip=clip, backend=backend)

    def vlb_terms_bpd(
        self,
        model_output: Tensor,
        x_0: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip: bool = True,
        exact: bool = False,
    ) -> Tensor:
        """L_t, one term of the variational bound, in bits per dimension.

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) (equation 6), and at t = 0 the discretized
        -log p(x_0 | x_1) (equation 5).

        Args:
            model_output: as in ``p_mean_variance``.
            x_0, x_t: floating [N, C, H, W].
            t: int64 [N].
            clip: clamp the predicted x_0 to [-1, 1].
            exact: use the normal distribution function itself at t = 0, not its approximation.

        Returns:
            [N]. Differentiable in model_output.
        """
        checks.image_batch("vlb_terms_bpd", "x_t", x_t)
        checks.model_output("vlb_terms_bpd", model_output, x_t, self.table())
        table = self.table(x_t.device, dtype=compute_dtype(model_output, x_t))
        return ops.vlb_terms(model_output, x_0, x_t, t, table, clip=clip, exact=exact)

    def prior_bpd(self, x_0: Tensor) -> Tensor:
        """L_T = KL(q(x_T | x_0) || N(0, 1)) in bits per dimension (equation 7), [N].

        Args:
            x_0: floating [N, C, H, W].
        """
        checks.image_batch("prior_bpd", "x_0", x_0)
        alpha_bar = float(self.alphas_cumprod[-1])
        # In float64 and apart from the mean's term, since these two cancel almost entirely.
        constant = -alpha_bar - math.log1p(-alpha_bar)
        square = x_0.to(compute_dtype(x_0)).square().flatten(1).mean(1)
        return (alpha_bar * square + constant) / (2 * math.log(2))

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x_0: Tensor,
        t: Tensor,
        noise: Tensor | NoiseKey,
        objective: str = "hybrid",
        vlb_weight: float = 1e-3,
        model_kwargs: dict[str, Any] | None = None,
        min_snr: float | None = None,
    ) -> dict[str, Tensor]:
        """The training objective for one step t of each example.

        ``"simple"``: mse. ``"hybrid"``: mse + vlb_weight T vlb, where vlb trains the variance alone,
        because the mean is detached (equation 16). ``"vlb"``: T vlb. T is the length of this chain; x_0
        is not clipped.

        Args:
            model: called with (model_input [N, C, H, W], model_timesteps float32 [N],
                **model_kwargs), returns a tensor or, like networks of diffusers, an object with a tensor
                `sample`.
            x_0: floating [N, C, H, W].
            t: int64 [N].
            noise: like x_0, or a `NoiseKey`, by which it is drawn.
            objective: ``"hybrid"`` (needs a learned variance), ``"simple"`` or ``"vlb"``.
            vlb_weight: weight of T vlb in ``"hybrid"``; 1/T adds the bits of the one step.
            model_kwargs: further arguments of the model.
            min_snr: gamma of min-SNR weighting (Hang et al. 2023): the squared error in x_0 gets the
                weight min(SNR, gamma), with SNR = alpha_bar / (1 - alpha_bar); 0 at pure noise. None for
                unweighted mse.

        Returns:
            ``loss``, ``mse`` and ``vlb`` (bits per dimension of the one step), each [N]. mse and vlb have
            gradients only if the objective trains on them.
        """
        _check_name("objective", objective, OBJECTIVES)
        if objective == "hybrid" and not self.learns_variance:
            raise ValueError(
                "training_losses: objective must be 'simple' or 'vlb' where the variance is "
                f"{self.variance}, got 'hybrid'"
            )
        vlb_weight, min_snr = plain((vlb_weight, min_snr))
        if min_snr is not None and (objective == "vlb" or not min_snr > 0):
            raise ValueError(
                "training_losses: min_snr must be above 0, and None for objective vlb, "
                f"got {min_snr} for {objective}"
            )
        checks.image_batch("training_losses", "x_0", x_0)
        checks.noise_arguments("training_losses", noise, x_0)
        x_t = self.q_sample(x_0, t, noise)
        given = self.model_input(x_t, t)
        output = model(given, self.model_timesteps(t), **(model_kwargs or {}))
        model_output = output_tensor("training_losses", output)
        checks.model_output("training_losses", model_output, x_t, self.table())
        table = self.table(x_0.device, dtype=compute_dtype(model_output, x_0))
        if self.learns_variance and objective != "vlb":
            parts = ops.hybrid_loss(model_output, x_0, x_t, noise, t, table, vlb_weight=vlb_weight)
            weighted = parts.mse * self._min_snr_weight(min_snr, x_0, t)
            if objective == "hybrid":
                loss = parts.loss
                if min_snr is not None:
                    loss = weighted + vlb_weight * self.num_timesteps * parts.vlb
                return {"loss": loss, "mse": parts.mse, "vlb": parts.vlb}
            return {"loss": weighted, "mse": parts.mse, "vlb": parts.vlb.detach()}
        mse = self._mean_squared_error(model_output[:, : x_0.shape[1]], x_0, x_t, noise, t)
        if objective == "simple":
            vlb = self.vlb_terms_bpd(model_output.detach(), x_0, x_t, t, clip=False)
            return {"loss": mse * self._min_snr_weight(min_snr, x_0, t), "mse": mse, "vlb": vlb}
        vlb = self.vlb_terms_bpd(model_output, x_0, x_t, t, clip=False)
        return {"loss": self.num_timesteps * vlb, "mse": mse.detach(), "vlb": vlb}

    def _min_snr_weight(self, gamma: float | None, x_0: Tensor, t: Tensor) -> Tensor | float:
        """The weight of each example's mse, [N]; 1 without gamma.

        min(SNR, gamma) in x_0, times X0_FROM_OUT squared, as mse is measured on the output.
        """
        if gamma is None:
            return 1.0
        rows = self.table(x_0.device, dtype=compute_dtype(x_0))[t]
        snr = (rows[:, Column.SQRT_ALPHA_BAR] / rows[:, Column.SQRT_ONE_MINUS_ALPHA_BAR]).square()
        return snr.clamp(max=gamma) * rows[:, Column.X0_FROM_OUT].square()

    def _mean_squared_error(
        self, out: Tensor, x_0: Tensor, x_t: Tensor, noise: Tensor | NoiseKey, t: Tensor
    ) -> Tensor:
        """mean (target - out)^2 of each example, [N]."""
        if isinstance(noise, NoiseKey):
            noise = normal(noise, x_0.shape, x_0.device)
        row = self._rows("training_losses", t, x_0)
        target = row[Column.TARGET_X0] * x_0 + row[Column.TARGET_XT] * x_t
        target = target + row[Column.TARGET_NOISE] * noise
        return (target - out).square().flatten(1).mean(1)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, from which ``from_dict`` rebuilds this process."""
        whole = self.num_timesteps == self.num_train_timesteps
        terminal = {"zero_terminal_snr": True} if self.zero_terminal_snr else {}
        edm = {"sigma_data": self.sigma_data} if self.prediction == "edm" else {}
        return {
            **terminal,
            **edm,
            "schedule": self.schedule,
            "num_timesteps": self.num_train_timesteps,
            "variance": self.variance,
            "prediction": self.prediction,
            "rescale_timesteps": self.rescale_timesteps,
            "betas": self._train_betas if self.schedule == "custom" else None,
            "timesteps": None if whole else self.timesteps.tolist(),
        }

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Diffusion:
        """The process that ``to_dict`` described; ValueError names keys missing or unknown."""
        keys = {"schedule", "num_timesteps", "variance", "prediction", "rescale_timesteps"}
        keys |= {"betas", "timesteps"}
        if set(config) - {"zero_terminal_snr", "sigma_data"} != keys:
            raise ValueError(
                f"Diffusion.from_dict: config must have the keys {sorted(keys)}, "
                f"got {sorted(config)}"
            )
        arguments = {key: value for key, value in config.items() if key != "timesteps"}
        diffusion = cls(**arguments)
        steps = config["timesteps"]
        return diffusion if steps is None else diffusion.respace(steps)

    def same_training(self, other: Diffusion) -> bool:
        """Whether both are of one training process: respacings of each other's whole chain."""
        return {**self.to_dict(), "timesteps": None} == {**other.to_dict(), "timesteps": None}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Diffusion) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.schedule, self.variance, self.prediction, tuple(self.timesteps.tolist())))

    def __repr__(self) -> str:
        steps = f"{self.num_timesteps}"
        if self.num_timesteps != self.num_train_timesteps:
            steps += f" of {self.num_train_timesteps}"
        terminal = ", zero terminal SNR" if self.zero_terminal_snr else ""
        return f"Diffusion({self.schedule}, {steps} steps, {self.variance}, {self.prediction}{terminal})"

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Diffusion is frozen: {name} cannot be set")

    def _set(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    def _rows(self, method: str, t: Tensor, x: Tensor) -> Rows:
        """The checked rows of the ancestral table for images x at steps t."""
        checks.image_batch(method, "x", x)
        checks.timesteps(method, t, len(x), self.num_timesteps, x.device)
        dtype = compute_dtype(x)
        return Rows(self.table(x.device, dtype=dtype), t, dtype)


def _check_prediction(prediction: str, train_betas: Sequence[float]) -> None:
    _check_name("prediction", prediction, PREDICTIONS)
    if prediction in ("epsilon", "edm") and train_betas[-1] == 1:
        raise ValueError(
            "Diffusion: prediction must be x_0, x_prev or velocity for a chain that ends in pure "
            f"noise, got {prediction!r}"
        )


def _check_name(argument: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise ValueError(f"Diffusion: {argument} must be one of {', '.join(names)}, got {name!r}")

"""Converts a `Diffusion` to the configuration of a diffusers scheduler and back.

Field names and values are those of `diffusers.DDPMScheduler`, so that either scheduler can be built from the
other's configuration. `"squaredcos_cap_v2"` is diffusers' name of the paper's cosine schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from iddpm_ext.diffusion import Diffusion, karras_beta_schedule, linear_beta_schedule

_COSINE = ("squaredcos_cap_v2", "cosine")
_SCHEDULES = (*_COSINE, "linear", "scaled_linear", "sigmoid")
# With "learned" the network outputs a variance in diffusers and a log-variance in the paper's code, so
# diffusers' own configurations with that value describe other networks.
_VARIANCES = {
    "learned_range": "learned_range",
    "learned": "learned",
    "fixed_large": "fixed_large",
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
}
_PREDICTIONS = {
    "epsilon": "epsilon", "sample": "x_0", "x_prev": "x_prev", "v_prediction": "velocity",
}  # fmt: skip


def diffusion_of(config: Mapping[str, Any]) -> Diffusion:
    """The training process of a scheduler's configuration.

    Raises ValueError if this package has no such process.
    """
    if "sigma_data" in config:
        return _edm(config)
    steps, betas = int(config["num_train_timesteps"]), config.get("trained_betas")
    schedule = config.get("beta_schedule", "linear")
    variance = _named("variance_type", config["variance_type"], _VARIANCES)
    prediction = _named("prediction_type", config["prediction_type"], _PREDICTIONS)
    common: dict[str, Any] = {
        "variance": variance,
        "prediction": prediction,
        "rescale_timesteps": bool(config.get("rescale_timesteps", False)),
        "zero_terminal_snr": bool(config.get("rescale_betas_zero_snr", False)),
    }
    if betas is not None:
        return Diffusion(betas=torch.as_tensor(betas, dtype=torch.float64, device="cpu"), **common)
    if schedule in _COSINE:
        return Diffusion("cosine", steps, **common)
    first, last = ends_of(config, steps)
    if schedule == "linear":
        own = Diffusion("linear", steps, **common) if steps >= 20 else None
        given = torch.linspace(first, last, steps, dtype=torch.float64, device="cpu")
        if own is not None and torch.allclose(own.betas, given, rtol=1e-12, atol=0):
            return own
        return Diffusion(betas=given, **common)
    if schedule == "scaled_linear":
        root: Tensor = torch.linspace(
            first**0.5, last**0.5, steps, dtype=torch.float64, device="cpu"
        )
        return Diffusion(betas=root.square(), **common)
    if schedule == "sigmoid":
        # In diffusers a sigmoid of the betas; `Diffusion`'s schedule of this name is one of alpha_bar.
        slope = torch.linspace(-6, 6, steps, dtype=torch.float64, device="cpu").sigmoid()
        return Diffusion(betas=first + slope * (last - first), **common)
    raise ValueError(
        f"IDDPMScheduler: beta_schedule must be one of {', '.join(_SCHEDULES)}, got {schedule!r}"
    )


def config_of(diffusion: Diffusion) -> dict[str, Any]:
    """The arguments of `IDDPMScheduler` that describe a whole training process.

    Raises ValueError for a respaced process, since a scheduler chooses its steps itself, and for one whose
    network's input is not x_t.
    """
    if diffusion.scales_input:
        raise ValueError(
            "IDDPMScheduler: prediction must be one of a network that is given x_t, got "
            f"{diffusion.prediction!r}: diffusers.EDMEulerScheduler and its kin are for that"
        )
    if diffusion.num_timesteps != diffusion.num_train_timesteps:
        raise ValueError(
            "IDDPMScheduler: diffusion must be a whole training process, "
            f"got the respaced {diffusion!r}"
        )
    steps = diffusion.num_train_timesteps
    schedule = {"cosine": "squaredcos_cap_v2"}.get(diffusion.schedule, diffusion.schedule)
    names = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    config: dict[str, Any] = {
        "num_train_timesteps": steps,
        "beta_schedule": schedule,
        "variance_type": diffusion.variance,
        "prediction_type": names[diffusion.prediction],
        "rescale_timesteps": diffusion.rescale_timesteps,
        "rescale_betas_zero_snr": diffusion.zero_terminal_snr,
    }
    if schedule in ("custom", "sigmoid", "karras"):
        config["rescale_betas_zero_snr"] = False
        config.update(beta_schedule="linear", trained_betas=diffusion.betas.tolist())
    return config


def _edm(config: Mapping[str, Any]) -> Diffusion:
    """Of `EDMEulerScheduler` and `EDMDPMSolverMultistepScheduler`: noise levels without a training chain.

    Their noise levels, between which a chain of `num_train_timesteps` is laid; a sampler takes some.
    """
    if config["prediction_type"] != "epsilon":
        raise ValueError(
            "IDDPMScheduler: prediction_type must be epsilon of a scheduler with sigma_data, "
            f"got {config['prediction_type']!r}"
        )
    if config.get("sigma_schedule", "karras") != "karras":
        raise ValueError(
            f"IDDPMScheduler: sigma_schedule must be karras, got {config['sigma_schedule']!r}"
        )
    betas = karras_beta_schedule(
        int(config["num_train_timesteps"]), config["sigma_min"], config["sigma_max"], config["rho"]
    )
    return Diffusion(
        betas=betas, prediction="edm", variance="fixed_small", sigma_data=config["sigma_data"]
    )


def ends_of(config: Mapping[str, Any], steps: int) -> tuple[float, float]:
    """First and last beta; by default those of the linear schedule rescaled to T."""
    first, last = config.get("beta_start"), config.get("beta_end")
    if (first is None or last is None) and steps >= 20:
        betas = linear_beta_schedule(steps)
        first = float(betas[0]) if first is None else first
        last = float(betas[-1]) if last is None else last
    if first is None or last is None:
        raise ValueError(
            "IDDPMScheduler: beta_start and beta_end must be given for fewer than 20 steps, "
            f"got {first} and {last}"
        )
    return float(first), float(last)


def _named(argument: str, value: str, names: Mapping[str, str]) -> str:
    if value not in names:
        raise ValueError(
            f"IDDPMScheduler: {argument} must be one of {', '.join(names)}, got {value!r}"
        )
    return names[value]

"""Noise schedules: float64 tensors of betas, one per step of the training chain."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from iddpm_ext.scalars import plain

SCHEDULES = ("cosine", "linear", "sigmoid", "karras")


def cosine_beta_schedule(num_timesteps: int, s: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """Betas of the cosine schedule.

    alpha_bar(t) = cos^2((t/T + s) / (1 + s) * pi/2),
    beta_t = min(1 - alpha_bar(t) / alpha_bar(t - 1), max_beta)   (equation 17).

    Args:
        num_timesteps: T, at least 1.
        s: offset that keeps the first betas from vanishing, at least 0.
        max_beta: largest beta, in (0, 1).

    Returns:
        float64 [T] on the CPU.

    Raises:
        ValueError: an argument is out of range.

    Source: Nichol & Dhariwal 2021, section 3.2.
    """
    num_timesteps, s, max_beta = plain((num_timesteps, s, max_beta))
    if not s >= 0:
        raise ValueError(f"cosine_beta_schedule: s must be at least 0, got {s}")
    _check_num_timesteps("cosine_beta_schedule", num_timesteps)
    _check_max_beta("cosine_beta_schedule", max_beta)
    return betas_for_alpha_bar(
        num_timesteps, lambda u: math.cos((u + s) / (1 + s) * math.pi / 2) ** 2, max_beta
    )


def linear_beta_schedule(num_timesteps: int) -> Tensor:
    """Betas of the linear schedule of DDPM, rescaled so that the final noise is the same for every T.

    beta_t runs evenly from 1e-4 * 1000/T to 0.02 * 1000/T.

    Args:
        num_timesteps: T, at least 20: below that the last beta exceeds 1.

    Returns:
        float64 [T] on the CPU.

    Raises:
        ValueError: T is below 20.

    Source: Ho et al. 2020, section 4, with the scale of Nichol & Dhariwal's code.
    """
    num_timesteps = plain(num_timesteps)
    _check_num_timesteps("linear_beta_schedule", num_timesteps)
    if num_timesteps < 20:
        raise ValueError(
            "linear_beta_schedule: num_timesteps must be at least 20 (below it the last beta "
            f"exceeds 1), got {num_timesteps}"
        )
    scale = 1000 / num_timesteps
    return torch.linspace(
        scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64, device="cpu"
    )


def sigmoid_beta_schedule(
    num_timesteps: int, start: float = -3.0, end: float = 3.0, max_beta: float = 0.999
) -> Tensor:
    """Betas of the sigmoid schedule.

    alpha_bar(t) = (sigmoid(end) - sigmoid(start + t/T (end - start))) / (sigmoid(end) - sigmoid(start)),
    beta_t = min(1 - alpha_bar(t) / alpha_bar(t - 1), max_beta).

    Args:
        num_timesteps: T, at least 1.
        start, end: the interval of the sigmoid, start < end.
        max_beta: largest beta, in (0, 1).

    Returns:
        float64 [T] on the CPU.

    Raises:
        ValueError: an argument is out of range.

    Source: Jabri, Fleet & Chen 2022, "Scalable Adaptive Computation for Iterative Generation",
    appendix B, with temperature 1.
    """
    num_timesteps, start, end, max_beta = plain((num_timesteps, start, end, max_beta))
    if not start < end:
        raise ValueError(f"sigmoid_beta_schedule: start must be below end {end}, got {start}")
    _check_num_timesteps("sigmoid_beta_schedule", num_timesteps)
    _check_max_beta("sigmoid_beta_schedule", max_beta)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    first, last = sigmoid(start), sigmoid(end)
    return betas_for_alpha_bar(
        num_timesteps,
        lambda u: (last - sigmoid(start + u * (end - start))) / (last - first),
        max_beta,
    )


def karras_beta_schedule(
    num_timesteps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """Betas of the noise levels of EDM, of which the first step has the smallest.

    sigma_t = (sigma_min^(1/rho) + t/(T - 1) (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho,
    alpha_bar_t = 1 / (1 + sigma_t^2): x_t is EDM's image divided by sqrt(1 + sigma_t^2).

    Args:
        num_timesteps: T, at least 2.
        sigma_min, sigma_max: 0 < sigma_min < sigma_max.
        rho: above 0; large ones spend more steps on little noise.

    Returns:
        float64 [T] on the CPU.

    Raises:
        ValueError: an argument is out of range.

    Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
    equation 5.
    """
    num_timesteps, sigma_min, sigma_max, rho = plain((num_timesteps, sigma_min, sigma_max, rho))
    _check_num_timesteps("karras_beta_schedule", num_timesteps)
    if num_timesteps < 2:
        raise ValueError(
            f"karras_beta_schedule: num_timesteps must be at least 2, got {num_timesteps}"
        )
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            "karras_beta_schedule: sigma_min must be above 0 and below sigma_max, "
            f"got {sigma_min} and {sigma_max}"
        )
    if not 0 < rho < math.inf:
        raise ValueError(f"karras_beta_schedule: rho must be above 0, got {rho}")
    first, last = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    part = torch.arange(num_timesteps, dtype=torch.float64, device="cpu") / (num_timesteps - 1)
    square = torch.cat([torch.zeros_like(part[:1]), (first + part * (last - first)).pow(2 * rho)])
    return square.diff() / (1 + square[1:])


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas rescaled so that the chain ends in pure noise, alpha_bar_{T-1} = 0; the first is kept.

    sqrt(alpha_bar_t) is shifted by its last value and scaled to keep its first one.

    Args:
        betas: float64 [T], T at least 2, in (0, 1), the last one also 1.

    Returns:
        float64 [T] on the CPU, the last one 1.

    Source: Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1.
    """
    betas = betas.to("cpu", torch.float64)
    signal = torch.log1p(-betas).cumsum(0).div(2).exp()
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    ratio = (signal[1:] / signal[:-1]).square()
    return torch.cat([betas[:1], 1 - ratio])


def betas_for_alpha_bar(
    num_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> Tensor:
    """Betas whose cumulative product follows a given alpha_bar(t).

    beta_t = min(1 - alpha_bar((t + 1)/T) / alpha_bar(t/T), max_beta), t = 0 .. T-1.

    Args:
        num_timesteps: T, at least 1.
        alpha_bar: falling function of t in [0, 1] with values in [0, 1].
        max_beta: largest beta, in (0, 1).

    Returns:
        float64 [T] on the CPU.

    Raises:
        ValueError: an argument is out of range, or alpha_bar is not falling.

    Source: Nichol & Dhariwal 2021, section 3.2.
    """
    num_timesteps, max_beta = plain((num_timesteps, max_beta))
    _check_num_timesteps("betas_for_alpha_bar", num_timesteps)
    _check_max_beta("betas_for_alpha_bar", max_beta)
    values = [float(alpha_bar(i / num_timesteps)) for i in range(num_timesteps + 1)]
    betas = []
    for i, (previous, current) in enumerate(itertools.pairwise(values)):
        if not 0 <= current < previous:
            raise ValueError(
                "betas_for_alpha_bar: alpha_bar must fall and stay at or above 0, got "
                f"{previous} at t={i}/{num_timesteps} and {current} at t={i + 1}/{num_timesteps}"
            )
        betas.append(min(1 - current / previous, max_beta))
    return torch.tensor(betas, dtype=torch.float64, device="cpu")


def named_betas(schedule: str, num_timesteps: int) -> Tensor:
    """Betas float64 [T] of the schedule of this name."""
    if schedule == "cosine":
        return cosine_beta_schedule(num_timesteps)
    if schedule == "linear":
        return linear_beta_schedule(num_timesteps)
    if schedule == "sigmoid":
        return sigmoid_beta_schedule(num_timesteps)
    if schedule == "karras":
        return karras_beta_schedule(num_timesteps)
    raise ValueError(f"Diffusion: schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")


def check_betas(betas: Tensor | Sequence[float]) -> list[float]:
    """Betas [T] as a list, checked: T >= 2, all in (0, 1), alpha_bar large enough for float32.

    The last one may be 1; the chain then ends in pure noise.
    """
    values = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
    if values.dim() != 1:
        raise ValueError(f"Diffusion: betas must be [T], got {tuple(values.shape)}")
    if len(values) < 2:
        raise ValueError(f"Diffusion: num_timesteps must be at least 2, got {len(values)}")
    outside = ~((values > 0) & (values < 1))
    outside[-1] &= values[-1] != 1
    if outside.any():
        t = int(outside.nonzero()[0])
        raise ValueError(
            f"Diffusion: every beta must be above 0 and below 1, got {values[t]} at t={t} "
            "(the last one alone may be 1)"
        )
    log_alpha_bar = float(torch.log1p(-values[values < 1]).sum())
    if log_alpha_bar < math.log(1e-75):
        raise ValueError(
            f"Diffusion: betas must keep alpha_bar above 1e-75, got exp({log_alpha_bar:.1f}) "
            "at the last step that is not pure noise"
        )
    return values.tolist()


def _check_num_timesteps(function: str, num_timesteps: int) -> None:
    if isinstance(num_timesteps, bool) or not isinstance(num_timesteps, int):
        raise TypeError(f"{function}: num_timesteps must be an int, got {num_timesteps!r}")
    if num_timesteps < 1:
        raise ValueError(f"{function}: num_timesteps must be at least 1, got {num_timesteps}")


def _check_max_beta(function: str, max_beta: float) -> None:
    if not 0 < max_beta < 1:
        raise ValueError(f"{function}: max_beta must be between 0 and 1, got {max_beta}")

"""The diffusion process: schedules, step selection, coefficients, losses, timestep samplers."""

from __future__ import annotations

from iddpm_ext.ops.gaussian import (
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    normal_kl,
)

from .multistep import multistep_update
from .process import OBJECTIVES, Diffusion, MeanVariance
from .respace import space_timesteps
from .schedule import (
    SCHEDULES,
    betas_for_alpha_bar,
    cosine_beta_schedule,
    karras_beta_schedule,
    linear_beta_schedule,
    rescale_zero_terminal_snr,
    sigmoid_beta_schedule,
)
from .table import PREDICTIONS, SAMPLERS, VARIANCES
from .timestep_samplers import (
    TIMESTEP_SAMPLERS,
    LogNormalTimestepSampler,
    LossSecondMomentSampler,
    TimestepSampler,
    UniformTimestepSampler,
    WeightedTimesteps,
    make_timestep_sampler,
)

__all__ = [
    "OBJECTIVES",
    "PREDICTIONS",
    "SAMPLERS",
    "SCHEDULES",
    "TIMESTEP_SAMPLERS",
    "VARIANCES",
    "Diffusion",
    "LogNormalTimestepSampler",
    "LossSecondMomentSampler",
    "MeanVariance",
    "TimestepSampler",
    "UniformTimestepSampler",
    "WeightedTimesteps",
    "approx_standard_normal_cdf",
    "betas_for_alpha_bar",
    "cosine_beta_schedule",
    "discretized_gaussian_log_likelihood",
    "karras_beta_schedule",
    "linear_beta_schedule",
    "make_timestep_sampler",
    "multistep_update",
    "normal_kl",
    "rescale_zero_terminal_snr",
    "sigmoid_beta_schedule",
    "space_timesteps",
]

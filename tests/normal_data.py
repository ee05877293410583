"""Images whose values are normal: the best predictor is known."""

from __future__ import annotations

import torch

from iddpm_ext import Diffusion


def exact_eps(chain: Diffusion, x: torch.Tensor, i: int, std: float) -> torch.Tensor:
    """eps of the best predictor for normal x_0 with deviation `std`, which is linear in x_t."""
    alpha_bar = chain.alphas_cumprod[i]
    variance = alpha_bar * std**2 + (1 - alpha_bar)
    return (1 - alpha_bar).sqrt() * x / variance


def uniform_in_log_snr(chain: Diffusion, steps: int) -> Diffusion:
    """`steps` steps of the chain, evenly spread in log SNR."""
    log_snr = chain.alphas_cumprod.logit()
    wanted = torch.linspace(float(log_snr[0]), float(log_snr[-1]), steps, dtype=torch.float64)
    return chain.respace(sorted({int((log_snr - w).abs().argmin()) for w in wanted}))

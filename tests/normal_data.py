"""Images whose values are normal: the best predictor is known."""

from __future__ import annotations

import torch

from iddpm_ext import Diffusion


def exact_eps(chain: Diffusion, x: torch.Tensor, i: int, std: float) -> torch.Tensor:
    """eps of the best predictor where x_0 is normal with deviation `std`: linear in x_t."""
    alpha_bar = chain.alphas_cumprod[i]
    variance = alpha_bar * std**2 + (1 - alpha_bar)
    return (1 - alpha_bar).sqrt() * x / variance

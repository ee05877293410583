"""A denoiser of EDM's kind, D(x; sigma), as the network that the prediction "edm" wants."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from iddpm_ext.scalars import plain


class EDMDenoiser(nn.Module):
    """F of D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), from a D that is preconditioned by itself.

    Such are the networks of EDM's own code and of k-diffusion. `sample` takes it with
    `Diffusion("karras", prediction="edm", variance="fixed_small", sigma_data=sigma_data)` and `image_shape`.

    Args:
        denoiser: (x [N, C, H, W] = x_0 + sigma noise, sigma float32 [N], and `y` or `low_res` where there
            are) -> x_0, like x.
        sigma_data: as of the `Diffusion`; it need not be the denoiser's own.

    Source: Karras et al. 2022, equation 7 and table 1.
    """

    def __init__(self, denoiser: Callable[..., Tensor], sigma_data: float = 0.5) -> None:
        super().__init__()
        sigma_data = plain(sigma_data)
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"EDMDenoiser: sigma_data must be above 0, got {sigma_data}")
        self.denoiser, self.sigma_data = denoiser, sigma_data

    def forward(self, x: Tensor, c_noise: Tensor, **conditions: Any) -> Tensor:
        """x: c_in times the noisy images, [N, C, H, W]. c_noise: log(sigma) / 4, [N]."""
        sigma = (4 * c_noise.double()).exp()
        size = (sigma.square() + self.sigma_data**2).sqrt()
        by_image = (-1, 1, 1, 1)
        noisy = x * size.to(x.dtype).view(by_image)
        x_0 = self.denoiser(noisy, sigma.to(c_noise.dtype), **conditions)
        skipped = (self.sigma_data / size).square().to(x.dtype).view(by_image) * noisy
        c_out = (sigma * self.sigma_data / size).to(x.dtype).view(by_image)
        return (x_0 - skipped) / c_out

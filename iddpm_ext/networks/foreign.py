"""Networks of other libraries, and PyTorch's wrappers: recognised, unwrapped, called.

Nothing here imports diffusers: its classes are recognised by their attributes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from iddpm_ext.diffusion.output import output_tensor


def is_unet2d(model: object) -> bool:
    """Whether this is a `UNet2DModel` of diffusers."""
    return any(
        base.__name__ == "UNet2DModel" and base.__module__.startswith("diffusers.")
        for base in type(model).__mro__
    )


def is_pipeline(model: object) -> bool:
    """Whether this is a pipeline of diffusers around a `UNet2DModel`."""
    return is_unet2d(getattr(model, "unet", None)) and hasattr(model, "scheduler")


def unwrapped(model: Any) -> Any:
    """The network inside `torch.compile`, DataParallel, DistributedDataParallel and AveragedModel."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)):
            model = model.module
        elif type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


class UNet2DNetwork(nn.Module):
    """A `UNet2DModel` called as this package calls networks: (x, t, y, low_res) -> tensor."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, low_res: Tensor | None = None
    ) -> Tensor:
        """x [N, C, H, W], timesteps [N], labels y [N] -> [N, C or 2C, H, W]."""
        kwargs = {} if low_res is None else {"low_res": low_res}
        return output_tensor("sample", self.unet(x, timesteps, class_labels=y, **kwargs))

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of its images, if its configuration has them."""
        config: Any = self.unet.config
        size = config.sample_size
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        channels = config.in_channels // (2 if getattr(config, "super_resolution", False) else 1)
        return (channels, height, width)

"""A pipeline of diffusers for the paper's networks: labels, guidance and super-resolution."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iddpm_ext.files import write_whole
from iddpm_ext.interop.diffusers_api import (
    DDPMPipeline,
    ImagePipelineOutput,
    randn_tensor,
)

# The file that diffusers runs for `custom_pipeline="pipeline"` in a saved folder.
_CUSTOM = b"# For labels and guidance.\nfrom iddpm_ext import IDDPMPipeline\n"


class IDDPMPipeline(DDPMPipeline):
    """`DDPMPipeline` with class labels, classifier-free guidance and low-resolution input.

    x_t is float32 even if the network is in half precision.

    Saved folders have the stock `DDPMPipeline` as their class, so that `DiffusionPipeline.from_pretrained`
    opens them; with `custom_pipeline="pipeline", trust_remote_code=True` it opens them as this class.

    Args:
        unet: a `UNet2DModel` or `IDDPMUNet2DModel`.
        scheduler: an `IDDPMScheduler` or another scheduler of diffusers.
    """

    def to_json_string(self) -> str:
        """The configuration as JSON, with the stock class that diffusers finds by its name."""
        config = json.loads(super().to_json_string())
        return json.dumps({**config, "_class_name": DDPMPipeline.__name__}, indent=2) + "\n"

    def save_config(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Writes model_index.json, and pipeline.py for `custom_pipeline`."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_whole(Path(save_directory) / "pipeline.py", _CUSTOM)
        super().save_config(save_directory, push_to_hub, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        class_labels: Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        low_res: Tensor | None = None,
        callback: Callable[[int, Tensor], Any] | None = None,
    ) -> Any:
        """Draws images.

        Args:
            batch_size: how many; the number of labels or of low_res images, if given.
            generator: of all noise.
            num_inference_steps: as in the scheduler's `set_timesteps`.
            output_type: "pil", "np" or "pt".
            return_dict: False for a tuple.
            class_labels: integers [N]; -1 for an unlabelled image of an `IDDPMUNet2DModel`.
            guidance_scale: s of classifier-free guidance, eps = eps_none + s (eps_label - eps_none);
                needs an `IDDPMUNet2DModel` that was trained with unlabelled images too.
            low_res: floating [N, C, h, w] in [-1, 1], for a super-resolution network.
            callback: called with the step's number and x_{t-1} after each step.

        Returns:
            an `ImagePipelineOutput`, or its images in a tuple.

        Raises:
            ValueError: lengths differ, or there is guidance without labels.
        """
        device = self._execution_device
        labels = class_labels
        if labels is not None:
            given = labels if isinstance(labels, Tensor) else torch.from_numpy(np.asarray(labels))
            labels = given.to(device)
        for name, value in (("class_labels", labels), ("low_res", low_res)):
            if value is not None and batch_size not in (1, len(value)):
                raise ValueError(
                    f"IDDPMPipeline: batch_size must be the length of {name}, {len(value)}, "
                    f"got {batch_size}"
                )
            batch_size = batch_size if value is None else len(value)
        guided = guidance_scale != 1.0
        if guided and (labels is None or not hasattr(self.unet.config, "super_resolution")):
            raise ValueError(
                "IDDPMPipeline: guidance_scale must be 1 without class_labels or for a network that "
                f"is no IDDPMUNet2DModel, got {guidance_scale}"
            )
        kwargs: dict[str, Any] = {} if low_res is None else {"low_res": low_res.to(device)}
        size, channels = self.unet.config.sample_size, self.unet.config.in_channels
        height, width = (size, size) if isinstance(size, int) else size
        channels //= 1 if low_res is None else 2
        x = randn_tensor((batch_size, channels, height, width), generator, device, torch.float32)
        x = x * self.scheduler.init_noise_sigma
        self.scheduler.set_timesteps(num_inference_steps, device=None)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            seen = self.scheduler.scale_model_input(x, t).to(self.unet.dtype)
            out = self.unet(seen, t, class_labels=labels, **kwargs).sample
            if guided and labels is not None:
                nobody = torch.full_like(labels, -1)
                unlabelled = self.unet(seen, t, class_labels=nobody, **kwargs).sample
                predicted = unlabelled[:, :channels].lerp(out[:, :channels], guidance_scale)
                out = torch.cat([predicted, out[:, channels:]], dim=1)
            x = self.scheduler.step(out, t, x, generator=generator).prev_sample
            if callback is not None:
                callback(i, x)
        image: Any = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            image = image.cpu().permute(0, 2, 3, 1).numpy()
            image = self.numpy_to_pil(image) if output_type == "pil" else image
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)

"""Whether a class-conditional network was also trained on unlabelled images."""

from __future__ import annotations

import warnings

from iddpm_ext.networks.foreign import unwrapped
from iddpm_ext.networks.unet import UNet


def warn_if_never_unlabelled(model: object, who: str) -> None:
    """Warns if `model` was trained on labelled images alone, so that it cannot be guided.

    That is known from this package's checkpoints (`extra["label_dropout"]` of 0) and for OpenAI's, whose code
    has no label dropout; not for other networks. who: the function that the warning names.
    """
    model = unwrapped(model)
    if not isinstance(model, UNet) or model.config.num_classes is None:
        return
    known = 0 if "openai" in model.extra else None
    if model.extra.get("label_dropout", known) == 0:
        warnings.warn(
            f"{who}: guidance_scale must be 1 for images as the network learned them: it was trained without "
            "label_dropout, and half of the guidance comes from unlabelled images that it never saw",
            stacklevel=5,
        )

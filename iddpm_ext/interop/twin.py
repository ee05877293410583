"""A `UNet` with the weights of a `UNet2DModel`, for the CPU engine, which runs only the former."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from iddpm_ext.engines.structure import has_global_hooks, why_hooked
from iddpm_ext.engines.weights import content_of
from iddpm_ext.networks.unet import UNet

_ATTRIBUTE = "_iddpm_twin"


class _Kept:
    """The twin and what identifies its weights. Not part of copies and pickles of the network."""

    def __init__(self, signature: object = None, model: UNet | None = None) -> None:
        self.signature, self.model = signature, model

    def __deepcopy__(self, memo: object) -> _Kept:
        return _Kept()

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return (_Kept, ())


def twin(unet: nn.Module) -> UNet | None:
    """A UNet with the present weights of a `UNet2DModel`, or None if there is none.

    None for networks that are not on the CPU or not float32, that are not like the paper's, or that were
    changed, by hooks, adapters or other processors. It is cached with the network until a weight changes.
    """
    parameters = list(unet.parameters())
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in parameters):
        return None
    if _is_changed(unet):
        return None
    signature = content_of(parameters)
    kept: _Kept = unet.__dict__.get(_ATTRIBUTE, _Kept())
    if kept.signature != signature:
        # Replaced by a new object, so that other threads never see an incomplete one.
        kept = unet.__dict__[_ATTRIBUTE] = _Kept(signature, _converted(unet))
    return kept.model


def _converted(unet: Any) -> UNet | None:
    from iddpm_ext.interop.convert import from_diffusers

    try:
        return from_diffusers(unet)
    except ValueError:
        return None


def _is_changed(unet: nn.Module) -> bool:
    """Whether the network computes something else than its configuration and tensors describe."""
    from iddpm_ext.interop.diffusers_api import AttnProcessor, AttnProcessor2_0, UNet2DModel
    from iddpm_ext.interop.diffusers_blocks import QKVAttentionProcessor
    from iddpm_ext.interop.unet2d import IDDPMUNet2DModel

    if type(unet) not in (UNet2DModel, IDDPMUNet2DModel):
        return True
    processors = (AttnProcessor, AttnProcessor2_0, QKVAttentionProcessor)
    for module in unet.modules():
        library = type(module).__module__.partition(".")[0]
        own = type(getattr(module, "processor", None)) not in (*processors, type(None))
        if library not in ("torch", "diffusers", "iddpm_ext") or own or why_hooked(module):
            return True
    return has_global_hooks()

"""A `UNet` as a `UNet2DModel` of diffusers, and back: an exact bijection of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from iddpm_ext.diffusion import Diffusion
from iddpm_ext.interop import mapping
from iddpm_ext.interop.library import UNet2DModel
from iddpm_ext.interop.unet2d import IDDPMUNet2DModel
from iddpm_ext.unet import UNet
from iddpm_ext.unet_config import UNetConfig


def to_diffusers(model: UNet, *, stock: bool | None = None) -> Any:
    """The network as a `UNet2DModel`, with copies of the weights, in evaluation mode.

    Args:
        model: a UNet; its diffusion process is another object there, an `IDDPMScheduler`.
        stock: True for the stock class; False for `IDDPMUNet2DModel`, which can do more (several
            widths of a head, the label -1, super-resolution); None for the stock class where it
            computes the same on every input.

    Returns:
        the same function up to rounding: `unet(x, t, class_labels=y).sample` is `model(x, t, y)`.

    Raises:
        ValueError: the class asked for has no such network.
    """
    if not isinstance(model, UNet):
        raise TypeError(f"to_diffusers: model must be a UNet, got {type(model).__name__}")
    use_stock = mapping.is_stock(model.config) if stock is None else stock
    arguments = mapping.unet2d_arguments(model.config, stock=use_stock)
    with torch.device("meta"):
        unet = (UNet2DModel if use_stock else IDDPMUNet2DModel)(**arguments)
    unet.load_state_dict(tensors_to_diffusers(model.state_dict(), model.config), assign=True)
    return unet.eval().requires_grad_(True)


def from_diffusers(unet: Any, *, diffusion: Diffusion | None = None) -> UNet:
    """A `UNet` that computes what a `UNet2DModel` does, with copies of its weights.

    Args:
        unet: a `UNet2DModel` or `IDDPMUNet2DModel` of the paper's kind: sinusoids of the time
            without a shift, 32 groups, eps 1e-5, SiLU.
        diffusion: the process it was trained for, `scheduler.diffusion` of an `IDDPMScheduler`.

    Returns:
        a UNet in evaluation mode, its `diffusion` set.

    Raises:
        ValueError: no UNet computes the same, with everything in which they differ.
    """
    if not isinstance(unet, UNet2DModel):
        raise TypeError(f"from_diffusers: unet must be a UNet2DModel, got {type(unet).__name__}")
    config = mapping.config_of_unet2d(unet.config)
    with torch.device("meta"):
        model = UNet(config)
    model.load_state_dict(tensors_from_diffusers(unet.state_dict(), config), assign=True)
    model.diffusion = diffusion
    return model.eval().requires_grad_(True)


def tensors_to_diffusers(ours: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Our state dict under the names and in the shapes of `UNet2DModel`; every tensor a copy."""
    return _translated(ours, config, _split_attention, to_theirs=True)


def tensors_from_diffusers(theirs: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The inverse of `tensors_to_diffusers`."""
    return _translated(theirs, config, _join_attention, to_theirs=False)


def _translated(
    source: Mapping[str, Tensor],
    config: UNetConfig,
    attention: Callable[[Mapping[str, Tensor], mapping.Block, str], dict[str, Tensor]],
    *,
    to_theirs: bool,
) -> dict[str, Tensor]:
    order = mapping.option(config, "attention_order", "legacy")
    result: dict[str, Tensor] = {}
    for block in mapping.blocks(config):
        pairs = {"": ""}
        if block.kind == "res":
            pairs = {f".{a}": f".{b}" for a, b in mapping.RES_BLOCK.items()}
        elif block.kind == "attention":
            pairs = {".norm": ".group_norm"}
            result |= attention(source, block, order)
        for ours, theirs in pairs.items():
            names = (block.ours + ours, block.theirs + theirs)
            old, new = names if to_theirs else names[::-1]
            for suffix in (".weight", ".bias"):
                if old + suffix in source:
                    result[new + suffix] = source[old + suffix].detach().clone()
    return result


def _split_attention(
    ours: Mapping[str, Tensor], block: mapping.Block, order: str
) -> dict[str, Tensor]:
    """qkv and proj_out of ours as the four linear layers of theirs."""
    result: dict[str, Tensor] = {}
    for suffix in (".weight", ".bias"):
        qkv = ours[f"{block.ours}.qkv{suffix}"].detach()
        rows = qkv.reshape(len(qkv), *qkv.shape[1:2])
        parts = (
            rows.view(block.heads, 3, -1, *rows.shape[1:]).transpose(0, 1).flatten(1, 2)
            if order == "legacy"
            else rows.view(3, -1, *rows.shape[1:])
        )
        for name, part in zip(("to_q", "to_k", "to_v"), parts, strict=True):
            result[f"{block.theirs}.{name}{suffix}"] = part.clone()
        out = ours[f"{block.ours}.proj_out{suffix}"].detach()
        result[f"{block.theirs}.to_out.0{suffix}"] = out.reshape(len(out), *out.shape[1:2]).clone()
    return result


def _join_attention(
    theirs: Mapping[str, Tensor], block: mapping.Block, order: str
) -> dict[str, Tensor]:
    """The inverse of `_split_attention`."""
    result: dict[str, Tensor] = {}
    for suffix, tail in ((".weight", (1,)), (".bias", ())):
        parts = [
            theirs[f"{block.theirs}.{name}{suffix}"].detach() for name in ("to_q", "to_k", "to_v")
        ]
        if order == "legacy":
            parts = [part.view(block.heads, -1, *part.shape[1:]) for part in parts]
            qkv = torch.stack(parts, dim=1).flatten(0, 2)
        else:
            qkv = torch.cat(parts)
        result[f"{block.ours}.qkv{suffix}"] = qkv.reshape(*qkv.shape, *tail)
        out = theirs[f"{block.theirs}.to_out.0{suffix}"].detach()
        result[f"{block.ours}.proj_out{suffix}"] = out.reshape(*out.shape, *tail).clone()
    return result

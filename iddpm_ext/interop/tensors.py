"""Converts the tensors of a `UNet` to the names and shapes of `UNet2DModel`, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from iddpm_ext.interop import mapping
from iddpm_ext.networks.config import UNetConfig
from iddpm_ext.networks.unet import UNet


def tensors_to_diffusers(ours: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The state dict of a UNet with the names and shapes of `UNet2DModel`; every tensor is a copy."""
    return _translated(ours, config, _split_attention, to_theirs=True)


def tensors_from_diffusers(theirs: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The inverse of `tensors_to_diffusers`. Raises ValueError where a tensor is missing or unknown."""
    expected = _expected(config)
    missing, unknown = sorted(expected - set(theirs)), sorted(set(theirs) - expected)
    if missing or unknown:
        raise ValueError(
            "from_diffusers: unet must have the tensors of its configuration, got "
            f"{len(missing)} missing {missing[:4]} and {len(unknown)} unknown {unknown[:4]}"
        )
    return _translated(theirs, config, _join_attention, to_theirs=False)


def _expected(config: UNetConfig) -> set[str]:
    """The names in the state dict of the corresponding UNet2DModel."""
    with torch.device("meta"):
        return set(tensors_to_diffusers(UNet(config).state_dict(), config))


def _translated(
    source: Mapping[str, Tensor],
    config: UNetConfig,
    attention: Callable[[Mapping[str, Tensor], mapping.Block, str], dict[str, Tensor]],
    *,
    to_theirs: bool,
) -> dict[str, Tensor]:
    order = config.attention_order
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
    """qkv and proj_out of a UNet as the four linear layers of a UNet2DModel."""
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

"""A network with another last convolution, which shares all other layers with it."""

from __future__ import annotations

import threading
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from iddpm_ext.networks.blocks import Conv3x3
from iddpm_ext.networks.unet import UNet

_lock = threading.Lock()
_kept: WeakKeyDictionary[UNet, dict[int, UNet]] = WeakKeyDictionary()


def last_convolution(model: UNet, channels: int) -> tuple[Tensor, Tensor]:
    """Its first `channels` outputs' weight [channels, width, 3, 3] and bias [channels], in float32."""
    last = model.out[2]
    assert isinstance(last, Conv3x3) and last.bias is not None
    return last.weight.detach()[:channels].float(), last.bias.detach()[:channels].float()


def with_last_convolution(model: UNet, weight: Tensor, bias: Tensor) -> UNet:
    """`model` with the last convolution `weight` [K, width, 3, 3], `bias` [K], and so K channels of output.

    All other layers are the model's own, those that it has now. Later calls with as many channels return
    the same network, so that engines find what they made of it. It has no diffusion process.
    """
    with _lock:
        networks = _kept.setdefault(model, {})
        network = networks.get(len(weight))
        if network is None:
            with torch.device("meta"):
                network = UNet(replace(model.config, out_channels=len(weight)))
            networks[len(weight)] = network.eval()
        for name, layer in model.named_children():
            if name != "out":
                network._modules[name] = layer
        normalise, between, last = model.out
        own = network.out[2]
        assert isinstance(own, Conv3x3) and isinstance(last, Conv3x3)
        network.out = nn.Sequential(normalise, between, own)
        network._backend, own.backend = model._backend, last.backend
        for name, value in (("weight", weight), ("bias", bias)):
            wanted = value.detach().to(last.weight.device, last.weight.dtype)
            had = getattr(own, name)
            if had.device != wanted.device or had.dtype != wanted.dtype:
                setattr(own, name, nn.Parameter(wanted.clone(), requires_grad=False))
            elif not torch.equal(had, wanted):
                had.data.copy_(wanted)
        return network

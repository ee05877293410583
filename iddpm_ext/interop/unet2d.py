"""`UNet2DModel` of diffusers, extended for the paper's networks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iddpm_ext.interop.diffusers_api import Attention, UNet2DModel, UNet2DOutput, register_to_config


def _with_arguments_of(parent: type) -> Callable[[Any], Any]:
    """Adds the parent's arguments to the signature of an __init__, by which diffusers saves and reads."""

    def decorate(init: Any) -> Any:
        own = inspect.signature(init).parameters.values()
        theirs = list(inspect.signature(parent.__init__).parameters.values())  # type: ignore[misc]
        added = [p for p in own if p.kind is p.KEYWORD_ONLY]
        init.__signature__ = inspect.Signature(theirs + added)
        return init

    return decorate


class UnlabelledEmbedding(nn.Embedding):
    """An embedding that is zero for the label -1, of unlabelled images."""

    def forward(self, input: Tensor) -> Tensor:
        """input int64 [N] -> [N, dim]."""
        return super().forward(input.clamp(min=0)) * (input >= 0)[:, None]


class IDDPMUNet2DModel(UNet2DModel):
    """A `UNet2DModel` with a fixed number of heads, unlabelled images and low-resolution input.

    The stock class has one width of a head for all levels. OpenAI's ImageNet-64 networks have four heads at
    each of two widths; the stock class would load their tensors and compute something else.

    Args:
        num_attention_heads: heads of every attention block, instead of `attention_head_dim`.
        num_attention_heads_up: those of the decoder (None: the same).
        super_resolution: the network takes `low_res`, upsampled and concatenated to its input;
            in_channels counts both.
        The others are those of `UNet2DModel`.
    """

    class_embedding: Any

    @register_to_config
    @_with_arguments_of(UNet2DModel)
    def __init__(
        self,
        *args: Any,
        num_attention_heads: int | None = None,
        num_attention_heads_up: int | None = None,
        super_resolution: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        embedding = self.class_embedding
        if isinstance(embedding, nn.Embedding):
            self.class_embedding = UnlabelledEmbedding(
                embedding.num_embeddings, embedding.embedding_dim
            )
        if num_attention_heads is not None:
            heads_up = num_attention_heads_up or num_attention_heads
            for name, module in self.named_modules():
                if isinstance(module, Attention):
                    up = name.startswith("up_blocks.")
                    _set_heads(module, heads_up if up else num_attention_heads)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        low_res: Tensor | None = None,
    ) -> UNet2DOutput | tuple[Tensor]:
        """As `UNet2DModel.forward`; labels may be -1; low_res is [N, C, h, w] with super_resolution."""
        if (low_res is not None) != self.config.super_resolution:
            rule = "given" if self.config.super_resolution else "None"
            raise ValueError(
                f"IDDPMUNet2DModel: low_res must be {rule}, as the network has "
                f"super_resolution={self.config.super_resolution}"
            )
        if low_res is not None:
            up = F.interpolate(low_res.to(sample.dtype), sample.shape[2:], mode="bilinear")
            sample = torch.cat([sample, up], dim=1)
        return super().forward(sample, timestep, class_labels, return_dict)


def _set_heads(attention: Attention, heads: int) -> None:
    width = attention.to_q.out_features
    if width % heads:
        raise ValueError(
            f"IDDPMUNet2DModel: num_attention_heads must divide the {width} channels of every "
            f"attention block, got {heads}"
        )
    attention.heads = attention.sliceable_head_dim = heads
    attention.scale = (width // heads) ** -0.5


# Where diffusers looks the class up; see `iddpm_ext.__getattr__`.
IDDPMUNet2DModel.__module__ = "iddpm_ext"

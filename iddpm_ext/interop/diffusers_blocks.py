"""The blocks of diffusers on this package's operators, for `accelerate`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn

from iddpm_ext.interop.diffusers_api import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    ResnetBlock2D,
    UNet2DModel,
)
from iddpm_ext.interop.swapping import (
    Acceleration,
    fuse_pair,
    linear_of,
    normalise,
    why_not,
)
from iddpm_ext.ops import qkv_attention


class FusedResnetBlock2D(ResnetBlock2D):
    """`ResnetBlock2D` with its normalisations, the embedding and the SiLUs in one pass each."""

    def forward(
        self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """input_tensor [N, C, H, W], temb [N, D] -> [N, K, H, W]."""
        hidden = normalise(self.norm1, input_tensor)
        for resample in (self.upsample, self.downsample):
            if resample is not None:
                input_tensor, hidden = resample(input_tensor), resample(hidden)
        hidden = self.conv1(hidden)
        options: dict[str, Tensor] = {}
        if self.time_emb_proj is not None and temb is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            if self.time_embedding_norm == "scale_shift":
                options["scale"], options["shift"] = temb.chunk(2, dim=1)
            else:
                options["channel_bias"] = temb
        elif self.time_embedding_norm == "scale_shift":
            raise ValueError(
                "ResnetBlock2D: temb must be given where it scales and shifts, got None"
            )
        hidden = self.conv2(self.dropout(normalise(self.norm2, hidden, **options)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        output = input_tensor + hidden
        return output if self.output_scale_factor == 1.0 else output / self.output_scale_factor


class QKVAttentionProcessor:
    """Self-attention over a feature map by `ops.qkv_attention`; q, k and v in one product.

    before: the processor for calls that this one does not support, with a mask or another sequence.
    """

    def __init__(self, before: Any) -> None:
        self.before = before

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [N, C, H, W] -> the same shape."""
        if hidden_states.dim() != 4 or not (encoder_hidden_states is attention_mask is None):
            return self.before(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        h = normalise(attn.group_norm, hidden_states, silu=False)
        tokens = h.flatten(2).transpose(1, 2)
        qkv = linear_of([attn.to_q, attn.to_k, attn.to_v], tokens)
        mixed = qkv_attention(qkv.transpose(1, 2), attn.heads, order="new")
        out = attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2)))
        out = out.transpose(1, 2).unflatten(2, hidden_states.shape[2:]) + hidden_states
        return out if attn.rescale_output_factor == 1.0 else out / attn.rescale_output_factor


def accelerate(model: nn.Module, done: Acceleration, *, attention: bool) -> None:
    """Replaces the blocks of diffusers in a model and records in `done` which, or why not."""
    for name, module in model.named_modules():
        if type(module) is ResnetBlock2D:
            if reason := _resnet_obstacle(module):
                done.left.append((name, reason))
            else:
                what = "ResnetBlock2D: GroupNorm, scale-shift and SiLU"
                done.swap(module, FusedResnetBlock2D, name, what)
        elif isinstance(module, Attention):
            if reason := _attention_obstacle(module, attention):
                done.left.append((name, reason))
            else:
                _replace_processor(module, name, done)
        elif type(module) is UNet2DModel or _is_own(module):
            uses = Counter(id(m) for _, m in module.named_modules(remove_duplicate=False))
            out = f"{name}.conv_norm_out".lstrip(".")
            fuse_pair(module.conv_norm_out, module.conv_act, out, done, uses)


def _is_own(module: nn.Module) -> bool:
    from iddpm_ext.interop.unet2d import IDDPMUNet2DModel

    return type(module) is IDDPMUNet2DModel


def _resnet_obstacle(block: Any) -> str | None:
    if type(block.nonlinearity) is not nn.SiLU:
        return "ResnetBlock2D with another activation than SiLU"
    if block.time_embedding_norm not in ("default", "scale_shift"):
        return "ResnetBlock2D with another use of the time embedding"
    for part in (block.norm1, block.norm2, block.nonlinearity, block):
        if reason := why_not(part):
            return reason
    return None


def _attention_obstacle(attn: Any, wanted: bool) -> str | None:
    if not wanted:
        return "Attention (attention=False)"
    plain = (
        not attn.is_cross_attention
        and attn.group_norm is not None
        and attn.spatial_norm is None
        and attn.residual_connection
        and attn.norm_q is None
        and attn.norm_k is None
        and attn.to_q.out_features == attn.to_k.out_features == attn.to_v.out_features
        and attn.scale_qk
    )
    # Other processors mean fused qkv, masks or adapters.
    if not plain or type(attn.processor) not in (AttnProcessor, AttnProcessor2_0):
        return "Attention of another kind than over one feature map"
    for part in (attn.group_norm, attn.to_q, attn.to_k, attn.to_v):
        if reason := why_not(part):
            return reason
    if any(type(layer) is not nn.Linear for layer in (attn.to_q, attn.to_k, attn.to_v)):
        return "Attention with projections of another class than Linear"
    return None


def _replace_processor(attn: Any, name: str, done: Acceleration) -> None:
    before = attn.processor
    attn.processor = QKVAttentionProcessor(before)
    done.on_undo(lambda: setattr(attn, "processor", before))
    done.replaced.append((name, "Attention: GroupNorm, q, k, v in one product, qkv_attention"))

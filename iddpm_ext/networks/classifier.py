"""The classifier of noisy images of guided diffusion (Dhariwal & Nichol 2021).

It is the U-Net's encoder and a pooling, with the state-dict keys of openai/guided-diffusion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from iddpm_ext.networks import plain
from iddpm_ext.networks.config import NUM_GROUPS, JsonConfig, UNetConfig
from iddpm_ext.networks.unet import GroupNormSiLU, encoder_of, time_embed_of, timestep_embedding
from iddpm_ext.scalars import make_fields_plain
from iddpm_ext.sizes import ImageSize

if TYPE_CHECKING:
    from iddpm_ext.diffusion import Diffusion

POOLS = ("attention", "adaptive", "spatial", "spatial_v2")
_SPATIAL_WIDTH = 2048


@dataclass(frozen=True)
class ClassifierConfig(JsonConfig):
    """What determines the tensors of a `Classifier` and what it computes. Raises as `UNetConfig`.

    num_classes: logits per image. pool: how features become logits: "attention" over the positions of
    the last map, "adaptive" (their mean), "spatial" and "spatial_v2" (the means of every block's map).
    All else is as in `UNetConfig`; the defaults are those of the released 64x64 classifier.
    """

    image_size: ImageSize = 64
    in_channels: int = 3
    model_channels: int = 128
    num_classes: int = 1000
    num_res_blocks: int = 2
    channel_mult: tuple[int | float, ...] = (1, 2, 3, 4)
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    num_heads: int = 1
    num_head_channels: int | None = 64
    dropout: float = 0.0
    use_scale_shift_norm: bool = True
    conv_resample: bool = True
    resblock_updown: bool = True
    attention_order: str = "legacy"
    pool: str = "attention"

    def __post_init__(self) -> None:
        make_fields_plain(self)
        if self.pool not in POOLS:
            raise ValueError(
                f"ClassifierConfig: pool must be one of {', '.join(POOLS)}, got {self.pool!r}"
            )
        encoder = self.encoder()
        for name in ("image_size", "channel_mult", "attention_resolutions"):
            object.__setattr__(self, name, getattr(encoder, name))
        if self.pool == "attention" and self.num_head_channels is None:
            raise ValueError(
                "ClassifierConfig: num_head_channels must be given for pool 'attention', got None"
            )

    def encoder(self) -> UNetConfig:
        """The configuration of the U-Net whose encoder this is."""
        values = {k: v for k, v in vars(self).items() if k != "pool"}
        return UNetConfig(**values, out_channels=self.in_channels)


class AttentionPool(nn.Module):
    """Attention from the mean of a feature map to its positions: [N, C, h, w] -> [N, out_channels]."""

    def __init__(self, positions: int, channels: int, head_channels: int, out_channels: int):
        super().__init__()
        self.num_heads = channels // head_channels
        # The defaults of PyTorch, which the other layers follow as well.
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        embedding = torch.randn(channels, positions + 1, dtype=dtype, device=device)
        self.positional_embedding = nn.Parameter(embedding / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The logits: the output at the position of the mean."""
        h = x.flatten(2)
        h = torch.cat([h.mean(dim=2, keepdim=True), h], dim=2)
        h = self.qkv_proj(h + self.positional_embedding.to(h.dtype))
        return self.c_proj(plain.qkv_attention(h, self.num_heads, "new")[:, :, :1])[:, :, 0]


class Classifier(nn.Module):
    """Class logits of noisy images, p(y | x_t) before the softmax.

    config: a `ClassifierConfig`. The state dict has the keys and shapes of openai/guided-diffusion.
    `diffusion` is the process whose noisy images it was trained on, None if unknown;
    `extra` holds JSON-ready facts that travel in the checkpoint.
    Source: Dhariwal & Nichol 2021, section 4.
    """

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        if not isinstance(config, ClassifierConfig):
            raise TypeError(
                f"Classifier: config must be a ClassifierConfig, got {type(config).__name__}"
            )
        self.config = config
        self.diffusion: Diffusion | None = None
        self.extra: dict[str, Any] = {}
        encoder = config.encoder()
        self.time_embed = time_embed_of(encoder)
        self.input_blocks, self.middle_block, widths = encoder_of(encoder)
        self.out = _head(config, widths)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """x [N, C, H, W] floating, timesteps [N] -> logits [N, num_classes] in the dtype of x.

        timesteps: as for the U-Net. pool "attention" needs H = W = image_size.
        Differentiable in x and weights. Raises ValueError or TypeError.
        """
        self._require_inputs(x, timesteps)
        weights = self.input_blocks[0].get_parameter("0.weight").dtype
        emb = timestep_embedding(
            timesteps.to(torch.promote_types(weights, torch.float32)), self.config.model_channels
        )
        emb = self.time_embed(emb.to(weights))
        h, spatial = x.to(weights), self.config.pool.startswith("spatial")
        means = []
        for block in (*self.input_blocks, self.middle_block):
            h = block(h, emb)
            if spatial:
                means.append(h.mean(dim=(2, 3)))
        return self.out(torch.cat(means, dim=1) if spatial else h).to(x.dtype)

    def _require_inputs(self, x: Tensor, timesteps: Tensor) -> None:
        c = self.config
        for name, value in (("x", x), ("timesteps", timesteps)):
            if not isinstance(value, Tensor):
                raise TypeError(f"Classifier: {name} must be a tensor, got {type(value).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"Classifier: x must be floating point, got {x.dtype}")
        if x.dim() != 4 or x.shape[1] != c.in_channels:
            raise ValueError(
                f"Classifier: x must be [N, {c.in_channels}, H, W], got {list(x.shape)}"
            )
        n, _, height, width = x.shape
        multiple = c.encoder().size_multiple
        if min(height, width) < 1 or height % multiple or width % multiple:
            raise ValueError(
                f"Classifier: x must have a height and a width that are multiples of {multiple}, "
                f"got {height}x{width}"
            )
        expected = c.encoder().size
        if c.pool == "attention" and (height, width) != expected:
            raise ValueError(
                f"Classifier: x must be {expected[0]}x{expected[1]} for pool 'attention', "
                f"got {height}x{width}"
            )
        if timesteps.shape != (n,):
            raise ValueError(f"Classifier: timesteps must be [{n}], got {list(timesteps.shape)}")


def _head(c: ClassifierConfig, widths: list[int]) -> nn.Sequential:
    """The layers from features to logits, numbered as in the checkpoints."""
    width = widths[-1]
    if c.pool == "attention":
        assert c.num_head_channels is not None
        encoder = c.encoder()
        positions = math.prod(side // encoder.size_multiple for side in encoder.size)
        pool = AttentionPool(positions, width, c.num_head_channels, c.num_classes)
        return nn.Sequential(GroupNormSiLU(width), nn.Identity(), pool)
    if c.pool == "adaptive":
        logits = nn.Conv2d(width, c.num_classes, 1)
        for parameter in logits.parameters():
            nn.init.zeros_(parameter)
        return nn.Sequential(
            GroupNormSiLU(width), nn.Identity(), nn.AdaptiveAvgPool2d(1), logits, nn.Flatten()
        )
    features = sum(widths) + width
    first, last = nn.Linear(features, _SPATIAL_WIDTH), nn.Linear(_SPATIAL_WIDTH, c.num_classes)
    if c.pool == "spatial":
        return nn.Sequential(first, nn.ReLU(), last)
    return nn.Sequential(first, nn.GroupNorm(NUM_GROUPS, _SPATIAL_WIDTH), nn.SiLU(), last)

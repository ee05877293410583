"""The U-Net of Improved DDPM, with the state-dict keys and shapes of OpenAI's checkpoints.

Attribute names such as `input_blocks` are the checkpoints' keys and therefore fixed; its blocks are in
`blocks`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import iddpm_ext
from iddpm_ext.networks.blocks import (
    AttentionBlock,
    Block,
    Conv3x3,
    Downsample,
    GroupNormSiLU,
    ResBlock,
    Upsample,
    backend_of,
    encoder_of,
    is_bare,
    is_transformed,
    res_block_of,
    time_embed_of,
    timestep_embedding,
    trains_on_cpu,
    zeroed,
)
from iddpm_ext.networks.config import UNetConfig
from iddpm_ext.ops import REGISTRY, spec
from iddpm_ext.ops.rows import no_autocast

if TYPE_CHECKING:
    from iddpm_ext.diffusion import Diffusion

__all__ = [
    "BACKENDS",
    "AttentionBlock",
    "Block",
    "Conv3x3",
    "Downsample",
    "GroupNormSiLU",
    "ResBlock",
    "UNet",
    "UNetConfig",
    "Upsample",
    "encoder_of",
    "res_block_of",
    "time_embed_of",
    "timestep_embedding",
    "upsample_to",
]

BACKENDS = ("auto", "plain", *spec.BACKENDS)


class UNet(nn.Module):
    """The network of Improved DDPM (Nichol & Dhariwal 2021, appendix A).

    config: a `UNetConfig`. The state dict has the keys and shapes of openai/improved-diffusion, and
        with its options those of openai/guided-diffusion.
    Attributes that do not change the results: `gradient_checkpointing` (False) recomputes each block in
    the backward pass instead of keeping its activations; `backend` ("auto") is that of the ops. On the CPU,
    where gradients are recorded, "auto" and "cpu" compute 3x3 convolutions by `ops.conv3x3`.
    `extra` holds JSON-ready facts that travel in the checkpoint, such as step schedules.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        if not isinstance(config, UNetConfig):
            raise TypeError(f"UNet: config must be a UNetConfig, got {type(config).__name__}")
        self.config = config
        self.gradient_checkpointing = False
        self._backend = "auto"
        self._diffusion: Diffusion | None = None
        self.extra: dict[str, Any] = {}

        c = config
        self.time_embed = time_embed_of(c)
        if c.num_classes is not None:
            self.label_emb = nn.Embedding(c.num_classes, 4 * c.model_channels)

        self.input_blocks, self.middle_block, skip_widths = encoder_of(c)
        width = skip_widths[-1]

        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(c.channel_mult))):
            for i in range(c.num_res_blocks + 1):
                layers: list[nn.Module] = [
                    res_block_of(c, width + skip_widths.pop(), c.channels(level))
                ]
                width = c.channels(level)
                if c.has_attention(level):
                    layers.append(AttentionBlock(width, c.heads(width, up=True), c.attention_order))
                if level and i == c.num_res_blocks:
                    layers.append(
                        res_block_of(c, width, width, "up")
                        if c.resblock_updown
                        else Upsample(width, c.conv_resample)
                    )
                self.output_blocks.append(Block(*layers))

        self.out = nn.Sequential(
            GroupNormSiLU(width),
            nn.Identity(),
            zeroed(Conv3x3(width, c.out_channels)),
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the convolutions' weights, and so of the activations."""
        return self._first_weight().dtype

    def _first_weight(self) -> Tensor:
        # `torch.func.functional_call` puts a plain tensor there, a parametrization a property.
        weight = getattr(self.input_blocks[0][0], "weight", None)  # type: ignore[index]
        return weight if isinstance(weight, Tensor) else next(self.input_blocks.parameters())

    @property
    def diffusion(self) -> Diffusion | None:
        """The diffusion process that this network was trained for; it travels in the checkpoint."""
        return self._diffusion

    @diffusion.setter
    def diffusion(self, value: Diffusion | None) -> None:
        if value is not None:
            _require_channels_for(self.config, value.variance)
        self._diffusion = value

    @property
    def backend(self) -> str:
        """The backend of the network's operators.

        "plain" uses PyTorch's own functions without registered operators, which exports need. Operators
        without a kernel of that backend (attention has none in Triton) use "auto".
        """
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        if value not in BACKENDS:
            raise ValueError(f"UNet: backend must be one of {', '.join(BACKENDS)}, got {value!r}")
        self._backend = value
        for module in self.modules():
            if isinstance(module, (GroupNormSiLU, Conv3x3, ResBlock)):
                module.backend = value
            elif isinstance(module, AttentionBlock):
                supported = value in ("plain", *REGISTRY["qkv_attention"].kernels)
                module.backend = value if supported else "auto"

    # As people know them from other libraries. They are functions of the rooms above, so they go by the
    # package's public names.

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the network into a folder, with a card: `iddpm_ext.checkpoint.save_pretrained`."""
        iddpm_ext.checkpoint.save_pretrained(self, folder)

    def push_to_hub(self, repository: str, **how: Any) -> str:
        """Publishes the network on the Hugging Face hub: `iddpm_ext.checkpoint.push_to_hub`."""
        return iddpm_ext.checkpoint.push_to_hub(self, repository, **how)

    @staticmethod
    def from_pretrained(name: str | os.PathLike[str], **how: Any) -> UNet:
        """The network of a folder, or of a repository of the hub: `iddpm_ext.checkpoint.from_pretrained`."""
        return iddpm_ext.checkpoint.from_pretrained(name, **how)

    def forward(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, low_res: Tensor | None = None
    ) -> Tensor:
        """The network's output for noisy images.

        x: [N, C, H, W] floating point, H and W multiples of 2^(levels - 1).
        timesteps: [N], indices in the training chain, rescaled by the caller where that applies.
        y: [N] int64 labels of a class-conditional network, -1 for an unlabelled image. Their range
            is checked on the CPU only: reading them elsewhere would wait for the device.
        low_res: [N, C, h, w] of a super-resolution network.
        Returns [N, out_channels, H, W] in the dtype of x. Differentiable in x, low_res and weights.
        Raises ValueError or TypeError.
        """
        self._require_inputs(x, timesteps, y, low_res)
        emb = self.embed(timesteps, y)
        h = x if low_res is None else torch.cat([x, upsample_to(low_res, x)], dim=1)
        h, emb = h.to(self.dtype), emb.to(self.dtype)
        trains = trains_on_cpu(h, self._first_weight(), backend_of(self._backend))
        if trains:
            h = h.contiguous(memory_format=torch.channels_last)  # the layout of convolutions
        # bfloat16 does not resolve the noise of the first steps on pixels near -1 or 1, so the first and
        # last convolution, and with them the residual stream, are exempt from autocast.
        with no_autocast(x.device.type):
            h = self._run(self.input_blocks[0], h, emb)
        skips = [h]
        for block in self.input_blocks[1:]:
            h = self._run(block, h, emb)
            skips.append(h)
        h = self._run(self.middle_block, h, emb)
        for block in self.output_blocks:
            h = self._run(block, torch.cat([h, skips.pop()], dim=1), emb)
        with no_autocast(x.device.type):
            h = self.out(h.to(self.dtype)).to(x.dtype)
        return h.contiguous() if trains and x.is_contiguous() else h

    def _run(self, block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, h, emb, use_reentrant=False)
        return block(h, emb)

    def embed(self, timesteps: Tensor, y: Tensor | None) -> Tensor:
        """The embedding [N, 4 model_channels] of timesteps and labels (see `forward`), at least float32."""
        # bfloat16 cannot tell step 3999 from step 4000, so this path is at least float32.
        work = torch.promote_types(self.dtype, torch.float32)
        with no_autocast(timesteps.device.type):
            h = timestep_embedding(timesteps.to(work), self.config.model_channels)
            h = F.silu(_linear(self.time_embed[0], h))
            h = _linear(self.time_embed[2], h)
            if y is not None:
                h = h + self.label_emb(y.clamp(min=0)).to(work) * (y >= 0)[:, None]
        return h

    def _require_inputs(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None, low_res: Tensor | None
    ) -> None:
        c = self.config
        for name, value in (("x", x), ("timesteps", timesteps), ("y", y), ("low_res", low_res)):
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"UNet: {name} must be a tensor, got {type(value).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"UNet: x must be floating point, got {x.dtype}")
        if x.dim() != 4 or x.shape[1] != c.in_channels:
            raise ValueError(f"UNet: x must be [N, {c.in_channels}, H, W], got {list(x.shape)}")
        n, _, height, width = x.shape
        if min(height, width) < 1 or height % c.size_multiple or width % c.size_multiple:
            raise ValueError(
                f"UNet: x must have a height and a width that are multiples of {c.size_multiple}, "
                f"as its {len(c.channel_mult)} levels need, got {height}x{width}"
            )
        if timesteps.shape != (n,):
            raise ValueError(f"UNet: timesteps must be [{n}], got {list(timesteps.shape)}")
        _require_presence("y", y, c.num_classes is not None, f"num_classes={c.num_classes}")
        if y is not None and c.num_classes is not None:
            _require_labels(y, n, c.num_classes)
        flag = f"super_resolution={c.super_resolution}"
        _require_presence("low_res", low_res, c.super_resolution, flag)
        if low_res is not None and (low_res.dim() != 4 or low_res.shape[:2] != x.shape[:2]):
            raise ValueError(
                f"UNet: low_res must be [{n}, {c.in_channels}, h, w], got {list(low_res.shape)}"
            )


def _linear(layer: nn.Module, h: Tensor) -> Tensor:
    """The linear layer, in the dtype of h."""
    if is_bare(layer, nn.Linear):
        return F.linear(h, layer.weight.to(h.dtype), layer.bias.to(h.dtype))
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return layer(h.to(weight.dtype)).to(h.dtype)
    return layer(h)


def _require_presence(name: str, value: Tensor | None, wanted: bool, because: str) -> None:
    if (value is not None) != wanted:
        rule = "given" if wanted else "None"
        got = "None" if value is None else f"shape {list(value.shape)}"
        raise ValueError(f"UNet: {name} must be {rule}, as the network has {because}, got {got}")


def _require_channels_for(config: UNetConfig, variance: str) -> None:
    learned = variance.startswith("learned")
    allowed = [2 * config.in_channels] if learned else [config.in_channels, 2 * config.in_channels]
    if config.out_channels not in allowed:
        raise ValueError(
            f"UNet: diffusion must have a variance that fits out_channels={config.out_channels} "
            f"(in_channels={config.in_channels}), got variance={variance!r}, which needs {allowed}"
        )


def _require_labels(y: Tensor, n: int, num_classes: int) -> None:
    if y.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"UNet: y must be int64, got {y.dtype}")
    if y.shape != (n,):
        raise ValueError(f"UNet: y must be [{n}], got {list(y.shape)}")
    tracing = torch.compiler.is_compiling() or is_transformed()
    if y.device.type == "cpu" and n and not tracing:
        low, high = (int(v) for v in y.aminmax())
        if low < -1 or high >= num_classes:
            raise ValueError(f"UNet: y must lie in [-1, {num_classes - 1}], got {low} .. {high}")


def upsample_to(low_res: Tensor, x: Tensor) -> Tensor:
    """low_res [N, C, h, w] -> [N, C, H, W] bilinearly, in the dtype of x [N, C, H, W]."""
    return F.interpolate(low_res.to(x.dtype), x.shape[2:], mode="bilinear")


#: The classes' own methods, to find out later whether they were replaced.
FORWARDS = {
    kind: kind.forward
    for kind in (
        UNet, Block, ResBlock, AttentionBlock, Upsample, Downsample, Conv3x3, GroupNormSiLU, nn.Conv2d,
        nn.Conv1d, nn.Linear, nn.Embedding, nn.SiLU, nn.Identity, nn.Dropout, nn.Sequential, nn.AvgPool2d,
    )
}  # fmt: skip

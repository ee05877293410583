"""Swaps the classes of modules for accelerated subclasses, and back.

A module keeps its parameters, buffers, name and place; only its class changes. So state dicts, optimizers,
copies and pickles are not affected, and undoing it restores the class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iddpm_ext.ops import conv3x3, group_norm_silu


def normalise(norm: nn.GroupNorm, x: Tensor, **options: Any) -> Tensor:
    """`group_norm_silu` with a GroupNorm's settings, for x [N, C, ...] of any rank above 2."""
    images = x if x.dim() == 4 else x.flatten(2).unsqueeze(-1)
    y = group_norm_silu(
        images, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, **options
    )  # fmt: skip
    return y.view(x.shape)


class FusedGroupNormSiLU(nn.GroupNorm):
    """A GroupNorm that applies the SiLU behind it as well."""

    def forward(self, input: Tensor) -> Tensor:
        """input [N, C, ...]."""
        return normalise(self, input)


class PassedSiLU(nn.SiLU):
    """A SiLU that the module before it has applied already."""

    def forward(self, input: Tensor) -> Tensor:
        """The input."""
        return input


class FastConv3x3(nn.Conv2d):
    """A 3x3 convolution in channels_last on the CPU: `ops.conv3x3` where gradients are recorded."""

    def forward(self, input: Tensor) -> Tensor:
        """input [N, C, H, W]."""
        if input.device.type != "cpu" or input.dim() != 4:
            return super().forward(input)
        # From the first convolution on, the features stay channels_last.
        input = input.contiguous(memory_format=torch.channels_last)
        trains = torch.is_grad_enabled() and (self.weight.requires_grad or input.requires_grad)
        if trains and input.dtype in (torch.float32, torch.bfloat16):
            return conv3x3(input, self.weight, self.bias)
        return super().forward(input)


@dataclass
class Acceleration:
    """The changes of `accelerate` to a model, and how to undo them.

    replaced: (module's name, operator) of every module that runs on this package's operators now.
    left: (module's name, reason) of every module that was not replaced.
    As a context manager it undoes itself at the end.
    """

    replaced: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    _undo: list[Callable[[], object]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Restores every module's class. Calling it again does nothing."""
        while self._undo:
            self._undo.pop()()

    def swap(self, module: nn.Module, kind: type[nn.Module], name: str, what: str) -> None:
        """Changes the class of `module` to `kind`, a subclass of it with the same attributes."""
        old = type(module)
        assert issubclass(kind, old), f"{kind} is no {old}"
        module.__class__ = kind
        self._undo.append(lambda: setattr(module, "__class__", old))
        if what:
            self.replaced.append((name, what))

    def on_undo(self, restore: Callable[[], object]) -> None:
        """Adds a function for `undo` to call."""
        self._undo.append(restore)

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        def lines(entries: list[tuple[str, str]]) -> Iterator[str]:
            for what, count in Counter(what for _, what in entries).items():
                example = next(name for name, other in entries if other == what)
                yield f"  {count} x {what} ({example}{', ...' if count > 1 else ''})"

        if not self.replaced and not self.left:
            return "accelerate: found nothing to replace"
        text = [f"accelerate: {len(self.replaced)} replaced", *lines(self.replaced)]
        return "\n".join(
            text + ([f"{len(self.left)} left", *lines(self.left)] if self.left else [])
        )


def fuse_pair(
    norm: nn.Module, act: nn.Module, name: str, done: Acceleration, uses: Counter[int]
) -> None:
    """Fuses a GroupNorm and the SiLU that is called on its result and on nothing else."""
    if type(norm) is not nn.GroupNorm or type(act) is not nn.SiLU:
        return
    if uses[id(norm)] > 1 or uses[id(act)] > 1:
        done.left.append((name, "GroupNorm and SiLU, one of which is used elsewhere too"))
    elif reason := why_not(norm) or why_not(act):
        done.left.append((name, reason))
    else:
        done.swap(norm, FusedGroupNormSiLU, name, "GroupNorm and SiLU")
        done.swap(act, PassedSiLU, "", "")


def why_not(module: nn.Module) -> str | None:
    """Why a module's forward may not be skipped, or None."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "a module with hooks"
    if "forward" in module.__dict__:
        return "a module with a forward of its own"
    if isinstance(module, nn.GroupNorm) and not module.affine:
        return "GroupNorm without weights"
    return None


def linear_of(layers: list[nn.Linear], x: Tensor) -> Tensor:
    """Several linear layers on the same input in one product, their outputs side by side."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers]) if layers[0].bias is not None else None
    return F.linear(x, weight, bias)

"""`accelerate`: runs networks of other libraries on this package's operators."""

from __future__ import annotations

import itertools
import sys
from collections import Counter

from torch import nn

from iddpm_ext.interop.swapping import Acceleration, FastConv3x3, fuse_pair

__all__ = ["Acceleration", "accelerate"]


def accelerate(
    model: nn.Module, *, attention: bool = True, convolutions: bool = True
) -> Acceleration:
    """Runs a foreign network on this package's operators, which changes its results by rounding only.

    In networks of diffusers: the residual blocks' GroupNorm, scale-shift and SiLU in one pass each,
    and self-attention. In any network: a GroupNorm directly before a SiLU in an `nn.Sequential`, and
    on the CPU 3x3 convolutions, which run in channels_last and, where gradients are recorded, by
    `ops.conv3x3`. Only modules of exactly these classes, without hooks, are changed. Works in training and
    inference, on every device; the output may be channels_last.

    Args:
        model: changed in place.
        attention: whether to replace self-attention.
        convolutions: whether to replace 3x3 convolutions.

    Returns:
        an `Acceleration`: print it, `undo()` it, or use it in a `with` statement.

    Raises:
        TypeError: model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be an nn.Module, got {type(model).__name__}")
    done = Acceleration()
    uses = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    if "diffusers" in sys.modules:
        from iddpm_ext.interop import diffusers_blocks

        diffusers_blocks.accelerate(model, done, attention=attention)
    for name, module in list(model.named_modules()):
        if type(module).forward is nn.Sequential.forward:
            children = list(module.named_children())
            for (first, norm), (_, act) in itertools.pairwise(children):
                fuse_pair(norm, act, f"{name}.{first}".lstrip("."), done, uses)
        if convolutions and type(module) is nn.Conv2d and _is_3x3(module):
            done.swap(module, FastConv3x3, name, "3x3 convolution in channels_last")
    _note_the_rest(model, done)
    return done


def _is_3x3(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding in (1, (1, 1))
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and "forward" not in conv.__dict__
    )


def _note_the_rest(model: nn.Module, done: Acceleration) -> None:
    known = {name for name, _ in [*done.replaced, *done.left]}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in known)
        if type(module) is nn.GroupNorm and name not in known and not inside:
            done.left.append((name, "GroupNorm whose user is not known"))

"""The output of networks, of this package and of diffusers, as a tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def output_tensor(owner: str, output: Any) -> Tensor:
    """A network's output as a tensor: itself, or the attribute `sample` of an output of diffusers.

    Raises TypeError for anything else, in the name of the function `owner`.
    """
    tensor = getattr(output, "sample", output)
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{owner}: model must return a tensor or an output with .sample, "
            f"got {type(output).__name__}"
        )
    return tensor

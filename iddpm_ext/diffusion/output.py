"""What networks return, whoever wrote them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def output_tensor(owner: str, output: Any) -> Tensor:
    """What a network returned as a tensor: itself, or the `sample` of an output of diffusers.

    Raises TypeError for anything else, with the function `owner` in its text.
    """
    tensor = getattr(output, "sample", output)
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{owner}: model must return a tensor or an output with .sample, "
            f"got {type(output).__name__}"
        )
    return tensor

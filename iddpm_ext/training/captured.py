"""Forward and backward pass of a training step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from iddpm_ext.engines.cuda.graphs import CaptureFailed, Graphs

from .config import TrainConfig


def supports_device(device: torch.device) -> bool:
    """Whether graphs and the fused network are of use on this kind of device."""
    return device.type == "cuda"


def why_not_fused(config: TrainConfig, device: torch.device) -> str | None:
    """None if the run trains by `fused.FusedTraining`, else the reason."""
    if not supports_device(device):
        return f"the device is {device}"
    for name in ("compile", "fsdp", "gradient_checkpointing", "plain", "classifier"):
        if getattr(config, name):
            return f"{name} is on"
    return None


def why_not_captured(config: TrainConfig, device: torch.device) -> str | None:
    """None if forward and backward pass are one graph, else the reason."""
    if not config.cuda_graph:
        return "cuda_graph is off"
    reason = why_not_fused(config, device)
    if reason is None and config.accumulate > 1:
        return f"accumulate is {config.accumulate}"
    return reason


class Inputs(NamedTuple):
    """What a step computes with: x_0 [N, C, H, W]; positions, t and labels int64 [N]; weight [N];
    low_res [N, C, h, w] of a super-resolution network."""

    x_0: Tensor
    positions: Tensor
    t: Tensor
    weight: Tensor
    labels: Tensor | None
    low_res: Tensor | None = None


Pass = Callable[[Inputs], dict[str, Tensor]]


class CapturedPass:
    """Does what `run` does, by replaying it: the losses of some images and the parameters' gradients.

    The gradients are written anew each time, not added to, into the same memory. The losses are
    overwritten by the next call.
    """

    def __init__(self, run: Pass, parameters: Iterable[Tensor], graphs: Graphs):
        self._run, self._graphs = run, graphs
        self._parameters = list(parameters)
        self._replay: Callable[[], None] | None = None
        self._inputs: Inputs | None = None
        self._gradients: list[Tensor | None] = []
        self._losses: dict[str, Tensor] = {}

    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        """Inputs of the same shapes at every call. Raises RuntimeError where it cannot be captured."""
        replay = self._replay or self._captured(inputs)
        assert self._inputs is not None
        self._graphs.follow()
        for place, value in zip(self._inputs, inputs, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._losses

    def _captured(self, inputs: Inputs) -> Callable[[], None]:
        self._inputs = Inputs(*(None if value is None else value.clone() for value in inputs))  # type: ignore[arg-type]
        try:
            self._replay = self._graphs.capture(self._work)
        except CaptureFailed as reason:
            raise RuntimeError(
                "train: cuda_graph must be off (--no-cuda-graph), as a step cannot be captured "
                f"here: {reason}"
            ) from reason
        return self._replay

    def _work(self) -> None:
        assert self._inputs is not None
        for parameter in self._parameters:
            parameter.grad = None  # a new one is written, an old one would be added to
        self._losses = self._run(self._inputs)
        self._gradients = [parameter.grad for parameter in self._parameters]

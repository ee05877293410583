"""The forward and backward pass of a training step as one CUDA graph."""

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
    """None if the run can train by `fused.FusedTraining`, else the reason."""
    if not supports_device(device):
        return f"the device is {device}"
    for name in ("compile", "fsdp", "gradient_checkpointing", "plain", "classifier"):
        if getattr(config, name):
            return f"{name} is on"
    return None


def why_not_captured(config: TrainConfig, device: torch.device) -> str | None:
    """None if forward and backward pass can be captured as a graph, else the reason."""
    if not config.cuda_graph:
        return "cuda_graph is off"
    reason = why_not_fused(config, device)
    if reason is None and config.accumulate > 1:
        return f"accumulate is {config.accumulate}"
    return reason


class Inputs(NamedTuple):
    """The inputs of a step.

    x_0 [N, C, H, W]; positions, t and labels int64 [N]; weight [N]; low_res [N, C, h, w] for a
    super-resolution network.
    """

    x_0: Tensor
    positions: Tensor
    t: Tensor
    weight: Tensor
    labels: Tensor | None
    low_res: Tensor | None = None


Pass = Callable[[Inputs], dict[str, Tensor]]


class CapturedPass:
    """Replays `run` as a graph: it computes the losses of some images and the parameters' gradients.

    Each call overwrites the gradients (it does not accumulate) and the losses of the previous one.
    """

    def __init__(self, run: Pass, parameters: Iterable[Tensor], graphs: Graphs):
        self._run, self._graphs = run, graphs
        self._parameters = list(parameters)
        self._replay: Callable[[], None] | None = None
        self._inputs: Inputs | None = None
        self._gradients: list[Tensor | None] = []
        self._losses: dict[str, Tensor] = {}

    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        """The losses; inputs must have the same shapes in all calls. RuntimeError if capture fails."""
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
            parameter.grad = None  # otherwise backward would accumulate
        self._losses = self._run(self._inputs)
        self._gradients = [parameter.grad for parameter in self._parameters]

"""Forward and backward pass of a training step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from iddpm_ext.engines.cuda.graphs import CaptureFailed, Graphs


class Inputs(NamedTuple):
    """What a step computes with: x_0 [N, C, H, W]; positions, t and labels int64 [N]; weight [N]."""

    x_0: Tensor
    positions: Tensor
    t: Tensor
    weight: Tensor
    labels: Tensor | None


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
                f"train: cuda_graph must be off, as a step cannot be captured here: {reason}"
            ) from reason
        return self._replay

    def _work(self) -> None:
        assert self._inputs is not None
        for parameter in self._parameters:
            parameter.grad = None  # a new one is written, an old one would be added to
        self._losses = self._run(self._inputs)
        self._gradients = [parameter.grad for parameter in self._parameters]

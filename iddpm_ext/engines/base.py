"""What the engines of every device share: the refusal, changed weights, and labels."""

from __future__ import annotations

from torch import Tensor, nn


class NotServed(ValueError):
    """The engine cannot run this network here; the message says why."""


class WeightsWatch:
    """Notices that a model's weights were written to or replaced."""

    def __init__(self, model: nn.Module):
        self._parameters = list(model.parameters())  # walking the modules takes long
        self._seen = self._state()

    def _state(self) -> list[int]:
        state = [p.data_ptr() for p in self._parameters]
        return state + [0 if p.is_inference() else p._version for p in self._parameters]

    def changed(self) -> bool:
        """Whether anything has changed since the last call."""
        state = self._state()
        same, self._seen = state == self._seen, state
        return not same


def require_labels(
    where: str, classes: int | None, labels: Tensor | None, n: int | None = None
) -> None:
    """Labels [n], or [N] of any length, from -1 to classes - 1; None for an unconditional network."""
    if (labels is None) != (classes is None):
        rule = "None" if classes is None else f"given, as the network has {classes} classes"
        got = "None" if labels is None else list(labels.shape)
        raise ValueError(f"{where}: labels must be {rule}, got {got}")
    if labels is None or classes is None:
        return
    if labels.dim() != 1 or (n is not None and len(labels) != n):
        raise ValueError(
            f"{where}: labels must be [{'N' if n is None else n}], got {list(labels.shape)}"
        )
    if len(labels) and not (-1 <= int(labels.min()) and int(labels.max()) < classes):
        raise ValueError(
            f"{where}: labels must lie in [-1, {classes - 1}], "
            f"got {int(labels.min())} .. {int(labels.max())}"
        )

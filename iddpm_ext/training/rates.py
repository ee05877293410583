"""Learning rate and EMA decay as functions of the step."""

from __future__ import annotations


def learning_rate(step: int, *, peak: float, warmup: int, decay_to: int | None) -> float:
    """The rate of optimiser step `step`, counted from 0.

    Rises linearly to `peak` over `warmup` steps. With `decay_to`, the planned number of steps, it is
    multiplied by the fraction of steps that remain.
    """
    rate = peak * min(1.0, (step + 1) / warmup) if warmup else peak
    return rate if decay_to is None else rate * max(0.0, 1.0 - step / decay_to)


def ema_decay(updates: int, decay: float, *, warmup: bool = True) -> float:
    """The decay of an average's next update, after n = `updates` of them.

    With warm-up it is min(decay, (1 + n) / (10 + n)), so that the average forgets the random initial weights
    earlier than after 1 / (1 - decay) steps.
    """
    return min(decay, (1 + updates) / (10 + updates)) if warmup else decay

"""Times variants side by side, so that what disturbs one of them disturbs all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

CLOCKS: dict[str, Callable[[], float]] = {
    "process CPU time": time.process_time,
    "wall time": time.perf_counter,
}


def interleave(
    variants: dict[str, Callable[[], Any]], *, rounds: int, clock: str, seconds: float = 0.02
) -> dict[str, list[float]]:
    """Milliseconds a call: in every round each variant runs for at least `seconds`."""
    read = CLOCKS[clock]
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    for _ in range(rounds):
        for name, call in variants.items():
            start, calls = read(), 0
            while calls == 0 or read() - start < seconds:
                call()
                calls += 1
            times[name].append((read() - start) / calls * 1e3)
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    low, middle, high = (
        statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    )
    return {"median_ms": middle, "q25_ms": low, "q75_ms": high}

"""Times variants interleaved, so that disturbances affect all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

CLOCKS: dict[str, Callable[[], float]] = {
    "process CPU time": time.process_time,
    "wall time": time.perf_counter,
}


def interleave(
    variants: dict[str, Callable[[], Any]], *, rounds: int, clock: str, seconds: float = 0.02
) -> dict[str, list[float]]:
    """Milliseconds per call: in every round each variant runs for at least `seconds`."""
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


def interleave_graphs(
    variants: dict[str, Callable[[], Any]], *, rounds: int, calls: int, milliseconds: float = 2.0
) -> dict[str, list[float]]:
    """Milliseconds per call on the GPU: replays of a CUDA graph of at least `calls` calls each.

    Graphs exclude the host's time for launches; a replay lasts at least `milliseconds`.
    """
    graphs = {name: _captured(call, calls, milliseconds) for name, call in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (graph, count) in graphs.items():
            times[name].append(_replay_ms(graph) / count)
    return times


def interleave_on_device(
    variants: dict[str, Callable[[], Any]],
    *,
    device: str,
    rounds: int,
    milliseconds: float = 20.0,
    warm_ups: int = 3,
) -> dict[str, list[float]]:
    """Milliseconds per call by CUDA events, including the host's time between calls.

    In every round each variant is called for about `milliseconds`, between two CUDA events; on the CPU,
    between two readings of the wall clock.
    """
    counts: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for name, call in variants.items():
        for _ in range(warm_ups):
            call()
        alone = _span_ms(call, 1, device)
        counts[name] = max(1, math.ceil(milliseconds / max(alone, 1e-3)))
    for _ in range(rounds):
        for name, call in variants.items():
            times[name].append(_span_ms(call, counts[name], device) / counts[name])
    return times


def _span_ms(call: Callable[[], Any], count: int, device: str) -> float:
    if device == "cpu":
        began = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - began) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _captured(
    call: Callable[[], Any], calls: int, milliseconds: float
) -> tuple[torch.cuda.CUDAGraph, int]:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):  # warm up: compilation, allocation, tuning
            call()
    side.synchronize()
    graph, count = _capture(call, calls), calls
    alone = _replay_ms(graph) / calls
    if alone * calls < milliseconds:
        count = calls * math.ceil(milliseconds / max(alone * calls, 1e-3))
        graph = _capture(call, count)
    return graph, count


def _capture(call: Callable[[], Any], count: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def summary(times: list[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    low, middle, high = (
        statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    )
    return {"median_ms": middle, "q25_ms": low, "q75_ms": high}


def spread(times: list[float]) -> dict[str, float]:
    """Median, and the tenth and ninetieth percentile, in milliseconds."""
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return {"median_ms": statistics.median(times), "p10_ms": tenths[0], "p90_ms": tenths[-1]}

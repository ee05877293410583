"""Calls of `vlb_to_all` for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from iddpm_ext.ops import random_calls, synthetic
from iddpm_ext.ops.spec import BadCase, Case

_LAST = synthetic.NUM_TIMESTEPS - 1
# Ordinary steps, the decoder, and two decoders with the step that follows them in the schedule.
_TARGETS = (0, 1, 20, _LAST - 1, _LAST, -1, -1 - 25, -1 - _LAST)


def _call(
    shape: tuple[int, int, int, int],
    device: str,
    dtype: torch.dtype,
    targets: tuple[int, ...] = _TARGETS,
    **change: Any,
) -> dict[str, Any]:
    call = synthetic.bound_call(shape, device, dtype, **change)
    return {**call, "targets": torch.tensor(targets, dtype=torch.int64, device=device)}


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[Case]:
    shape = (4, 3, 8, 6)
    learned = _call(shape, device, dtype)
    yield Case("learned variance", learned)
    yield Case("smaller fixed variance", _call(shape, device, dtype, learned=False))
    large = _call(shape, device, dtype, learned=False)
    # A table of fixed variances, equal to log beta except for its first row.
    large["table"][1:, 4] += 0.5
    yield Case("larger fixed variance", large)
    itself = _call(shape, device, dtype)
    itself["table"][:, 4], itself["table"][:, 5] = 0, 1
    yield Case("variance itself", itself)
    x_prev = _call(shape, device, dtype)
    x_prev["table"][:, 10:13] = torch.tensor([0.5, 0.5, 0.0], device=device, dtype=torch.float32)
    yield Case("previous x predicted", x_prev)
    yield Case("unclipped", {**learned, "clip": False})
    yield Case("a poor model", {**_call(shape, device, dtype, spread=3.0), "clip": False})
    yield Case("exact", {**_call(shape, device, dtype, last=True), "clip": False, "exact": True})
    yield Case("odd sizes", _call((2, 1, 7, 5), device, dtype))
    yield Case("one element", _call((1, 1, 1, 1), device, dtype))
    yield Case("empty batch", _call((0, 3, 8, 8), device, dtype))
    yield Case("no targets", _call(shape, device, dtype, ()))
    yield Case("several tiles", _call((2, 1, 70, 70), device, dtype, (0, 40, -1)))
    for label, layout in synthetic.LAYOUTS.items():
        changed = {k: layout(learned[k]) for k in ("model_output", "x_0", "x_t")}
        yield Case(label, {**learned, **changed})


def bad_inputs(device: str) -> Iterator[BadCase]:
    good = _call((2, 3, 8, 8), device, torch.float32)

    def bad(label: str, error: type[Exception], match: str, **change: Any) -> BadCase:
        return BadCase(label, {**good, **change}, error, match)

    yield from synthetic.bad_bound_calls(bad, good)
    targets = good["targets"]
    yield bad("targets list", TypeError, r"targets must be an int64 tensor \[S\]", targets=[1])
    yield bad("targets float", TypeError, "targets must be int64", targets=targets.float())
    yield bad("targets rank", ValueError, r"targets must be \[S\]", targets=targets[None])
    for value in (_LAST + 1, -2 - _LAST, 2**40):
        far = bad(f"targets {value}", ValueError, f"got {value}", targets=targets * 0 + value)
        yield far._replace(of_values=True)


def property_inputs(draw: random_calls.Draw, device: str, dtype: torch.dtype) -> dict[str, Any]:
    call = random_calls.bound_call(draw, device, dtype)
    targets = [draw.integer(-1 - _LAST, _LAST) for _ in range(draw.integer(0, 4))]
    call["targets"] = torch.tensor(targets, dtype=torch.int64, device=device)
    return {**call, **{name: draw.choice((False, True)) for name in ("clip", "exact")}}


def benchmark_inputs(device: str) -> Iterator[Case]:
    every = tuple(range(-1, synthetic.NUM_TIMESTEPS))
    for label, size in (("CIFAR-10", 32), ("ImageNet-64", 64)):
        yield Case(
            f"{label} N=16, 51 targets", _call((16, 3, size, size), device, torch.float32, every)
        )


def minimum_bytes(kwargs: dict[str, Any]) -> int:
    """The images are read once, whatever the number of targets, and every term written."""
    terms = 4 * kwargs["t"].numel() * kwargs["targets"].numel()
    return sum(kwargs[k].nbytes for k in ("model_output", "x_0", "x_t")) + terms

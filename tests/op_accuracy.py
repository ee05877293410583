"""Whether a call of an op is as accurate as PyTorch's own at the same dtype, averaged over noisy runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from op_calls import (
    ERROR_RATIO,
    ROUNDINGS,
    cloned,
    differentiable,
    error,
    gradients,
    to_double,
)
from rounding_noise import RoundingNoise
from torch import Tensor

from iddpm_ext.ops.spec import OpSpec

# If a single run of PyTorch has less than half the error, its error is taken as the root mean square over so
# many runs with noise on every rounding, since a single run can be accurate by chance.
NOISY_RUNS = 8


def assert_as_good_as_pytorch(
    result: Tensor,
    exact: Tensor,
    yardstick: Tensor,
    noisy: Callable[[], list[Tensor]],
    roundings: float,
) -> None:
    """Accurate where PyTorch is finite at the same dtype; not finite where it and float64 give NaN."""
    assert result.shape == exact.shape
    if not exact.is_floating_point():
        assert torch.equal(result, exact)
        return
    lost = exact.isnan() & yardstick.isnan() & ~result.isnan()
    assert not bool(lost.any()), "a NaN was lost"
    judged = exact.isfinite() & yardstick.isfinite()
    overflown = exact.isinf() & yardstick.isinf()
    assert bool((~result.isfinite() | ~overflown).all()), "an infinity was lost"
    result, exact = result[judged], exact[judged]
    assert bool(result.isfinite().all()), "a finite result became infinite or NaN"
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    roundings = roundings if result.dtype == torch.float32 else ROUNDINGS
    distance = error(result, exact)
    if distance <= roundings * torch.finfo(result.dtype).eps * scale:
        return
    if distance <= ERROR_RATIO * error(yardstick[judged], exact):
        return
    runs = [y[judged] for y in noisy()]
    squares = [error(torch.where(y.isfinite(), y, exact), exact) ** 2 for y in runs]
    assert distance <= ERROR_RATIO * (sum(squares) / len(squares)) ** 0.5


def assert_call_is_as_good_as_pytorchs(
    spec: OpSpec, backend: str, call: dict[str, Any], compute: Callable[..., list[Tensor]]
) -> None:
    """`compute` is `run`, or `gradients_of`."""
    exact = compute(spec, "reference", to_double(cloned(call)))
    yardsticks = compute(spec, "reference", cloned(call))
    results = compute(spec, backend, cloned(call))

    fused = spec.in_pytorch()
    pytorchs = [spec] if fused is None else [spec, replace(spec, public=fused)]

    @functools.cache
    def noisy_runs() -> list[list[Tensor]]:
        runs = []
        for seed, own in product(range(NOISY_RUNS), pytorchs):
            with RoundingNoise(seed):
                runs.append(compute(own, "reference", cloned(call)))
        return runs

    def noisy(i: int) -> list[Tensor]:
        return [results_of_run[i] for results_of_run in noisy_runs()]

    for i, (result, target, yardstick) in enumerate(zip(results, exact, yardsticks, strict=True)):
        assert result.dtype == yardstick.dtype
        spread = functools.partial(noisy, i)
        assert_as_good_as_pytorch(result, target, yardstick, spread, spec.roundings)


def gradients_of(spec: OpSpec, backend: str, call: dict[str, Any]) -> list[Tensor]:
    return gradients(spec, backend, differentiable(spec, call))

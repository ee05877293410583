"""The kernels of an op by backend, out of one function that lays its arguments out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from iddpm_ext import _native
from iddpm_ext.ops.arguments import check_launch, stream

#: Results to fill, the compiled launcher's arguments, and what must outlive the launch.
Prepared = tuple[Any, tuple[object, ...], object]


def kernels(
    op: str,
    prepare: Callable[..., Prepared],
    *,
    launcher: str | None = None,
    of_nothing: float = float("nan"),
    backends: Sequence[str] = ("cpu", "cuda", "triton"),
) -> dict[str, Callable[..., Any]]:
    """The kernels of an op, by backend.

    The compiled launchers are `<launcher>_cpu` and `<launcher>_cuda`; Triton's is the function `launcher` of
    the op's module `triton`, which is imported when it is first called.

    Args:
        op: its name, in errors and as the name of its folder.
        prepare: gets the operator's arguments without the backend and returns `Prepared`.
        launcher: the op's name if not given.
        of_nothing: what results are where the first argument has no elements. Nothing is launched then:
            a mean over no pixels is NaN, a sum 0.
        backends: those that there are.
    """
    name = launcher or op

    def cpu(*inputs: Any) -> Any:
        results, arguments, _alive = prepare(*inputs)
        if _something(inputs, results, of_nothing):
            getattr(_native.native(), f"{name}_cpu")(*arguments, torch.get_num_threads())
        return results

    def cuda(*inputs: Any) -> Any:
        results, arguments, _alive = prepare(*inputs)
        if _something(inputs, results, of_nothing):
            with torch.cuda.device(inputs[0].device):
                launch = getattr(_native.native(), f"{name}_cuda")
                check_launch(op, launch(*arguments, stream(inputs[0])))
        return results

    def triton(*inputs: Any) -> Any:
        return getattr(importlib.import_module(f"iddpm_ext.ops.{op}.triton"), name)(*inputs)

    every = {"cpu": cpu, "cuda": cuda, "triton": triton}
    return {backend: every[backend] for backend in backends}


def _something(inputs: tuple[Any, ...], results: Any, of_nothing: float) -> bool:
    """Whether there is something to launch; if not, the results are filled."""
    results = (results,) if isinstance(results, Tensor) else results
    if inputs[0].numel() and results[0].numel():
        return True
    for result in results:
        result.fill_(of_nothing)
    return False

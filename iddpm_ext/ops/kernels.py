"""Builds the kernels of an op for every backend from one function that prepares their arguments."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from iddpm_ext import _native
from iddpm_ext.ops.arguments import check_launch, stream

#: Results to fill, the compiled launcher's arguments, and objects to keep alive during the launch.
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
        op: its name, for errors and as the name of its folder.
        prepare: takes the operator's arguments without the backend and returns `Prepared`.
        launcher: by default the op's name.
        of_nothing: the value of all results if the first argument is empty, when nothing is launched:
            NaN for a mean over no pixels, 0 for a sum.
        backends: those that the op has kernels for.
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
    """Whether the first argument has elements; if not, fills the results with `of_nothing`."""
    results = (results,) if isinstance(results, Tensor) else results
    if inputs[0].numel() and results[0].numel():
        return True
    for result in results:
        result.fill_(of_nothing)
    return False

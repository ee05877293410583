"""The compiled module, or the reason why it is missing."""

from __future__ import annotations

import importlib.util
import warnings
from types import ModuleType
from typing import Any

import torch  # noqa: F401  (first: its OpenMP runtime must be the one that _C binds to)


def _load() -> tuple[ModuleType | None, str | None]:
    if importlib.util.find_spec("iddpm_ext._C") is None:
        return None, (
            "iddpm_ext._C is not built (installed with IDDPM_CPP=0, or a source tree that "
            "`make build` has not seen)"
        )
    try:
        from iddpm_ext import _C
    except ImportError as error:
        reason = f"iddpm_ext._C does not load: {error}"
        warnings.warn(reason, RuntimeWarning, stacklevel=2)
        return None, reason
    return _C, None


_module, _absence = _load()


def cpu_absence() -> str | None:
    """None if the C++ kernels can run, else the reason."""
    return _absence


def cuda_absence() -> str | None:
    """None if the CUDA kernels were built and a device can run them, else the reason."""
    if _module is None:
        return _absence
    cuda = _module.build_info()["cuda"]
    if not cuda["built"]:
        return f"the CUDA kernels were not built: {cuda['reason']}"
    if cuda["devices"]:
        return None
    return f"no CUDA device ({_device_trouble(cuda)})"


def _device_trouble(cuda: dict[str, Any]) -> str:
    driver, runtime = cuda["driver_version"], cuda["runtime_version"]
    if driver == 0:
        return "no NVIDIA driver is installed"
    if driver // 1000 < runtime // 1000:
        return (
            f"the driver is too old for a CUDA {runtime // 1000} build: rebuild with a "
            f"{driver // 1000}.x toolkit (CUDA_HOME=...)"
        )
    return cuda["error"] or "none is visible"


def native() -> Any:
    """The compiled module ``iddpm_ext._C``; raises RuntimeError with the reason if absent."""
    if _module is None:
        raise RuntimeError(_absence)
    return _module

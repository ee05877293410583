"""What is installed, what was built and why, and which backend each op takes on this machine."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import iddpm_ext
from iddpm_ext import _native
from iddpm_ext.engines.cpu.algorithms import load_chooser
from iddpm_ext.ops.spec import PREFERENCE, REGISTRY, resolve_backend, unavailable

_PACKAGES = ("triton", "numpy", "pillow", "safetensors", "tqdm", "tyro")


def report() -> str:
    """The text that ``iddpm info`` prints: versions, the build's decisions, backends and reasons."""
    rows = [*_versions(), *_cpu_build(), *_cuda_build(), *_devices()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    return "\n".join([*lines, "", *_backends()])


def _versions() -> Iterator[tuple[str, str]]:
    yield "iddpm_ext", f"{iddpm_ext.__version__} in {Path(iddpm_ext.__file__).parent}"
    yield "python", f"{sys.version.split()[0]} on {platform.system()} {platform.machine()}"
    yield "torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'not in this build'})"
    yield "source", _source()
    yield "packages", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)


def _source() -> str:
    """The commit that the compiled module was built from."""
    if _native.cpu_absence() is not None:
        return "not recorded: there is no compiled module"
    source = _native.native().build_info().get("source", {})
    if not source.get("commit"):
        return f"not recorded: {source.get('reason') or 'built before builds recorded it'}"
    changed = ", with changes" if source["changed"] else ""
    return f"commit {source['commit']}{changed}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_build() -> Iterator[tuple[str, str]]:
    absence = _native.cpu_absence()
    if absence is not None:
        yield "C++ kernels", f"no: {absence}"
        return
    info = _native.native().build_info()
    openmp = "OpenMP" if info["openmp"]["built"] else info["openmp"]["reason"]
    sanitizers = f", sanitizers {info['sanitize']}" if info["sanitize"] else ""
    yield "C++ kernels", f"built with {info['compiler']}, {openmp}{sanitizers}"
    available, compiled = ", ".join(info["isa_available"]), ", ".join(info["isa_compiled"])
    products = " with bfloat16 products" if info.get("bf16") else ""
    yield (
        "instruction set",
        f"{info['isa']}{products} (this CPU runs {available}; compiled: {compiled})",
    )
    if info.get("amx"):
        yield "AMX", f"no: {info['amx']}"
    yield "bfloat16 engine", _bfloat16(info)
    yield "threads", str(torch.get_num_threads())


def _bfloat16(info: dict[str, Any]) -> str:
    """The instructions that the CPU engine uses for bfloat16."""
    if info["isa"] == "amx":
        return "tiles of AMX"
    if not info.get("bf16"):
        return "not on this CPU"
    if load_chooser().rounding_pays:
        return "AVX-512 with bfloat16 products"
    return "AVX-512 with bfloat16 products for large weights; without AMX, float32 is as fast elsewhere"


def _cuda_build() -> Iterator[tuple[str, str]]:
    absence = _native.cuda_absence()
    if _native.cpu_absence() is not None:
        return
    cuda = _native.native().build_info()["cuda"]
    built = f"built for {cuda['archs']} ({cuda['reason']})" if cuda["built"] else "not built"
    yield "CUDA kernels", f"{built}; {'can run' if absence is None else absence}"


def _devices() -> Iterator[tuple[str, str]]:
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        yield f"cuda:{index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory:.0f} GiB"


def _backends() -> Iterator[str]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    width = max(map(len, REGISTRY), default=2)
    for device in devices:
        yield f"{device} tensors (float32) are computed by"
        for name in REGISTRY:
            yield f"  {name:<{width}}  {_choice(name, device)}"
    if "cuda" not in devices:
        yield "cuda tensors cannot be made: torch sees no CUDA device"


def _choice(name: str, device: str) -> str:
    """The backend that "auto" takes, and why those of higher priority do not support the call."""
    chosen = resolve_backend(name, "auto", torch.device(device), torch.float32)
    preferred = PREFERENCE[device][: PREFERENCE[device].index(chosen)]
    passed = [f"{b}: {unavailable(name, b, device, torch.float32)}" for b in preferred]
    return chosen + (f" ({'; '.join(passed)})" if passed else "")

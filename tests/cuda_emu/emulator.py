"""CUDA kernels on the CPU: the extension built against the emulator, and a switch to use it.

`IDDPM_CUDA=emulate` makes setup.py compile `csrc/*/*.cu` with the C++ compiler and `cuda_emu.h`. Inside
`emulated_cuda()` an op called with `backend="cuda"` on CPU tensors runs those kernels, through the same
Python code as on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from cuda_emu.toolchain import BUILD, ROOT

from iddpm_ext import _native
from iddpm_ext.ops import spec


@functools.cache
def module(*folders: str) -> ModuleType:
    """`_C` with emulated CUDA kernels, up to date; raises RuntimeError with the compiler's message.

    folders: those of csrc/ whose kernels are compiled; all of them if none is given. A module without a
    kernel does not have its function.
    """
    sanitize = _native.native().build_info()["sanitize"]
    name = "-".join(["emulated", *(["sanitized"] if sanitize else []), *sorted(folders)])
    target = BUILD / name
    environment = {**os.environ, "IDDPM_CUDA": "emulate", "IDDPM_SANITIZE": sanitize}
    if folders:
        environment["IDDPM_CUDA_ONLY"] = ",".join(folders)
    environment.pop("LD_PRELOAD", None)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(target)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the emulated build failed:\n{done.stdout[-8000:]}")
    library = next((target / "iddpm_ext").glob("_C*.so"))
    found = importlib.util.spec_from_file_location("emulated._C", library)
    assert found is not None and found.loader is not None
    loaded = importlib.util.module_from_spec(found)
    found.loader.exec_module(loaded)
    for header in ROOT.glob("csrc/*/*.h"):
        if folders and header.parent.name not in {"common", *folders}:
            for launcher in re.findall(r"^int (\w+_cuda)\(", header.read_text(), re.MULTILINE):
                delattr(loaded, launcher)
    return loaded


@contextlib.contextmanager
def emulated_cuda(seed: int = 0, folders: Iterable[str] = ()) -> Iterator[None]:
    """A context in which `backend="cuda"` is the emulator.

    seed: draws the order in which warps run. folders: as of `module`.
    """
    stream = SimpleNamespace(cuda_stream=0)
    unavailable = spec.unavailable

    def with_emulator(name: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
        return unavailable(name, backend, "cuda" if backend == "cuda" else device, dtype)

    with (
        mock.patch.object(_native, "_module", module(*folders)),
        mock.patch.object(spec, "unavailable", with_emulator),
        mock.patch.dict(spec._ABSENCE, cuda=None),
        mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "current_stream", lambda device=None: stream),
        mock.patch.dict(os.environ, CUDA_EMU_SEED=str(seed)),
    ):
        yield

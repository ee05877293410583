"""The compiled module on processors older than this one, emulated by qemu's user mode.

With IDDPM_ISA=base on a new processor, misplaced newer instructions would go unnoticed; an emulated old one
kills the process. The emulated Python imports the module alone, since torch would take minutes.
"""

from __future__ import annotations

import base64
import json
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from iddpm_ext import Diffusion, _native
from iddpm_ext.ops import adamw_ema, q_sample
from iddpm_ext.random import STREAM_FORWARD, NoiseKey

QEMU = shutil.which("qemu-x86_64")
pytestmark = [
    pytest.mark.skipif(_native.cpu_absence() is not None, reason="no compiled module"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="this Python is not for x86-64"),
    pytest.mark.skipif(QEMU is None, reason="no qemu-x86_64 (Debian: qemu-user)"),
]
# The processor and the instruction set that the module must choose on it.
CPUS = [("Nehalem", "base"), ("Haswell", "avx2")]

# Imports the module by its path and makes one call: {"at": name} stands for a buffer's address, and
# {"table": [...]} for that of 64-bit integers.
_CHILD = """
import array, base64, importlib.util, json, sys
task = json.load(sys.stdin)
spec = importlib.util.spec_from_file_location("_C", task["module"])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
buffers = {n: array.array("B", base64.b64decode(v)) for n, v in task["buffers"].items()}
tables = []

def real(value):
    if isinstance(value, list):
        return tuple(real(v) for v in value)
    if not isinstance(value, dict):
        return value
    if "at" in value:
        return buffers[value["at"]].buffer_info()[0]
    tables.append(array.array("q", real(value["table"])))
    return tables[-1].buffer_info()[0]

result = getattr(module, task["call"])(*real(task["arguments"]))
after = {n: base64.b64encode(v).decode() for n, v in buffers.items()}
json.dump({"isa": module.build_info()["isa"], "result": result, "buffers": after}, sys.stdout)
"""


def emulate(cpu: str, call: str, buffers: dict[str, np.ndarray], arguments: list[Any]) -> Any:
    """The finished process that made this call on this processor."""
    task = {
        "module": _native.native().__file__, "call": call, "arguments": arguments,
        "buffers": {n: base64.b64encode(v.tobytes()).decode() for n, v in buffers.items()},
    }  # fmt: skip
    assert QEMU is not None
    variables = {k: v for k, v in os.environ.items() if k not in ("IDDPM_ISA", "LD_PRELOAD")}
    command = [QEMU, "-cpu", cpu, sys.executable, "-I", "-S", "-c", _CHILD]
    return subprocess.run(
        command, input=json.dumps(task), capture_output=True, text=True, env=variables, timeout=200
    )


def changed(
    cpu: str, isa: str, call: str, buffers: dict[str, np.ndarray], arguments: list[Any],
    result: int | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The buffers after the call, which must have run on this instruction set with this result."""
    process = emulate(cpu, call, buffers, arguments)
    assert process.returncode == 0, (process.returncode, process.stderr)
    answer = json.loads(process.stdout)
    assert (answer["isa"], answer["result"]) == (isa, result)
    return {
        name: torch.frombuffer(bytearray(base64.b64decode(raw)), dtype=torch.float32)
        for name, raw in answer["buffers"].items()
        if buffers[name].dtype == np.float32
    }


@pytest.mark.parametrize(("cpu", "isa"), CPUS)
def test_an_older_cpu_draws_the_same_noise_and_x_t(cpu, isa):
    n, c, h, w, steps = 3, 3, 5, 7, 50
    x_0 = np.random.default_rng(0).uniform(-1, 1, (n, c, h, w)).astype(np.float32)
    table = Diffusion("cosine", steps).table("cpu")
    t, samples = np.array([0, 20, steps - 1]), np.array([5, 0, 2**33])
    plane = [c * h * w, h * w, 1]
    buffers = {
        "x_0": x_0, "t": t, "samples": samples, "table": table.numpy(), "x_t": np.full_like(x_0, np.nan)
    }  # fmt: skip
    at = {name: {"at": name} for name in buffers}
    arguments = [
        [n, c, h * w, steps], [at["x_0"], *plane], at["t"], at["table"], [0, 0, 0, 0],
        [7, STREAM_FORWARD, at["samples"], at["t"]], [at["x_t"], *plane], 2,
    ]  # fmt: skip
    x_t = changed(cpu, isa, "q_sample_cpu", buffers, arguments)["x_t"].view(n, c, h, w)
    key = NoiseKey(7, STREAM_FORWARD, torch.from_numpy(samples), torch.from_numpy(t))
    wanted = q_sample(torch.from_numpy(x_0), torch.from_numpy(t), table, key, backend="reference")
    torch.testing.assert_close(x_t, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("cpu", "isa"), CPUS)
def test_an_older_cpu_makes_the_same_update(cpu, isa):
    size, decay = 1037, 0.9
    draw = np.random.default_rng(1)
    names = ("param", "grad", "exp_avg", "exp_avg_sq", "ema")
    buffers = {name: draw.standard_normal(size).astype(np.float32) for name in names}
    buffers["exp_avg_sq"] **= 2
    numbers = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    at = {name: {"at": name} for name in names}
    rows = [size, at["param"], at["grad"], at["exp_avg"], at["exp_avg_sq"], 0, at["ema"]]
    arguments = [
        [1, 1], {"table": rows}, [0, 0], [0, 0, 0], [3.0, 1e-3, 0.9, 0.999, 1e-8, 0.01],
        {"at": "decays"}, 2,
    ]  # fmt: skip
    got = changed(cpu, isa, "adamw_ema_cpu", {**buffers, "decays": np.array([decay])}, arguments)
    wanted = {name: torch.from_numpy(values.copy()).double() for name, values in buffers.items()}
    adamw_ema(
        *([wanted[name]] for name in names[:4]), [[wanted["ema"]]],
        step=3, decays=[decay], backend="reference", **numbers,
    )  # fmt: skip
    for name in names:
        torch.testing.assert_close(got[name].double(), wanted[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("cpu", "isa", "result"), [(*CPUS[0], 1), (*CPUS[1], 0)])
def test_an_older_cpu_convolves_alike_or_says_that_it_cannot(cpu, isa, result):
    n, h, w, channels, columns = 2, 5, 7, 16, 32
    draw = np.random.default_rng(2)
    buffers = {
        "x": draw.standard_normal((n, h, w, channels)).astype(np.float32),
        "weight": draw.standard_normal((columns, channels, 3, 3)).astype(np.float32),
        "bias": draw.standard_normal(columns).astype(np.float32),
        "y": np.full((n, h, w, columns), np.nan, np.float32),
    }
    arguments = [
        [n, h, w, channels, columns], 0, [{"at": "x"}, channels],
        [{"at": "weight"}, channels * 9, 9, 3, 1], {"at": "bias"}, [{"at": "y"}, columns], 4, 0, 2,
    ]  # fmt: skip
    y = changed(cpu, isa, "conv3x3_cpu", buffers, arguments, result)["y"].view(n, h, w, columns)
    if result:  # there is no such kernel for this instruction set, and nothing was written
        assert y.isnan().all()
        return
    x, weight, bias = (torch.from_numpy(buffers[k]).double() for k in ("x", "weight", "bias"))
    wanted = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1)
    # F(4 x 4, 3 x 3) in float32 over 16 channels of unit variance: sums of about 12.
    torch.testing.assert_close(y.permute(0, 3, 1, 2).double(), wanted, rtol=0, atol=5e-5)


def test_a_cpu_without_sse_4_2_is_refused_by_name():
    process = emulate("core2duo", "build_info", {}, [])
    assert process.returncode == 1
    assert "ImportError: iddpm_ext._C needs a CPU with SSE4.2" in process.stderr

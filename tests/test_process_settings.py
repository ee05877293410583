"""What the process has set — default dtype and device, autocast, inference mode — changes no result."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import check_tensors
import pytest
import torch
from op_calls import cloned, differentiable, gradients, run, same_bits
from torch import Tensor

from iddpm_ext import random as noise
from iddpm_ext.diffusion import Diffusion
from iddpm_ext.ops.spec import REGISTRY, OpSpec, unavailable


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def flushed_denormals() -> Iterator[None]:
    able = torch.set_flush_denormal(True)
    try:
        yield
    finally:
        assert not able or torch.set_flush_denormal(False)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float16 by default": lambda: default_dtype(torch.float16),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "another device by default": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "deterministic algorithms": deterministic,
    "flushed denormals": flushed_denormals,
}
each_setting = pytest.mark.parametrize("setting", SETTINGS)


def backends(spec: OpSpec) -> list[str]:
    return [b for b in ("reference", "cpu") if not unavailable(spec.name, b, "cpu", torch.float32)]


@each_setting
@pytest.mark.parametrize("spec", REGISTRY.values(), ids=REGISTRY)
def test_ops_and_their_gradients_are_the_same(spec: OpSpec, setting: str):
    for case in list(spec.sample_inputs("cpu", torch.float32))[:4]:
        for backend in backends(spec):
            expected = run(spec, backend, cloned(case.kwargs))
            kwargs = cloned(case.kwargs)
            with SETTINGS[setting]():
                results = run(spec, backend, kwargs)
            assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))
            # PyTorch's own backward passes, of which the reference's is made, follow autocast.
            cast = backend == "reference" and setting == "autocast"
            if not spec.differentiable or setting == "inference mode" or cast:
                continue
            expected = gradients(spec, backend, differentiable(spec, case.kwargs))
            kwargs = differentiable(spec, case.kwargs)
            with SETTINGS[setting]():
                results = gradients(spec, backend, kwargs)
            assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))


def process() -> dict[str, Tensor]:
    """What a diffusion process gives, made anew."""
    diffusion = Diffusion("cosine", 40).respace(20)
    generator = torch.Generator().manual_seed(0)
    shape, cpu = (2, 3, 4, 4), {"dtype": torch.float32, "device": "cpu"}
    x_0, x_t = (torch.randn(shape, generator=generator, **cpu) for _ in range(2))
    out = torch.randn((2, 6, 4, 4), generator=generator, **cpu)
    t = torch.tensor([0, 12], dtype=torch.int64, device="cpu")
    key = noise.NoiseKey(5, noise.STREAM_FORWARD, t, t)
    mean = diffusion.p_mean_variance(out, x_t, t)
    losses = diffusion.training_losses(lambda x, _: out, x_0, t, key)
    return {
        "table": diffusion.table(),
        "ddim": diffusion.table(sampler="ddim", eta=0.5),
        "weights": diffusion.multistep_weights(),
        "timesteps": diffusion.model_timesteps(t),
        "x_t": diffusion.q_sample(x_0, t, key),
        "mean": mean.mean,
        "log_variance": mean.log_variance,
        "x_prev": diffusion.reverse_step(out, x_t, t, key).x_prev,
        "bound": diffusion.vlb_terms_bpd(out, x_0, x_t, t),
        "prior": diffusion.prior_bpd(x_0),
        "linear": Diffusion("linear", 50).betas,
        "integers": noise.integers(key, 1000, (2, 5)),
        "uniform": noise.uniform(key, (2, 5)),
        "words": torch.stack(noise.philox_4x32((1, t, 3, 4), (5, 6))),
        **losses,
    }


@each_setting
def test_a_diffusion_process_is_the_same(setting: str):
    expected = process()
    with SETTINGS[setting]():
        results = process()
    for name, value in results.items():
        assert value.device.type == "cpu"
        assert same_bits(value, expected[name]), name


def test_a_table_made_in_inference_mode_serves_gradients():
    diffusion, x = Diffusion("cosine", 40), torch.randn(1, 3, 4, 4, requires_grad=True)
    with torch.inference_mode():
        diffusion.q_sample(x, torch.tensor([3]), x)
    diffusion.q_sample(x, torch.tensor([3]), x.detach()).sum().backward()
    assert bool(x.grad.any())


def test_the_lint_finds_tensors_without_dtype_or_device(tmp_path: Path):
    source = "\n".join(
        [
            "import torch",
            "a = torch.zeros(3)",
            "b = torch.tensor([1.0], dtype=torch.float32)",
            "c = torch.arange(4, device='cpu')",
            "d = torch.full((2,), 1.0, dtype=torch.float32, device='cpu')",
            "e = torch.zeros_like(d), d.new_empty(3), torch.ones(3, **options)",
            "f = torch.FloatTensor(3)",
        ]
    )
    assert [line for line, _ in check_tensors.findings(source)] == [2, 3, 4, 7]
    (tmp_path / "made.py").write_text(source)
    command = [sys.executable, check_tensors.__file__]
    assert subprocess.run([*command, str(tmp_path)], capture_output=True).returncode == 1
    assert subprocess.run(command, capture_output=True).returncode == 0

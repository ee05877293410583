"""Premises of the training step's speed: freed memory is kept, and the baseline computes the same."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from benchmarks.networks import make_inputs, make_network
from benchmarks.original import Trainer, hybrid_loss, original_network
from iddpm_ext.training import memory

# In a process of its own, without PyTorch: the setting is for good.
FAULTS = """
import importlib.util, resource, sys
spec = importlib.util.spec_from_file_location("memory", sys.argv[1])
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
if sys.argv[2] == "keep":
    assert memory.keep_freed_memory()
def step():
    alive = [bytearray(b"1" * 4096) * 1024 for _ in range(8)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    command = [sys.executable, "-c", FAULTS, str(memory.__file__), how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_freed_memory_is_used_again_without_page_faults():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("not glibc")
    assert page_faults("leave") > 1000  # 32 MiB of pages of 4 KiB are 8192
    assert page_faults("keep") < 100


def test_the_original_formulation_of_the_benchmark_computes_the_same_network_and_loss():
    model = make_network("small").double()
    x_0 = make_inputs(model, 2)[0].double().clamp(-1, 1)
    t, noise = torch.tensor([3, 2500]), torch.randn_like(x_0)
    found = []
    for network in (original_network(model), model):
        network.requires_grad_()
        loss = hybrid_loss(network, model.diffusion, x_0, t, noise)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        found.append((loss.detach(), torch.cat([g.flatten() for g in gradients])))
    for original, ours in zip(*found, strict=True):
        # Its normalisation rounds to float32 by design.
        assert (original - ours).norm() <= 1e-5 * ours.norm()


@pytest.mark.parametrize("best", [False, True])
def test_the_baseline_trains_and_averages(best):
    model = make_network("small")
    x_0 = make_inputs(model, 2)[0].clamp(-1, 1)
    trainer = Trainer(original_network(model).requires_grad_(), model.diffusion, best=best)
    trainer.step(x_0)
    for average, now, before in zip(
        trainer.average, trainer.parameters, model.parameters(), strict=True
    ):
        assert not torch.equal(now, before)
        torch.testing.assert_close(average, 0.9999 * before + 1e-4 * now)

"""Two gloo processes train the same network as one, by DistributedDataParallel and by FSDP2."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from iddpm_ext.training import TrainConfig, train
from iddpm_ext.training.checkpoints import read_state, read_tensors, verify_checkpoint

pytestmark = pytest.mark.slow  # two processes that wait for each other: run by `make soak`

_PROGRAM = """
import sys, json, torch
torch.set_num_threads(1)
from iddpm_ext.training import TrainConfig, train
for line in open(sys.argv[1]):
    train(TrainConfig.from_dict(json.loads(line)))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "d.npz"
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8), np.uint8)
    np.savez(path, images=images, labels=np.arange(10) % 2)
    return str(path)


def _config(data: str, out: Path, **changes) -> TrainConfig:
    base = TrainConfig(
        data=data, out=str(out), steps=4, batch_size=8, model_channels=32, num_res_blocks=1,
        channel_mult=(1,), attention_resolutions=(), diffusion_steps=2, objective="vlb",
        timestep_sampler="loss-second-moment", ema=(0.9,), save_every=2, log_every=1,
        progress=False, device="cpu", class_cond=True, label_dropout=0.2, lr=1e-4,
    )  # fmt: skip
    return replace(base, **changes)


def _launch(configs: list[TrainConfig], folder: Path, size: int = 2) -> list[subprocess.Popen]:
    """Starts `size` processes that run these trainings one after the other, as torchrun would."""
    listing = folder / "configs.jsonl"
    listing.write_text("".join(json.dumps(c.to_dict()) + "\n" for c in configs))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(size):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path), "IDDPM_DIST_TIMEOUT": "30",
        }  # fmt: skip
        command = [sys.executable, "-c", _PROGRAM, str(listing)]
        processes.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        )
    return processes


def _finish(processes: list[subprocess.Popen], timeout: float = 200) -> list[str]:
    outputs = [process.communicate(timeout=timeout)[1] for process in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), outputs
    return outputs


def _losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def _tensors(out: Path, file: str, step: int = 4) -> dict[str, torch.Tensor]:
    return read_tensors(out / "ckpt" / f"step-{step}", file)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> Path:
    """One process; two with DDP; two with FSDP2; DDP with accumulation; one resumed by two."""
    folder = tmp_path_factory.mktemp("runs")
    train(_config(data, folder / "one"))
    train(_config(data, folder / "shared", steps=2))
    configs = [
        _config(data, folder / "ddp"),
        _config(data, folder / "fsdp", fsdp=True),
        _config(data, folder / "parts", accumulate=2),
        _config(data, folder / "shared"),
    ]
    (folder / "errors.txt").write_text("".join(_finish(_launch(configs, folder))))
    return folder


@pytest.mark.parametrize("name", ["ddp", "fsdp", "parts", "shared"])
def test_two_processes_have_the_losses_of_one(runs, name):
    assert _losses(runs / name) == pytest.approx(_losses(runs / "one"), rel=1e-4)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "parts", "shared"])
def test_the_importance_sampler_learns_the_same_on_two_processes(runs, name):
    one, two = (_tensors(runs / n, "timesteps.safetensors") for n in ("one", name))
    assert torch.equal(one["counts"], two["counts"])
    torch.testing.assert_close(one["losses"], two["losses"], rtol=1e-3, atol=1e-5)


def test_sharded_and_replicated_training_agree(runs):
    for file in ("model.safetensors", "ema_0.9.safetensors"):
        ddp, fsdp = (_tensors(runs / name, file) for name in ("ddp", "fsdp"))
        assert ddp.keys() == fsdp.keys()
        # Of the whole network: AdamW makes a full step of any sign of a gradient that is all rounding,
        # as those behind the layers that begin at zero are.
        difference = sum(float((fsdp[name] - value).square().sum()) for name, value in ddp.items())
        assert difference <= 1e-6 * sum(float(value.square().sum()) for value in ddp.values())


def test_resuming_with_more_processes_says_so(runs):
    assert "the run has 2 processes now, 1 before" in (runs / "errors.txt").read_text()
    assert read_state(runs / "shared" / "ckpt" / "step-4")["processes"] == 2


def test_stopping_one_process_stops_and_saves_both(data, tmp_path):
    config = _config(data, tmp_path / "out", steps=100_000, save_every=100_000)
    processes = _launch([config], tmp_path)
    _wait_for_records(tmp_path / "out")
    processes[1].send_signal(signal.SIGTERM)
    _finish(processes)
    (path,) = (tmp_path / "out" / "ckpt").glob("step-*")
    assert verify_checkpoint(path) is None


def test_a_dead_process_does_not_leave_the_other_waiting(data, tmp_path):
    config = _config(data, tmp_path / "out", steps=100_000, save_every=100_000)
    processes = _launch([config], tmp_path)
    _wait_for_records(tmp_path / "out")
    processes[1].kill()
    processes[0].communicate(timeout=60)
    assert processes[0].returncode != 0
    processes[1].communicate()


def test_a_batch_that_cannot_be_shared_is_refused(data, tmp_path):
    processes = _launch([_config(data, tmp_path / "out", batch_size=3)], tmp_path)
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert all(process.returncode == 1 for process in processes)
    assert all(
        "batch_size must be a multiple of accumulate 1 times 2 processes" in e for e in errors
    )


def _wait_for_records(out: Path) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        path = out / "metrics.jsonl"
        if path.exists() and path.stat().st_size:
            return
        time.sleep(0.05)
    pytest.fail("the processes never took a step")

"""A real training process killed with SIGKILL at random moments: it resumes, and ends with the same bits."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from iddpm_ext.checkpoint.runs import read_state, read_tensors, verify_checkpoint
from iddpm_ext.training import newest_checkpoint

_SOAK = bool(os.environ.get("IDDPM_SOAK"))
_KILLS = 200 if _SOAK else 20
# Twenty kills take minutes on a machine with much else to do.
pytestmark = pytest.mark.timeout(7200 if _SOAK else 900)
_STEPS = 36
_SAVE_EVERY = 3

# A parent imports everything and forks a trainer for each line that it is sent, in milliseconds instead of
# the seconds that a new interpreter spends on imports.
_SERVER = """
import os, sys
import torch
torch.set_num_threads(1)
from iddpm_ext.training import TrainConfig, train
from iddpm_ext.training.config import TrainConfig
import iddpm_ext.diffusion, iddpm_ext.networks.unet, iddpm_ext.data
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        out, save_every = line.split()
        train(TrainConfig(
            data=sys.argv[1], out=out, steps=int(sys.argv[2]), batch_size=2, model_channels=32,
            num_res_blocks=1, channel_mult=(1,), attention_resolutions=(), diffusion_steps=4,
            objective="vlb", timestep_sampler="loss-second-moment", dropout=0.1, ema=(0.5, 0.9),
            lr=1e-3, lr_decay=True, save_every=int(save_every), keep=2, log_every=1, sample_every=0,
            progress=False, device="cpu", flip=True,
        ))
        os._exit(0)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class _Server:
    """Starts trainers, tells their process numbers, and waits for them."""

    def __init__(self, data: Path):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(data), str(_STEPS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment,
        )  # fmt: skip
        assert self._line() == "ready"

    def start(self, out: Path, save_every: int) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{out} {save_every}\n")
        self.process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        return int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(120)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "d.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8))
    server = _Server(path)
    yield server
    server.close()


def _digest(path: Path) -> str:
    """A hash of every tensor in a checkpoint and of its counters."""
    digest = hashlib.sha256()
    for file in sorted(p.name for p in path.glob("*.safetensors")):
        for name, tensor in sorted(read_tensors(path, file).items()):
            digest.update(f"{file} {name}".encode() + tensor.contiguous().numpy().tobytes())
    state = read_state(path)
    digest.update(str([state[key] for key in ("step", "images", "updates")]).encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory) -> str:
    """The digest of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    server.start(out, _SAVE_EVERY)
    assert server.wait() == 0
    return _digest(out / "ckpt" / f"step-{_STEPS}")


def _sound_or_absent(folder: Path) -> None:
    """Every checkpoint with a final name is complete, except the oldest, which may be half deleted."""
    found, skipped = newest_checkpoint(folder)
    assert not skipped, skipped
    if found is not None:
        assert torch.isfinite(read_tensors(found, "model.safetensors")["out.2.bias"]).all()


def test_killed_at_random_moments_a_run_ends_with_the_same_bits(server, undisturbed, tmp_path):
    generator = random.Random(0)
    kills, rounds = 0, 0
    while kills < _KILLS * 3 // 4:
        rounds += 1
        out = tmp_path / str(rounds)
        while True:
            before = _records(out)
            child = server.start(out, _SAVE_EVERY)
            # Some steps on, and then somewhere within a step or a save.
            steps = generator.randrange(2 * _SAVE_EVERY)
            _wait_until(child, lambda goal=before + steps, out=out: _records(out) >= goal)
            time.sleep(generator.uniform(0, 0.03))
            _kill(child)
            if server.wait() == 0:
                break
            kills += 1
            _sound_or_absent(out / "ckpt")
        assert _digest(out / "ckpt" / f"step-{_STEPS}") == undisturbed
        shutil.rmtree(out)


def _records(out: Path) -> int:
    """The step of the last whole record, 0 without any."""
    try:
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def test_killed_in_the_middle_of_a_save_the_newest_checkpoint_is_whole(server, tmp_path):
    hits = 0
    for attempt in range(_KILLS * 5):
        out = tmp_path / str(attempt)
        child = server.start(out, 1)
        _wait_until(child, lambda out=out: any((out / "ckpt").glob(".step-*")))
        _kill(child)
        server.wait()
        leftovers = list((out / "ckpt").glob(".step-*"))
        hits += bool(leftovers)
        _sound_or_absent(out / "ckpt")
        if hits >= max(5, _KILLS // 4):
            # The leftovers of the killed save hinder nothing: the run goes on to its end.
            server.start(out, 20)
            assert server.wait() == 0
            assert verify_checkpoint(out / "ckpt" / f"step-{_STEPS}") is None
            assert not list((out / "ckpt").glob(".step-*"))
            return
        shutil.rmtree(out)
    pytest.fail(f"only {hits} kills met a save")


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _wait_until(process: int, condition: Callable[[], bool]) -> None:
    """Until the condition holds or the process has ended, which the server notices."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not condition():
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.001)

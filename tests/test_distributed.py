"""Two gloo processes train the same network as one, by DistributedDataParallel and by FSDP2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import Rank, finish, started

from iddpm_ext.checkpoint.runs import read_state, read_tensors, verify_checkpoint
from iddpm_ext.training import TrainConfig, train

# Seconds, for a machine under load; a dead peer is noticed at once.
_TIMEOUT = 300

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
        timestep_sampler="loss-second-moment", ema=(0.9,), save_every=2, log_every=1, sample_every=0,
        progress=False, device="cpu", class_cond=True, label_dropout=0.2, lr=1e-4,
    )  # fmt: skip
    return replace(base, **changes)


def _training(
    configs: list[TrainConfig], folder: Path, timeout: float = _TIMEOUT
) -> AbstractContextManager[list[Rank]]:
    """Two processes that run these trainings one after the other."""
    listing = folder / "configs.jsonl"
    listing.write_text("".join(json.dumps(c.to_dict()) + "\n" for c in configs))
    return started(["-c", _PROGRAM, str(listing)], folder, IDDPM_DIST_TIMEOUT=str(timeout))


def _losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def _tensors(out: Path, file: str, step: int = 4) -> dict[str, torch.Tensor]:
    return read_tensors(out / "ckpt" / f"step-{step}", file)


@pytest.fixture(scope="module")
def one(data, tmp_path_factory) -> Path:
    """A run of one process with the whole batch."""
    out = tmp_path_factory.mktemp("one")
    train(_config(data, out))
    return out


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> str:
    """Ten images of which three cannot be read, so that each process meets some."""
    folder = tmp_path_factory.mktemp("broken")
    for i in range(10):
        if i % 3 == 2:
            (folder / f"{i}.png").write_bytes(b"no image")
        else:
            Image.new("L", (8, 8), 20 * i).save(folder / f"{i}.png")
    return str(folder)


@pytest.fixture(scope="module")
def runs(data, broken, tmp_path_factory) -> Path:
    """Two processes with DDP; with accumulation; one that a single process began; on a broken image."""
    folder = tmp_path_factory.mktemp("runs")
    train(_config(data, folder / "shared", steps=2))
    configs = [
        _config(data, folder / "ddp", sample_every=2, sample_count=2),
        _config(data, folder / "parts", accumulate=2),
        _config(data, folder / "shared"),
        _config(broken, folder / "broken", class_cond=False, label_dropout=0.0),
    ]
    with _training(configs, folder) as ranks:
        finish(ranks)
    (folder / "notes.txt").write_text("".join(rank.complained() for rank in ranks))
    return folder


@pytest.fixture(scope="module")
def sharded(data, tmp_path_factory) -> Path:
    """Two processes with FSDP2; with accumulation; and one that a single process began."""
    folder = tmp_path_factory.mktemp("sharded")
    train(_config(data, folder / "shared", steps=2))
    configs = [
        _config(data, folder / "fsdp", fsdp=True, sample_every=2, sample_count=2),
        _config(data, folder / "parts", fsdp=True, accumulate=2),
        _config(data, folder / "shared", fsdp=True),
    ]
    with _training(configs, folder) as ranks:
        finish(ranks)
    return folder


def _agree(one: Path, two: Path) -> None:
    assert _losses(two) == pytest.approx(_losses(one), rel=1e-4)
    _same_network(one, two)
    # The importance sampler's history: how often each step was drawn, and its losses.
    a, b = (_tensors(out, "timesteps.safetensors") for out in (one, two))
    assert torch.equal(a["counts"], b["counts"])
    torch.testing.assert_close(a["losses"], b["losses"], rtol=1e-3, atol=1e-5)


def _same_network(one: Path, two: Path) -> None:
    for file in ("model.safetensors", "ema_0.9.safetensors"):
        a, b = (_tensors(out, file) for out in (one, two))
        assert a.keys() == b.keys()
        # Of the whole network: AdamW makes a full step of any sign of a gradient that is all rounding,
        # as those behind the layers that begin at zero are.
        difference = sum(float((b[name] - value).square().sum()) for name, value in a.items())
        assert difference <= 1e-6 * sum(float(value.square().sum()) for value in a.values())


@pytest.mark.parametrize("name", ["ddp", "parts", "shared"])
def test_two_processes_train_the_network_and_the_sampler_of_one(one, runs, name):
    _agree(one, runs / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "parts", "shared"])
def test_sharded_processes_train_the_network_and_the_sampler_of_one(one, sharded, name):
    _agree(one, sharded / name)


def test_no_setting_that_torch_gives_up_is_used(runs):
    assert "deprecated" not in (runs / "notes.txt").read_text()


def test_two_processes_draw_one_grid_of_their_run(runs):
    grids = sorted(path.name for path in (runs / "ddp" / "samples").iterdir())
    assert grids == ["step-2.png", "step-4.png"]


@pytest.mark.slow
def test_sharded_processes_draw_one_grid_of_their_run(sharded):
    grids = sorted(path.name for path in (sharded / "fsdp" / "samples").iterdir())
    assert grids == ["step-2.png", "step-4.png"]


def test_two_processes_count_the_unreadable_images_of_one(broken, runs, tmp_path):
    train(_config(broken, tmp_path, class_cond=False, label_dropout=0.0))
    one, two = (
        [
            json.loads(line)["bad_images"]
            for line in (out / "metrics.jsonl").read_text().splitlines()
        ]
        for out in (tmp_path, runs / "broken")
    )
    assert one == two and one[-1] >= 9


def test_resuming_with_more_processes_says_so(runs):
    assert "the run has 2 processes now, 1 before" in (runs / "notes.txt").read_text()
    assert read_state(runs / "shared" / "ckpt" / "step-4")["processes"] == 2


def test_two_processes_warn_of_nothing(runs):
    assert "Warning" not in (runs / "notes.txt").read_text()


@pytest.mark.slow
def test_stopping_one_process_stops_and_saves_both(data, tmp_path):
    config = _config(data, tmp_path / "out", steps=100_000, save_every=100_000)
    with _training([config], tmp_path) as ranks:
        _wait_for_records(tmp_path / "out")
        ranks[1].send_signal(signal.SIGTERM)
        finish(ranks)
    (path,) = (tmp_path / "out" / "ckpt").glob("step-*")
    assert verify_checkpoint(path) is None


def test_a_dead_process_does_not_leave_the_other_waiting(data, tmp_path):
    config = _config(data, tmp_path / "out", steps=100_000, save_every=100_000)
    with _training([config], tmp_path) as ranks:
        _wait_for_records(tmp_path / "out")
        ranks[1].kill()
        assert ranks[0].wait(_TIMEOUT) != 0


@pytest.mark.slow
def test_a_stopped_process_keeps_the_other_waiting_for_the_time_out_only(data, tmp_path):
    config = _config(data, tmp_path / "out", steps=100_000, save_every=100_000)
    with _training([config], tmp_path, timeout=20) as ranks:
        _wait_for_records(tmp_path / "out")
        ranks[1].send_signal(signal.SIGSTOP)
        assert ranks[0].wait(_TIMEOUT) != 0


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused(data, tmp_path):
    with _training([_config(data, tmp_path / "out", batch_size=3)], tmp_path) as ranks:
        assert [rank.wait(_TIMEOUT) for rank in ranks] == [1, 1]
    rule = "batch_size must be a multiple of accumulate 1 times 2 processes"
    assert all(rule in rank.complained() for rank in ranks)


# Two processes that meet six times, rank 0 the slower one at some and rank 1 at others; first where rank 0
# serves the store, then where their parent does. Forked, so that they start at once on a port just found.
_GROUPS = """
import os, socket, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from iddpm_ext import process_group

def rank(number):
    os.environ["RANK"] = str(number)
    for meeting in range(6):
        process_group.begin("gloo", timedelta(seconds=100))
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == 2
        process_group.end()
        if meeting % 2 == number:
            time.sleep(0.05)

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
for served in (False, True):
    if served:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = store.port
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE=str(served))
    children = []
    for number in range(2):
        child = os.fork()
        if child == 0:
            try:
                rank(number)
            except BaseException as error:
                print(f"rank {number}, served {served}: {error}", flush=True)
                os._exit(1)
            os._exit(0)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit(1)
"""


def test_groups_follow_one_another_in_the_same_processes():
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", _GROUPS]
    result = subprocess.run(
        program, env=variables, capture_output=True, text=True, timeout=_TIMEOUT
    )
    assert result.returncode == 0, result.stdout


# The same gradients for an optimiser of whole parameters and for one of their shards: an odd number of
# rows; a single row, of which rank 1 has nothing; a matrix that fills several blocks of the kernel.
_OPTIMISERS = """
import copy, torch
from datetime import timedelta
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from iddpm_ext import process_group
from iddpm_ext.training.optimizer import AdamWEMA, MOMENTS

torch.set_num_threads(1)
process_group.begin("gloo", timedelta(seconds=120))
torch.manual_seed(0)
shapes = ((5, 3), (1,), (1, 7), (257, 33), (16, 3, 3, 3))
whole = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(s)) for s in shapes)
parts = copy.deepcopy(whole)
fully_shard(parts)
assert [p.to_local().shape[0] for p in parts] == ([3, 1, 1, 129, 8], [2, 0, 0, 128, 8])[dist.get_rank()]

def optimiser(model):
    averages = {d: {n: p.detach().clone() for n, p in model.named_parameters()} for d in (0.9, 0.99)}
    return AdamWEMA(model.parameters(), averages, lr=1e-2, weight_decay=0.1), averages

(a, a_averages), (b, b_averages) = optimiser(whole), optimiser(parts)
for bad, factor in ((0.0, None), (1.0, 1.0), (0.0, 0.25)):
    for p, q in zip(whole, parts, strict=True):
        p.grad = torch.randn(p.shape)
        q.grad = distribute_tensor(p.grad, q.device_mesh, q.placements)
    for o in (a, b):
        clip = None if factor is None else torch.tensor(factor)
        o.step(decays=(0.9, 0.99), bad=torch.tensor(bad), factor=clip)
assert a.updates == b.updates == 2
for p, q in zip(whole, parts, strict=True):
    assert torch.equal(p, q.full_tensor())
    for moment in MOMENTS:
        assert torch.equal(a.state[p][moment], b.state[q][moment].full_tensor())
for decay, values in a_averages.items():
    for name, value in values.items():
        assert torch.equal(value, b_averages[decay][name].full_tensor())
process_group.end()
"""


def test_the_optimiser_gives_shards_the_bits_of_whole_parameters(tmp_path):
    with started(["-c", _OPTIMISERS], tmp_path) as ranks:
        finish(ranks)


# Two processes, each with a graph of its own share of a batch, and one with all of it and no graph.
_GRAPHS = """
import itertools, torch
from datetime import timedelta
import torch.distributed as dist
from fake_graphs import FakeGraphs
from iddpm_ext import process_group
from iddpm_ext.data import Batch
from iddpm_ext.ops import checks
from iddpm_ext.training import TrainConfig, captured, step
from iddpm_ext.training.parallel import Parallel
from iddpm_ext.training.state import new_state

torch.set_num_threads(1)
process_group.begin("gloo", timedelta(seconds=120))
captured.supports_device = lambda device: True
checks.timesteps = lambda *_: None  # looks at values, for which a host with a GPU does not wait
step.Graphs = FakeGraphs

def batches(rank, size):
    draw = torch.Generator().manual_seed(0)
    for first in itertools.count(0, 4):
        images, share = torch.rand(4, 3, 8, 8, generator=draw) * 2 - 1, 4 // size
        own = slice(rank * share, (rank + 1) * share)
        yield Batch(torch.arange(first, first + 4)[own], images[own], None, [])

def trained(parallel, **changes):
    config = TrainConfig(batch_size=4, model_channels=32, num_res_blocks=1, channel_mult=(1, 2), device="cpu",
                         attention_resolutions=(4,), diffusion_steps=50, lr=1e-3, **changes)
    state = new_state(config, (3, 8, 8), None, parallel)
    source = batches(parallel.rank, parallel.size)
    for _ in range(3):
        step.train_step(config, state, source, parallel)
    return state

two, one = Parallel("cpu"), Parallel("cpu")
one.rank, one.size = 0, 1
state = trained(two)
assert state.module is state.model and state.captured is not None
assert (FakeGraphs.captures, FakeGraphs.replays) == (1, 3)
expected = trained(one, cuda_graph=False)
for p, q in zip(state.model.parameters(), expected.model.parameters(), strict=True):
    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
    first = p.detach().clone()
    dist.broadcast(first, 0)
    assert torch.equal(first, p)
process_group.end()
"""


def test_processes_with_a_graph_each_train_one_network(tmp_path):
    with started(["-c", _GRAPHS], tmp_path) as ranks:
        finish(ranks)


# With a switch interval so long that the GIL changes hands only when a thread waits, Gloo's threads nearly
# always still hold tensors of the last exchange when the group ends.
_ENDINGS = """
import sys, torch
from datetime import timedelta
import torch.distributed as dist
from iddpm_ext import process_group

torch.set_num_threads(1)
sys.setswitchinterval(1000)
for _ in range(20):
    process_group.begin("gloo", timedelta(seconds=120))
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))
    model(torch.ones(2, 3)).sum().backward()
    dist.all_reduce(torch.ones(3))
    process_group.end()
    del model
"""


def test_a_group_ends_though_the_last_exchange_is_still_held(tmp_path):
    with started(["-c", _ENDINGS], tmp_path) as ranks:
        finish(ranks, _TIMEOUT)


# Rank 1 takes part only once rank 0 has seen that both of Gloo's threads are still at their exchange.
_HELD = """
import torch
from datetime import timedelta
import torch.distributed as dist
from iddpm_ext import process_group

torch.set_num_threads(1)
process_group.begin("gloo", timedelta(seconds=100))
store = process_group._meeting[0]
if dist.get_rank() == 1:
    store.wait(["seen"])
works = [dist.all_reduce(torch.ones(3), async_op=True) for _ in range(2)]
if dist.get_rank() == 0:
    assert not process_group._wait_for_threads(0.05)
    store.set("seen", "")
for work in works:
    work.wait()
assert process_group._wait_for_threads(100)
process_group.end()
"""


def test_a_group_waits_for_the_threads_that_hold_an_exchange_and_no_longer_than_it_may(tmp_path):
    with started(["-c", _HELD], tmp_path) as ranks:
        finish(ranks, _TIMEOUT)


def _wait_for_records(out: Path) -> None:
    deadline = time.monotonic() + _TIMEOUT
    while time.monotonic() < deadline:
        path = out / "metrics.jsonl"
        if path.exists() and path.stat().st_size:
            return
        time.sleep(0.05)
    pytest.fail("the processes never took a step")

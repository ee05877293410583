"""The training step whose forward and backward pass are one graph: here on a tape (`fake_graphs`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from fake_graphs import Counted, FakeGraphs, graphs_of_others

from iddpm_ext import _native
from iddpm_ext.data import Batch
from iddpm_ext.training import TrainConfig, captured
from iddpm_ext.training import step as training_step
from iddpm_ext.training.parallel import Parallel
from iddpm_ext.training.state import TrainState, new_state

pytestmark = pytest.mark.skipif(_native.cpu_absence() is not None, reason="needs iddpm_ext._C")
STEPS, SIDE = 4, 8


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request, monkeypatch) -> str:
    graphs = Counted if request.param == "cuda" else FakeGraphs
    graphs.reset()
    monkeypatch.setattr(training_step, "Graphs", graphs)
    monkeypatch.setattr(captured, "supports_device", lambda device: device.type == request.param)
    if request.param == "cpu":  # these look at values where the host need not wait for them
        monkeypatch.setattr("iddpm_ext.ops.checks.timesteps", lambda *_: None)
        monkeypatch.setattr("iddpm_ext.networks.unet._require_labels", lambda *_: None)
    return request.param


def batches(config: TrainConfig) -> Iterator[Batch]:
    draw = torch.Generator().manual_seed(0)
    for step in itertools.count():
        positions = torch.arange(step * config.batch_size, (step + 1) * config.batch_size)
        x_0 = torch.rand(config.batch_size, 3, SIDE, SIDE, generator=draw) * 2 - 1
        yield Batch(positions, x_0, positions % 3 if config.class_cond else None, [])


def trained(
    device: str, between: Callable[[], None] = lambda: None, **changes
) -> tuple[TrainState, list[torch.Tensor]]:
    """The state and the measures after some steps; `between` is called before each."""
    config = TrainConfig(
        batch_size=3, model_channels=32, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(4,),
        diffusion_steps=50, lr=1e-3, device=device, **changes,
    )  # fmt: skip
    parallel = Parallel(device)
    names = ("a", "b", "c") if config.class_cond else None
    state = new_state(config, (3, SIDE, SIDE), names, parallel)
    source = batches(config)
    measures = []
    for _ in range(STEPS):
        between()
        measures.append(training_step.train_step(config, state, source, parallel)[0])
    return state, measures


SETTINGS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16", "channels_last": True, "grad_clip": 0.5},
    "labels": {"class_cond": True, "label_dropout": 0.3, "flip": True, "lr_warmup": 3},
    "importance": {"timestep_sampler": "loss-second-moment", "objective": "vlb"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_replayed_steps_are_the_steps(device, name):
    expected, measures = trained(device, **SETTINGS[name], cuda_graph=False)
    state, found = trained(device, **SETTINGS[name], cuda_graph=True)
    assert FakeGraphs.captures + Counted.captures >= 1
    for a, b in zip(found, measures, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if device == "cpu" else 1e-3)
    for (key, a), b in zip(
        state.model.state_dict().items(), expected.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if device == "cpu" else 1e-3, msg=key)


def test_one_capture_serves_all_steps(device):
    trained(device, cuda_graph=True)
    graphs = Counted if device == "cuda" else FakeGraphs
    assert (graphs.captures, graphs.replays) == (1, STEPS)


def test_a_graph_outlives_what_torch_compile_clears(device):
    expected, _ = trained(device)
    state, _ = trained(device, lambda: graphs_of_others(device))
    for (key, a), b in zip(
        state.model.state_dict().items(), expected.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if device == "cpu" else 1e-3, msg=key)


def test_a_step_that_cannot_be_captured_says_so(device):
    graphs = Counted if device == "cuda" else FakeGraphs
    with (
        mock.patch.object(graphs, "failure", "operation not permitted"),
        pytest.raises(RuntimeError, match=r"cuda_graph must be off.* operation not permitted"),
    ):
        trained(device, cuda_graph=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"accumulate": 3}, "accumulate is 3"),
        ({"cuda_graph": False}, "cuda_graph is off"),
        ({"fsdp": True}, "fsdp is on"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing is on"),
        ({"compile": True}, "compile is on"),
    ],
)
def test_settings_that_a_graph_does_not_serve_say_so(changes, reason):
    config = TrainConfig(**changes)
    assert captured.why_not_captured(config, torch.device("cuda")) == reason
    assert captured.why_not_captured(TrainConfig(), torch.device("cuda")) is None
    assert captured.why_not_captured(TrainConfig(), torch.device("cpu")) == "the device is cpu"


def test_parts_of_a_batch_are_accumulated_as_the_module_does(device, monkeypatch):
    state, found = trained(device, accumulate=3)
    assert state.captured is None and state.fused is not None
    monkeypatch.setattr(captured, "supports_device", lambda _: False)
    plain, expected = trained(device, accumulate=3)
    assert plain.fused is None
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_copies_are_the_parameters_rounded_after_every_step(device):
    state, _ = trained(device, dtype="bfloat16")
    assert len(state.fused.copies) > 10
    for parameter, copy in state.fused.copies.items():
        assert torch.equal(copy, parameter.to(torch.bfloat16))
        assert parameter.grad is None and copy.grad is None

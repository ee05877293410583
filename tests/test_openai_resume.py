"""A run of the original's goes on in our trainer: weights, averages and optimiser from its files."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import iddpm_ext
from iddpm_ext.checkpoint.runs import read_state, read_tensors
from iddpm_ext.data import Order, batches, open_data
from iddpm_ext.training import TrainConfig, train
from iddpm_ext.training.parallel import Parallel
from iddpm_ext.training.state import new_state
from iddpm_ext.training.step import _inputs, _losses, positions_of

DECAY, LR, FILED = 0.9, 1e-3, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    path = tmp_path_factory.mktemp("data") / "noise.npz"
    np.savez(path, images=images, labels=np.arange(12) % 3)
    return str(path)


def config_of(data: str, out: Path, **changes) -> TrainConfig:
    # 64 channels make groups of two: with one channel a group, biases before a normalisation have a
    # gradient of rounding alone, which AdamW blows up to whole steps.
    base = TrainConfig(
        data=data, out=str(out), steps=4, batch_size=4, model_channels=64, num_res_blocks=1,
        channel_mult=(1, 2), attention_resolutions=(4,), diffusion_steps=50, lr=LR, ema=(DECAY,),
        save_every=100, log_every=100, sample_every=0, progress=False, device="cpu", ema_warmup=False,
    )  # fmt: skip
    return replace(base, **changes)


def plain_run(config: TrainConfig, steps: int, at: Path, rows: int = 0) -> dict:
    """Steps of plain torch on a network in OpenAI's layout; files as the original's after two."""
    source = open_data(config.data)
    with Parallel("cpu") as parallel:
        state = new_state(config, source.image_shape, source.class_names, parallel)
        model = state.model
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
        average = [p.detach().clone() for p in model.parameters()]
        stream = batches(source, Order(len(source), config.seed), positions_of(config, 0, 0, 1), 0)
        for step in range(steps):
            if step == FILED:
                write_files(at, model, optimizer, average, rows)
            optimizer.zero_grad()
            inputs = _inputs(config, state, next(stream), torch.device("cpu"))
            _losses(config, state, inputs)["loss"].mean().backward()
            optimizer.step()
            for mean, p in zip(average, model.parameters(), strict=True):
                mean.mul_(DECAY).add_(p.detach(), alpha=1 - DECAY)
    names = [name for name, _ in model.named_parameters()]
    return {
        "model": {k: v.clone() for k, v in model.state_dict().items()},
        "ema": dict(zip(names, average, strict=True)),
        "exp_avg": {n: optimizer.state[p]["exp_avg"] for n, p in model.named_parameters()},
    }


def write_files(at: Path, model, optimizer, average, rows: int) -> None:
    def padded(name: str, value: torch.Tensor) -> torch.Tensor:
        if name != "label_emb.weight" or not rows:
            return value.detach().clone()
        return torch.cat([value.detach(), torch.ones(rows - len(value), value.shape[1])])

    names = [name for name, _ in model.named_parameters()]
    weights = {k: padded(k, v) for k, v in model.state_dict().items()}
    torch.save(weights, at / "model000002.pt")
    means = {n: padded(n, v) for n, v in zip(names, average, strict=True)}
    torch.save(means, at / f"ema_{DECAY}_000002.pt")
    states = copy.deepcopy(optimizer.state_dict())
    for number, entry in states["state"].items():
        for moment in ("exp_avg", "exp_avg_sq"):
            entry[moment] = padded(names[number], entry[moment])
    torch.save(states, at / "opt000002.pt")


def flattened(path: Path, model_path: Path, groups: int) -> None:
    """The optimiser's file as half-precision training has it: one flat vector, or two."""
    states = torch.load(path)
    shapes = [v.shape for v in torch.load(model_path).values()]
    numbers = range(len(shapes))
    parts = [list(numbers)]
    if groups == 2:
        parts = [
            [i for i in numbers if len(shapes[i]) < 2],
            [i for i in numbers if len(shapes[i]) > 1],
        ]
    entries = {}
    for g, part in enumerate(parts):
        entries[g] = {"step": states["state"][0]["step"]}
        for moment in ("exp_avg", "exp_avg_sq"):
            flat = torch.cat([states["state"][i][moment].flatten() for i in part])
            entries[g][moment] = flat[None] if groups == 2 and g == 1 else flat
    group = {**states["param_groups"][0], "params": list(range(groups))}
    torch.save({"state": entries, "param_groups": [group]}, path)


def started(config: TrainConfig, at: Path, **changes) -> TrainConfig:
    return replace(
        config,
        init_from=str(at / "model000002.pt"),
        init_ema=(str(at / f"ema_{DECAY}_000002.pt"),),
        init_optimizer=str(at / "opt000002.pt"),
        **changes,
    )


@pytest.mark.parametrize("form", ["a tensor each", "one vector", "two vectors", "1000 classes"])
def test_run_goes_on_as_it_would_have_in_plain_torch(data, tmp_path, form):
    labelled = form == "1000 classes"
    config = config_of(data, tmp_path / "run", class_cond=labelled)
    expected = plain_run(config, 4, tmp_path, rows=1000 if labelled else 0)
    if form in ("one vector", "two vectors"):
        count = 1 if form == "one vector" else 2
        flattened(tmp_path / "opt000002.pt", tmp_path / "model000002.pt", count)
    path = train(started(config, tmp_path))
    assert path.name == "step-4"
    assert read_state(path)["images"] == 4 * config.batch_size
    got = {
        "model": read_tensors(path, "model.safetensors"),
        "ema": read_tensors(path, f"ema_{DECAY}.safetensors"),
        "exp_avg": {
            k.removeprefix("exp_avg."): v
            for k, v in read_tensors(path, "optim.safetensors").items()
            if k.startswith("exp_avg.")
        },
    }
    for part, values in expected.items():
        assert got[part].keys() == values.keys()
        for name, value in values.items():
            torch.testing.assert_close(got[part][name], value, rtol=1e-5, atol=1e-6)


def test_weights_alone_start_a_new_run_with_its_averages_at_them(data, tmp_path):
    config = config_of(data, tmp_path / "run")
    plain_run(config, 3, tmp_path)
    weights = torch.load(tmp_path / "model000002.pt")
    path = train(replace(config, init_from=str(tmp_path / "model000002.pt"), steps=1, lr=1e-12))
    assert read_state(path)["step"] == 1
    for file in ("model.safetensors", f"ema_{DECAY}.safetensors"):
        for name, value in read_tensors(path, file).items():
            torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=1e-6)


def test_averages_of_a_long_run_are_not_forgotten_by_the_warm_up(data, tmp_path):
    config = config_of(data, tmp_path / "run", ema_warmup=True)
    plain_run(config, 3, tmp_path)
    average = torch.load(tmp_path / f"ema_{DECAY}_000002.pt")
    average = {name: torch.full_like(value, 7.0) for name, value in average.items()}
    torch.save(average, tmp_path / f"ema_{DECAY}_000002.pt")
    path = train(started(config, tmp_path, steps=3))
    moved = read_tensors(path, f"ema_{DECAY}.safetensors")["out.2.bias"]
    torch.testing.assert_close(moved, torch.full_like(moved, 6.3), rtol=0.01, atol=0.01)


def test_resumed_run_does_not_start_again(data, tmp_path):
    config = config_of(data, tmp_path / "run")
    plain_run(config, 3, tmp_path)
    once = started(config, tmp_path, steps=3)
    train(once)
    (tmp_path / "model000002.pt").unlink()
    assert train(replace(once, steps=4)).name == "step-4"


def test_our_own_checkpoint_starts_another_run(data, tmp_path):
    config = config_of(data, tmp_path / "a", steps=2)
    path = train(config)
    again = replace(config, out=str(tmp_path / "b"), init_from=str(path / "model.safetensors"))
    assert train(replace(again, steps=1)).name == "step-1"
    with pytest.raises(ValueError, match=r"settings must be those of .* num_heads=2 \(there 4\)"):
        train(replace(again, out=str(tmp_path / "c"), num_heads=2))


def test_files_that_do_not_fit_are_refused_before_training(data, tmp_path):
    config = config_of(data, tmp_path / "run")
    plain_run(config, 3, tmp_path)
    good = started(config, tmp_path)
    with pytest.raises(ValueError, match=r"settings must be those of .* num_res_blocks=3 .there 1"):
        train(replace(good, num_res_blocks=3))
    with pytest.raises(ValueError, match=r"settings must be those .* model_channels=32 \(there 64"):
        train(replace(good, model_channels=32))
    with pytest.raises(ValueError, match=r"init_ema must have the decays of ema .* ema has 0.5"):
        train(replace(good, ema=(0.5,)))
    with pytest.raises(FileNotFoundError, match=r"init files must exist, got 'absent.pt'"):
        train(replace(good, init_from="absent.pt"))
    states = torch.load(tmp_path / "opt000002.pt")
    for content, says in (
        ([1], "must be the state of an AdamW, got TypeError"),
        ({"state": {}, "param_groups": [{"params": [0]}]}, "must be the state of an AdamW"),
        ({**states, "param_groups": [{"params": [0, 1, 2]}]}, "got 3 tensors, one of"),
        (
            {
                **states,
                "param_groups": [{"params": list(reversed(states["param_groups"][0]["params"]))}],
            },
            "instead of .* for time_embed.0.weight",
        ),
    ):
        torch.save(content, tmp_path / "opt000002.pt")
        with pytest.raises(ValueError, match=says):
            train(good)
    assert not (tmp_path / "run" / "ckpt").exists()


def test_settings_of_a_start_that_contradict_are_refused(data, tmp_path):
    config = config_of(data, tmp_path)
    with pytest.raises(ValueError, match="init_from must be given with init_ema or init_optimizer"):
        replace(config, init_optimizer="opt.pt")
    with pytest.raises(ValueError, match="init_ema must have a file for each decay"):
        replace(config, init_from="a.pt", init_ema=("a.pt", "b.pt"))
    known = json.loads(json.dumps(replace(config, init_from="a", init_ema=("b",)).to_dict()))
    assert TrainConfig.from_dict(known).init_ema == ("b",)


def test_trained_network_goes_back_to_torch_save_and_in_again(data, tmp_path):
    path = train(config_of(data, tmp_path / "run", steps=1))
    model = iddpm_ext.load(path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "model000001.pt")
    flags = {"image_size": 8, "num_heads": 4, "schedule": "cosine", "num_timesteps": 50}
    back = iddpm_ext.load(tmp_path / "model000001.pt", flags={**flags, "rescale_timesteps": True})
    assert (back.config, back.diffusion) == (model.config, model.diffusion)

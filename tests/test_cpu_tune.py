"""The tables by which the CPU engine chooses its convolutions, and the tuner that measures them."""

from __future__ import annotations

import json

import pytest
import torch

from iddpm_ext import UNet, UNetConfig, _native
from iddpm_ext.cli import main
from iddpm_ext.engines.cpu import algorithms
from iddpm_ext.engines.cpu.algorithms import (
    Algorithm,
    Chooser,
    ConvShape,
    check_table,
    cpu_family,
    load_chooser,
    load_table,
    user_table_path,
)
from iddpm_ext.engines.cpu.engine import CPUEngine
from iddpm_ext.sampling import tune

needs_engine = pytest.mark.skipif(
    _native.cpu_absence() is not None or _native.native().build_info()["isa"] == "base",
    reason="needs iddpm_ext._C and AVX2",
)
SHAPE = ConvShape(8, 8, 32, 64, 4)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache directory of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def network() -> UNet:
    config = UNetConfig(image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1, 2))
    model = UNet(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.out[2].weight)
    return model


def store(table) -> None:
    path = user_table_path(cpu_family())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table))


def test_every_shipped_table_is_valid():
    for path in algorithms._SHIPPED.glob("*.json"):
        table = load_table(path)
        assert set(table) == {"float32", "bfloat16"}
        assert all(table.values())


def test_the_users_table_goes_before_the_shipped_one(tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(algorithms, "_SHIPPED", shipped)
    (shipped / f"{cpu_family()}.json").write_text(json.dumps({"float32": {SHAPE.key: "F2"}}))
    assert load_chooser()(SHAPE, exact=False, bf16=False) == Algorithm(2)
    store({"float32": {SHAPE.key: "F4"}})
    assert load_chooser()(SHAPE, exact=False, bf16=False) == Algorithm(4)
    assert load_chooser("another-cpu")(SHAPE, exact=False, bf16=False) == Algorithm(4)


def test_an_unmeasured_batch_follows_the_nearest_and_exact_follows_none():
    choose = Chooser({"float32": {SHAPE.layer: {1: "F4", 16: "F2"}}})
    at = {n: ConvShape(8, 8, 32, 64, n) for n in (2, 4, 5, 64)}
    tiles = {n: choose(shape, exact=False, bf16=False).tile for n, shape in at.items()}
    assert tiles == {2: 4, 4: 4, 5: 2, 64: 2}
    assert choose(at[2], exact=True, bf16=False) == Algorithm(2)
    assert choose(at[2], exact=False, bf16=True) == Algorithm(2, bf16=True)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([], "not an object"),
        ({"float16": {}}, "unknown precision"),
        ({"float32": {SHAPE.key: "F2 bf16"}}, "unknown algorithm"),
        ({"float32": {"8x8 32-64": "F2"}}, "names no shape and batch"),
    ],
)
def test_a_damaged_table_is_refused_by_name(table, words):
    with pytest.raises(ValueError, match=words):
        check_table(table)
    store(table)
    with pytest.raises(ValueError, match=rf"{cpu_family()}\.json must be a table .*{words}"):
        load_chooser()


@needs_engine
def test_engines_follow_what_was_tuned_and_repeat_it():
    model = network()
    path = tune(model, [2], rounds=1)
    assert path == user_table_path(cpu_family())
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    table = load_table(path)
    flipped = {key: "F4" if name == "F2" else "F2" for key, name in table["float32"].items()}
    x, t = torch.randn(2, 3, 8, 8), torch.full((2,), 10.0)
    tuned = CPUEngine(model, 2).at(x, t)
    assert torch.equal(CPUEngine(model, 2).at(x, t), tuned)
    store({"float32": flipped})
    assert not torch.equal(CPUEngine(model, 2).at(x, t), tuned)


@needs_engine
def test_tuning_again_keeps_the_other_shapes(tmp_path):
    other = {"float32": {"1x1 32-32 x9": "F2"}}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(other))
    assert tune(network(), [1], rounds=1, path=path) == path
    assert load_table(path)["float32"].items() > other["float32"].items()
    with pytest.raises(ValueError, match=r"batch_sizes must be at least 1, got \[0\]"):
        tune(network(), [0])
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        tune(network(), rounds=0)


@needs_engine
def test_the_command_line_tunes(tmp_path, capsys):
    table = tmp_path / "mine.json"
    assert main(["tune", "--batch-sizes", "1", "--rounds", "1", "--out", str(table)]) == 0
    assert capsys.readouterr().out.strip() == str(table)
    assert load_table(table)["float32"]

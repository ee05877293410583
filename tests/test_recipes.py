"""The training recipes at toy size: they continue after a stop and write what they promise."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import iddpm_ext

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python" / "recipes"))

import cifar10
import two_stage


@pytest.fixture
def data(tmp_path):
    for name, level in (("cat", 0.5), ("dog", -0.5)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            image = torch.full((1, 3, 8, 8), level + 0.1 * i, dtype=torch.float32, device="cpu")
            iddpm_ext.save_images(image, tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def arguments(data: Path, out: Path) -> list[str]:
    return [
        "cifar10.py", "--data", str(data), "--out", str(out), "--minutes", "0.05", "--batch-size", "2",
        "--width", "32", "--res-blocks", "1", "--channel-mult", "1", "--attention", "8",
        "--dtype", "float32", "--workers", "0", "--samples", "2", "--device", "cpu",
    ]  # fmt: skip


def test_recipe_trains_to_its_end_and_exports_what_load_reads(data, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", arguments(data, tmp_path / "out"))
    assert cifar10.main() == 0
    plan = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert 0 < plan["constant_steps"] < plan["steps"]
    for decay in ("0.999", "0.9995"):
        model = iddpm_ext.load(tmp_path / "out" / f"cifar10-ema-{decay}.safetensors")
        assert model.config.num_classes == 2 and model.extra["step"] == plan["steps"]
    assert (tmp_path / "out" / "samples.png").exists()
    # A second call finds nothing to train and leaves the same weights.
    assert cifar10.main() == 0
    again = iddpm_ext.load(tmp_path / "out" / "cifar10-ema-0.9995.safetensors").state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_recipe_of_steps_ends_the_same_whether_it_was_stopped_or_not(data, tmp_path, monkeypatch):
    def run(out: Path) -> int:
        words = [word for word in arguments(data, out) if word not in ("--minutes", "0.05")]
        monkeypatch.setattr(sys, "argv", [*words, "--steps", "8", "--save-every", "2"])
        return cifar10.main()

    def stopping(config):
        # As if the training were stopped at its third step.
        return train(dataclasses.replace(config, steps=3))

    train = cifar10.train
    assert run(tmp_path / "whole") == 0
    plan = json.loads((tmp_path / "whole" / "recipe.json").read_text())
    assert (plan["constant_steps"], plan["steps"]) == (int(cifar10.CONSTANT * 8), 8)
    monkeypatch.setattr(cifar10, "train", stopping)
    assert run(tmp_path / "pieces") == 1
    monkeypatch.setattr(cifar10, "train", train)
    assert run(tmp_path / "pieces") == 0
    whole, pieces = (
        iddpm_ext.load(tmp_path / name / "cifar10-ema-0.999.safetensors")
        for name in ("whole", "pieces")
    )
    assert whole.extra["step"] == 8
    assert all(torch.equal(pieces.state_dict()[n], v) for n, v in whole.state_dict().items())


def test_a_stop_by_the_user_is_not_taken_for_the_end_of_the_time(data, tmp_path, monkeypatch):
    words = arguments(data, tmp_path / "out")
    words[words.index("--minutes") + 1] = "10"
    monkeypatch.setattr(sys, "argv", words)
    stop = threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # should the training not listen yet
    stop.start()
    try:
        assert cifar10.main() == 1
    finally:
        stop.cancel()
        signal.signal(signal.SIGTERM, before)
    plan = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert plan.keys() == {"spent"} and 0 < plan["spent"] < 360


def test_the_time_of_a_killed_run_is_that_of_its_records(data, tmp_path):
    config = cifar10.configuration(cifar10.parser().parse_args(arguments(data, tmp_path)[1:]))
    plan = cifar10.Plan(tmp_path)
    assert cifar10.time_spent(plan, config) == 0
    lines = ['{"step": 1, "seconds": 2.5}', '{"step": 2, "seconds": 7.5}', '{"sec']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert cifar10.time_spent(plan, config) == 7.5
    plan["spent"] = 9.0
    assert cifar10.time_spent(plan, config) == 9


def test_learning_rate_falls_in_a_line_from_where_it_was(data, tmp_path):
    config = cifar10.configuration(cifar10.parser().parse_args(arguments(data, tmp_path)[1:]))
    plan = cifar10.Plan(tmp_path)
    plan["constant_steps"], plan["steps"] = 60, 100
    second = cifar10.fall(plan, config, 0.0)
    assert second.lr * (1 - 60 / 100) == pytest.approx(config.lr)
    assert (second.steps, second.lr_decay) == (100, True)


def test_speed_is_that_of_the_second_half_where_records_differ_in_length_and_speed(tmp_path):
    records = [(1000, 10.0), (1100, 100.0), (1300, 200.0), (1400, 50.0), (1401, 1.0)]
    lines = [json.dumps({"step": n, "images": n, "images_per_second": rate}) for n, rate in records]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    # From 1300 on: 100 images in 2 seconds and one in one.
    assert cifar10.images_per_second(tmp_path) == pytest.approx(101 / 3)
    (tmp_path / "metrics.jsonl").write_text(lines[0] + "\n")
    assert cifar10.images_per_second(tmp_path) == 10


def test_a_large_file_is_written_in_parts_that_make_it_whole(tmp_path):
    data = bytes(range(256)) * 10_000
    path = tmp_path / "weights"
    path.write_bytes(data)
    parts = cifar10.in_parts(path, megabytes=1)
    assert [part.name for part in parts] == ["weights.0", "weights.1", "weights.2"]
    assert b"".join(part.read_bytes() for part in parts) == data and not path.exists()


def test_two_stages_are_trained_compared_and_shown(tmp_path, monkeypatch):
    levels = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", levels)
    out = tmp_path / "out"
    words = (
        f"two_stage.py --data {tmp_path / 'd.npz'} --out {out} --small 4 --base-steps 2 --upsampler-steps 2 "
        "--batch-size 2 --width 32 --dtype float32 --samples 10 --references 12 --sample-steps 2 "
        "--extractor pixels"
    )
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.warns(UserWarning, match="covariance is singular"):
        assert two_stage.main() == 0
    facts = json.loads((out / "two_stage.json").read_text())
    names = [row["images"] for row in facts["distances"]]
    assert names == ["two stages", "bicubic", "upsampled real images"]
    assert all(row["ci95"][0] <= row["fd"] <= row["ci95"][1] for row in facts["distances"])
    assert (out / "two_stage.png").exists()
    model = iddpm_ext.load(out / "upsampler")
    assert model.config.super_resolution and model.extra["low_res_size"] == 4
    # A second call trains nothing and finds the same.
    with pytest.warns(UserWarning):
        assert two_stage.main() == 0
    again = json.loads((out / "two_stage.json").read_text())
    assert again["distances"] == facts["distances"]

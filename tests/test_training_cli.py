"""`iddpm train` and `iddpm data check`: the flags reach the run, and errors are one line."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from iddpm_ext.cli import main
from iddpm_ext.training import TrainConfig

_SMALL = [
    "--steps", "2", "--batch-size", "2", "--image-size", "8", "--model-channels", "32",
    "--num-res-blocks", "1", "--channel-mult", "1,2", "--attention-resolutions", "4",
    "--diffusion-steps", "20", "--device", "cpu", "--no-progress",
]  # fmt: skip


@pytest.fixture
def data(tmp_path) -> str:
    images = np.random.default_rng(0).integers(0, 256, (6, 10, 10, 3), np.uint8)
    np.savez(tmp_path / "d.npz", images=images, labels=np.array([0, 1, 2, 0, 1, 2]))
    return str(tmp_path / "d.npz")


def test_the_documented_flags_make_a_run_and_a_file_repeats_it(data, tmp_path, capsys):
    out = tmp_path / "run"
    flags = [
        "--data", data, "--out", str(out), *_SMALL, "--class-cond", "--objective", "vlb",
        "--timestep-sampler", "loss-second-moment", "--lr", "1e-3", "--dtype", "bfloat16",
        "--save-every", "1", "--sample-every", "0", "--seed", "3", "--resume", "auto",
    ]  # fmt: skip
    assert main(["train", *flags]) == 0
    path, command = capsys.readouterr().out.splitlines()
    assert path == str(out / "ckpt" / "step-2")
    assert command == f"iddpm sample {out} --labels all --out samples.png"
    drawn = ["--steps", "2", "--out", str(tmp_path / "samples.png")]
    assert main([*command.split()[1:-2], *drawn]) == 0, "the line that it ends with works"
    assert (tmp_path / "samples.png").exists() and capsys.readouterr()
    config = json.loads((out / "config.json").read_text())
    assert config["channel_mult"] == [1, 2] and config["objective"] == "vlb" and config["seed"] == 3
    again = ["--config-file", str(out / "config.json"), "--out", str(tmp_path / "again")]
    assert main(["train", *again]) == 0
    repeated = json.loads((tmp_path / "again" / "config.json").read_text())
    assert repeated == {**config, "out": str(tmp_path / "again")}
    first, second = (
        load_file(folder / "ckpt" / "step-2" / "model.safetensors")
        for folder in (out, tmp_path / "again")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_of_many_processes_names_the_checkpoint(data, tmp_path, capsys, monkeypatch):
    import iddpm_ext.training.loop

    monkeypatch.setattr(iddpm_ext.training.loop, "train", lambda config: "the/checkpoint")
    lines = "the/checkpoint\niddpm sample 'my run' --out samples.png\n"
    for rank, printed in (("0", lines), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", "--data", data, "--out", "my run"]) == 0
        assert capsys.readouterr().out == printed


def test_a_flag_goes_before_the_file_even_where_it_is_the_default(tmp_path, monkeypatch):
    import iddpm_ext.training.loop

    seen: list[TrainConfig] = []
    monkeypatch.setattr(iddpm_ext.training.loop, "train", lambda c: seen.append(c) or tmp_path)
    default = TrainConfig()
    given = TrainConfig(
        data="d", out="o", batch_size=16, class_cond=True, ema=(0.5, 0.25), image_size=8
    )
    (tmp_path / "c.json").write_text(json.dumps(given.to_dict()))
    for flag in (
        ["--config-file", str(tmp_path / "c.json")],
        [f"--config_file={tmp_path / 'c.json'}"],
    ):
        assert main(["train", *flag]) == 0 and seen.pop() == given
        explicit = [
            "--batch-size",
            str(default.batch_size),
            "--no-class-cond",
            "--image-size",
            "None",
        ]
        assert main(["train", *explicit, *flag, "--ema", "0.9999"]) == 0
        assert seen.pop() == replace(default, data="d", out="o")
    assert main(["train", "--config-file", str(tmp_path / "absent.json")]) == 1


def test_a_wrong_setting_is_one_line_and_status_1(data, tmp_path, capsys):
    assert main(["train", "--data", data, "--out", str(tmp_path / "x"), "--lr", "0"]) == 1
    assert capsys.readouterr().err == "iddpm train: lr must be above 0, got 0.0\n"
    assert main(["train", "--out", str(tmp_path / "x")]) == 1
    assert "data must be given" in capsys.readouterr().err


def test_data_check_tells_and_its_status_says_whether_all_is_well(data, tmp_path, capsys):
    assert main(["data", "check", data]) == 0
    assert "6 images, 0 unreadable" in capsys.readouterr().out
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.png").write_bytes(b"")
    assert main(["data", "check", str(tmp_path / "folder")]) == 1

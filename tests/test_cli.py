"""The command line: verbs, flags, exit statuses and one-line errors."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import iddpm_ext
from iddpm_ext import Diffusion, UNet, UNetConfig, cli
from iddpm_ext.cli import main
from iddpm_ext.images import read_recipe

NAMES = ["T-shirt/top", "Bag", "Boot"]
SMALL: dict[str, Any] = {
    "image_size": 8, "in_channels": 1, "out_channels": 2, "model_channels": 32,
    "num_res_blocks": 1, "channel_mult": (1,), "attention_resolutions": (),
}  # fmt: skip


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> UNet:
    """The network that any checkpoint's name loads here: small, with three named classes."""
    torch.manual_seed(0)
    model = UNet(UNetConfig(num_classes=3, **SMALL))
    torch.nn.init.normal_(model.out[2].weight, std=0.05)
    model.diffusion = Diffusion("cosine", 100)
    model.extra = {"class_names": NAMES}
    monkeypatch.setattr(iddpm_ext, "load", lambda name, **_: model, raising=False)
    return model.eval()


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_sample_writes_the_images_of_the_function_and_says_where(model, tmp_path, capsys):
    out = tmp_path / "x.npz"
    assert run("sample", "some.safetensors", "--steps", 4, "--labels", "2,bag,0", "--seed", 5,
               "--out", out) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: 3 images of some.safetensors in ") and "4 steps" in said
    x = iddpm_ext.sample(model, 4, labels=[2, 1, 0], seed=5, progress=False)
    with np.load(out) as arrays:
        levels = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)
        assert arrays["arr_1"].tolist() == [2, 1, 0]
    assert (levels - (x + 1) * 127.5).abs().max() <= 0.501


def test_sample_says_its_time_as_a_time(model, tmp_path, capsys, monkeypatch):
    clock = SimpleNamespace(perf_counter=iter([0.0, 3900.0]).__next__)
    monkeypatch.setattr("iddpm_ext.cli.sample.time", clock)
    assert run("sample", "m", "--steps", 2, "-n", 1, "--out", tmp_path / "x.npz") == 0
    assert "1 images of m in 1 h 05 min (2 steps" in capsys.readouterr().out


def test_all_spreads_the_images_over_the_classes_in_order(model, tmp_path):
    out = tmp_path / "x.png"
    assert run("sample", "--steps", 2, "--n", 7, "--labels", "all", "--out", out) == 0
    recipe = read_recipe(out)
    assert recipe["labels"] == [0, 0, 0, 1, 1, 2, 2]
    assert recipe["checkpoint"] == "fashion-mnist" and recipe["steps"] == "2"


def test_the_chain_is_animated_and_ends_in_the_images(model, tmp_path):
    out, animation = tmp_path / "x.png", tmp_path / "x.webp"
    assert (
        run("sample", "--steps", 5, "--n", 4, "--scale", 1, "--out", out, "--animate", animation)
        == 0
    )
    with Image.open(animation) as frames, Image.open(tmp_path / "x.png") as grid:
        assert frames.n_frames == 5
        frames.seek(4)
        frame, still = np.asarray(frames.convert("L")), np.asarray(grid)
        assert (frame[2:10, 2:10] == still[16:24, 2:10]).all()  # below the caption


@pytest.mark.parametrize(
    "arguments, match",
    [
        (("--steps", 1), "sample: steps must be from 2 to 100, got 1"),
        (("--labels", "hat"), "labels must be class numbers, names .* or all, got 'hat'"),
        (("--labels=-2",), "labels must be from 0 to 2, or -1 for none, got -2"),
        (("--labels", "0,1", "--n", 3), "must agree in length"),
        (("--eta", 0.5), "eta must be 0 with sampler 'ddpm'"),
        (("--backend", "vulkan"), "backend must be one of"),
        (("--device", "abacus"), "device"),
        (("--out", "missing/x.png"), "path must be in a folder that exists"),
        (("--out", "x.bmp"), "path must end in one of"),
        (("--animate", "x.mp4"), "path must end in one of .webp, .gif"),
    ],
)
def test_errors_are_one_line_and_status_1(model, tmp_path, monkeypatch, capsys, arguments, match):
    monkeypatch.chdir(tmp_path)
    assert run("sample", *arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and not captured.out
    assert re.search(match, captured.err)
    assert not list(tmp_path.iterdir())


def test_debug_keeps_the_traceback(model, tmp_path):
    with pytest.raises(ValueError, match="steps must be"):
        run("--debug", "sample", "--steps", 1, "--out", tmp_path / "x.png")
    with pytest.raises(ValueError, match="steps must be"):
        run("sample", "--steps", 1, "--out", tmp_path / "x.png", "--debug")


@pytest.mark.parametrize(
    "arguments",
    [
        ["sampel"],
        [],
        ["sample", "--sampler", "euler"],
        ["sample", "--n", "x"],
        ["sample", "--nope"],
    ],
)
def test_a_wrong_call_is_status_2_and_says_what_is_possible(arguments, capsys):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert any(word in text for word in ("sample, ", "sample  ", "ddim", "--n", "--nope"))


def test_help_lists_every_verb_and_every_flag(capsys):
    assert run("--help") == 0
    listed = capsys.readouterr().out
    assert cli.verbs()[0] == "sample" and "info" in cli.verbs()
    for verb in cli.verbs():
        assert f"  {verb} " in listed
        assert run(verb, "--help") == 0
        assert "usage: iddpm" in capsys.readouterr().out
    assert run("--version") == 0 and iddpm_ext.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("verb", cli.verbs())
def test_every_help_has_an_example_that_is_a_right_call(verb, capsys):
    from iddpm_ext.cli._flags import parse_and_call

    module = importlib.import_module(f"iddpm_ext.cli.{verb}")
    assert run(verb, "--help") == 0
    example = re.search(r"Example: (.*)", module.__doc__ or "")
    assert example is not None and f"Example: {example[1][:30]}" in capsys.readouterr().out
    words = shlex.split(example[1].removeprefix('eval "$(').removesuffix(')"'))
    assert words[:2] == ["iddpm", verb]
    called: list[object] = []

    @functools.wraps(module.run)
    def nothing(*_: Any, **given: Any) -> None:
        called.append(given)

    parse_and_call(nothing, words[2:], prog="iddpm", description="")
    assert called


def test_the_help_of_train_is_in_groups_and_every_setting_is_in_one(capsys):
    from iddpm_ext.training import TrainConfig

    assert run("train", "--help") == 0
    shown = capsys.readouterr().out
    groups = re.findall(r"(\w+) options\b", shown)
    assert groups == ["run", "image", "task", "network", "process", "loss", "optimiser", "speed",
                      "output", "start"]  # fmt: skip
    for field in dataclasses.fields(TrainConfig):
        assert f" --{field.name.replace('_', '-')}" in shown


def test_tuples_are_read_as_comma_separated_words():
    from iddpm_ext.cli._flags import parse_and_call

    seen: dict[str, Any] = {}

    def function(mult: tuple[int, ...] = (1, 2), rates: tuple[float, ...] | None = None) -> None:
        seen.update(mult=mult, rates=rates)

    parse_and_call(function, ["--mult", "1,2,4", "--rates", "0.9,0.99"], prog="x", description="")
    assert seen == {"mult": (1, 2, 4), "rates": (0.9, 0.99)}
    parse_and_call(function, [], prog="x", description="")
    assert seen == {"mult": (1, 2), "rates": None}


def test_info_prints_the_report_or_a_checkpoint(model, capsys):
    assert run("info") == 0
    assert "reverse_step" in capsys.readouterr().out
    assert run("info", "some.safetensors") == 0
    said = capsys.readouterr().out
    assert "num_classes" in said and "Diffusion(cosine, 100 steps" in said and "Boot" in said


def test_python_m_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "iddpm_ext", "--version"], capture_output=True, text=True,
        cwd=Path(__file__).parent.parent, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == f"iddpm {iddpm_ext.__version__}\n"


def test_torchrun_leaves_every_flag_of_ours_alone(tmp_path):
    """torchrun parses the whole line and takes prefixes of its own flags for abbreviations."""
    pytest.importorskip("torch.distributed.run")
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    for verb in ("sample", "train", "nll", "steps"):
        listed = subprocess.run(
            [sys.executable, "-m", "iddpm_ext", verb, "--help"], capture_output=True, text=True,
            env={**os.environ, "COLUMNS": "80"},  # wider, boxes of flags stand side by side
        ).stdout  # fmt: skip
        lines = re.findall(r"^│ (-(?!h).+)", listed, re.MULTILINE)
        assert len(lines) > 8 and any("--seed" in line for line in lines), verb
        for line in lines:
            spellings = re.findall(r"(?<!\S)--?[a-z][a-z-]*", line.split("  ")[0])
            usable = []
            for spelling in spellings:
                call = ["--nproc-per-node", "2", "-m", "iddpm_ext", verb, spelling, "1"]
                try:
                    usable.append(
                        parser.parse_args(call).training_script_args[-2:] == [spelling, "1"]
                    )
                except SystemExit:
                    usable.append(False)
            assert any(usable), f"{verb}: torchrun takes {spellings}"


def test_a_low_resolution_file_starts_super_resolution(model, tmp_path, monkeypatch):
    upsampler = UNet(UNetConfig(super_resolution=True, **SMALL))
    upsampler.diffusion, upsampler.extra = Diffusion("linear", 100), {}
    seen: list[torch.Tensor] = []
    upsampler.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["low_res"]), with_kwargs=True
    )
    monkeypatch.setattr(iddpm_ext, "load", lambda name, **_: upsampler)
    np.savez(tmp_path / "low.npz", np.array([0, 255], dtype=np.uint8).reshape(2, 1, 1, 1))
    assert run("sample", "--steps", 2, "--low-res", tmp_path / "low.npz", "--no-engine",
               "--out", tmp_path / "x.png") == 0  # fmt: skip
    assert seen[0].flatten().tolist() == [-1, 1]


def test_no_help_and_no_wrong_call_waits_for_torch():
    """Importing torch takes seconds."""
    code = (
        "import sys\n"
        "from iddpm_ext.cli import main, verbs\n"
        "for call in ['--help'], ['sampel'], *([verb, '--help'] for verb in verbs()), ['nll', '--nope']:\n"
        "    main(call)\n"
        "    if 'torch' in sys.modules: sys.exit(f'{call} imports torch')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_mistyped_verb_is_told_what_was_meant(capsys):
    assert run("sampel") == 2
    assert capsys.readouterr().err.endswith("got 'sampel'; did you mean sample?\n")
    assert run("abacus") == 2
    assert "did you mean" not in capsys.readouterr().err


def test_json_is_one_line_with_the_numbers_of_the_result(model, tmp_path, capsys):
    out = tmp_path / "x.npz"
    assert run("--json", "sample", "m", "--steps", 3, "-n", 2, "--seed", 5, "--out", out) == 0
    said = capsys.readouterr().out
    found = json.loads(said)
    assert said.count("\n") == 1 and found["files"] == [str(out)]
    assert (found["images"], found["seed"], found["steps_taken"]) == (2, 5, 3)
    assert run("info", "m", "--json") == 0
    assert json.loads(capsys.readouterr().out)["classes"] == "T-shirt/top, Bag, Boot"


def test_a_drawn_seed_is_said_and_draws_the_same_again(model, tmp_path, capsys):
    a, b = tmp_path / "a.npz", tmp_path / "b.npz"
    assert run("sample", "--steps", 2, "-n", 2, "--seed", "random", "--out", a) == 0
    seed = re.search(r", seed (\d+)\)", capsys.readouterr().out)
    assert seed and run("sample", "--steps", 2, "-n", 2, "--seed", seed[1], "--out", b) == 0
    assert (np.load(a)["arr_0"] == np.load(b)["arr_0"]).all()
    assert read_recipe(_png(tmp_path))["seed"] < 2**32


def _png(folder: Path) -> Path:
    path = folder / "random.png"
    assert run("sample", "--steps", 2, "-n", 1, "--seed", "random", "--out", path) == 0
    return path


def test_progress_is_shown_unless_quiet_is_asked_for(model, tmp_path, monkeypatch):
    from iddpm_ext.sampling import request

    shown: list[bool] = []
    make = request.make_request

    def spy(*args: Any, **kwargs: Any) -> Any:
        shown.append(kwargs["progress"])
        return make(*args, **kwargs)

    monkeypatch.setattr(request, "make_request", spy)
    for words in ((), ("--quiet",)):
        assert run("sample", "--steps", 2, "-n", 1, "--out", tmp_path / "x.png", *words) == 0
    assert shown == [True, False]


def test_a_terminal_hears_at_once_that_the_verb_began(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    said: list[str] = []
    monkeypatch.setattr(
        iddpm_ext, "load", lambda *_, **__: said.append(capsys.readouterr().err) or model
    )
    assert run("sample", "my.safetensors", "--steps", 2, "-n", 1, "--out", tmp_path / "x.png") == 0
    assert said == ["iddpm sample: loading my.safetensors ...\n"]


@pytest.mark.parametrize("words", ["info", "--help", "sample --help", "--version"])
def test_a_reader_of_the_output_that_leaves_early_is_no_error(words):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        command = [sys.executable, "-m", "iddpm_ext", *words.split()]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_interruption_is_status_130_and_one_line(model, tmp_path, monkeypatch, capsys):
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(iddpm_ext, "load", stop)
    assert run("sample", "--out", tmp_path / "x.png") == 130
    assert capsys.readouterr().err == "iddpm sample: interrupted\n"


def test_completion_knows_the_verbs_and_their_flags(capsys):
    assert run("completion", "bash") == 0
    script = capsys.readouterr().out
    assert "iddpm" in script and "guidance-scale" in script and "evaluate" in script
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr

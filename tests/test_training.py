"""The training loop: what it learns, writes, refuses, and what must not change its result."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from iddpm_ext.checkpoint.runs import (
    list_checkpoints,
    read_state,
    read_tensors,
    verify_checkpoint,
)
from iddpm_ext.training import TrainConfig, newest_checkpoint, train
from iddpm_ext.training.checkpoints import write_checkpoint
from iddpm_ext.training.rates import ema_decay, learning_rate
from iddpm_ext.training.step import positions_of


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Eight 8x8 images: two classes, bright above or bright below."""
    images = np.zeros((8, 8, 8), np.uint8)
    images[:4, :4], images[4:, 4:] = 255, 255
    path = tmp_path_factory.mktemp("data") / "bars.npz"
    np.savez(path, images=images, labels=np.repeat([0, 1], 4))
    return str(path)


def _config(data: str, out: Path, **changes) -> TrainConfig:
    base = TrainConfig(
        data=data, out=str(out), steps=4, batch_size=4, model_channels=32, num_res_blocks=1,
        channel_mult=(1,), attention_resolutions=(), diffusion_steps=50, lr=1e-3, ema=(0.9,),
        save_every=2, log_every=2, sample_every=0, progress=False, device="cpu",
    )  # fmt: skip
    return replace(base, **changes)


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(path, "model.safetensors")


def _records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_loss_falls_and_the_run_folder_is_complete(data, tmp_path):
    path = train(
        _config(
            data,
            tmp_path,
            steps=40,
            class_cond=True,
            label_dropout=0.2,
            sample_every=40,
            sample_steps=3,
            sample_count=4,
            save_every=10,
            keep=2,
            lr=3e-3,
        )
    )
    records = _records(tmp_path)
    assert path == tmp_path / "ckpt" / "step-40" and verify_checkpoint(path) is None
    assert [step for step, _ in list_checkpoints(tmp_path / "ckpt")] == [40, 30]
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    assert (tmp_path / "samples" / "step-40.png").exists()
    assert TrainConfig.from_json(tmp_path / "config.json").steps == 40
    wanted = {
        "step",
        "images",
        "lr",
        "loss",
        "mse",
        "vlb_bpd",
        "grad_norm",
        "loss_q0",
        "images_per_second",
    }
    assert wanted <= records[-1].keys()


def test_losses_are_logged_as_of_evenly_drawn_steps_whatever_draws_them(data, tmp_path):
    """The importance sampler draws the steps that lose most: unweighted means would be five times these."""
    logged = {}
    for sampler in ("uniform", "loss-second-moment"):
        train(
            _config(
                data, tmp_path / sampler, timestep_sampler=sampler, objective="vlb", lr=1e-12,
                diffusion_steps=10, batch_size=32, steps=75, save_every=75, log_every=25,
            )
        )  # fmt: skip
        late = _records(tmp_path / sampler)[1:]  # without the steps in which the sampler is uniform
        logged[sampler] = np.mean([[record["loss"], record["vlb_bpd"]] for record in late], axis=0)
    assert logged["loss-second-moment"] == pytest.approx(logged["uniform"], rel=0.25)


@pytest.mark.parametrize("objective", ["simple", "hybrid", "vlb"])
def test_every_objective_and_both_timestep_samplers_run(data, tmp_path, objective):
    config = _config(data, tmp_path, objective=objective, timestep_sampler="loss-second-moment")
    path = train(config)
    history = read_tensors(path, "timesteps.safetensors")
    assert int(history["counts"].sum()) == config.steps * config.batch_size


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2},
        {"workers": 1},
        {"gradient_checkpointing": True},
        {"log_every": 1, "save_every": 1},
        {"noise_scale": True, "accumulate": 2},
    ],
    ids=str,
)
def test_what_only_concerns_the_machine_leaves_the_gradient_alone(data, tmp_path, changes):
    plain, other = (
        read_tensors(train(_config(data, tmp_path / name, steps=1, **more)), "optim.safetensors")
        for name, more in (("a", {}), ("b", changes))
    )
    for name, value in plain.items():
        if name.startswith("exp_avg."):  # a tenth of the first step's gradient
            scale = max(float(value.abs().max()), 1e-6)
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-4 * scale)


def test_weights_repeat_and_depend_on_the_seed(data, tmp_path):
    config = _config(data, tmp_path / "a", dropout=0.2, flip=True)
    a = _weights(train(config))
    torch.rand(3)
    b = _weights(train(replace(config, out=str(tmp_path / "b"))))
    c = _weights(train(replace(config, out=str(tmp_path / "c"), seed=1)))
    assert _same(a, b) and not _same(a, c)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"dropout": 0.3, "flip": True, "class_cond": True, "label_dropout": 0.3},
        {"timestep_sampler": "loss-second-moment", "objective": "vlb", "diffusion_steps": 2},
        {
            "lr_warmup": 3,
            "lr_decay": True,
            "grad_clip": 0.1,
            "weight_decay": 0.1,
            "ema": (0.5, 0.9),
        },
    ],
    ids=str,
)
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(data, tmp_path, changes):
    whole = train(_config(data, tmp_path / "a", steps=8, **changes))
    # Steps are planned as 8 in both, so that the learning rate is the same.
    config = _config(data, tmp_path / "b", steps=8, save_every=3, **changes)
    _train_until(config, 3)
    resumed = train(config)
    assert resumed.name == whole.name == "step-8"
    for file in sorted(p.name for p in whole.glob("*.safetensors")):
        assert _same(read_tensors(whole, file), read_tensors(resumed, file)), file
    ours, theirs = read_state(whole), read_state(resumed)
    assert {k: ours[k] for k in ("step", "images", "updates", "scaler")} == {
        k: theirs[k] for k in ("step", "images", "updates", "scaler")
    }


def _train_until(config: TrainConfig, step: int) -> None:
    """Stops the run as a signal during step `step` would."""
    from iddpm_ext.training import loop

    original = loop.train_step

    def stopping(*arguments):
        if arguments[1].step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", stopping)
        path = train(config)
    assert path.name == f"step-{step}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_save_and_give_the_handlers_back(data, tmp_path, number, capsys):
    before = signal.getsignal(number)
    threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
    path = train(_config(data, tmp_path, steps=100_000, save_every=100_000))
    assert verify_checkpoint(path) is None and 0 < read_state(path)["step"] < 100_000
    assert signal.getsignal(number) is before
    assert f"stopped by {number.name}" in capsys.readouterr().err


def test_a_finished_run_returns_at_once_and_an_empty_folder_starts(data, tmp_path, capsys):
    config = _config(data, tmp_path)
    first = train(config)
    stamp = first.stat().st_mtime_ns
    assert train(config) == first and first.stat().st_mtime_ns == stamp
    assert "nothing to do" in capsys.readouterr().err


def _grids(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "samples").glob("*"))


def test_a_run_without_further_settings_draws_its_last_step_once(data, tmp_path, monkeypatch):
    import iddpm_ext

    written = []
    save_images = iddpm_ext.save_images
    monkeypatch.setattr(
        iddpm_ext, "save_images", lambda *a, **k: written.append(a[1].name) or save_images(*a, **k)
    )
    default = TrainConfig().sample_every
    assert default == 1000
    train(_config(data, tmp_path / "a", steps=2, sample_every=default, sample_steps=2))
    assert _grids(tmp_path / "a") == written == ["step-2.png"]
    written.clear()
    train(_config(data, tmp_path / "b", steps=4, sample_every=2, sample_steps=2))
    assert _grids(tmp_path / "b") == written == ["step-2.png", "step-4.png"]
    train(_config(data, tmp_path / "c", steps=2, sample_every=0))
    assert not (tmp_path / "c" / "samples").exists()


def test_grids_change_no_bit_of_the_run(data, tmp_path):
    changes = {"dropout": 0.2, "flip": True}
    plain = train(_config(data, tmp_path / "a", **changes))
    config = _config(data, tmp_path / "b", sample_every=1, sample_steps=2, **changes)
    _train_until(config, 3)
    drawn = train(config)
    for file in ("model.safetensors", "ema_0.9.safetensors", "optim.safetensors"):
        assert _same(read_tensors(drawn, file), read_tensors(plain, file)), file
    assert _grids(tmp_path / "b") == ["step-1.png", "step-2.png", "step-4.png"]


@pytest.mark.parametrize("steps", [3, 1000], ids=["the last step's", "another's"])
def test_a_wish_to_stop_ends_a_grid_half_way(data, tmp_path, steps, monkeypatch, capsys):
    import iddpm_ext

    walk, taken = iddpm_ext.sample_progressive, []

    def signalled(*arguments, **settings):
        for step in walk(*arguments, **settings):
            taken.append(step.t)
            if len(taken) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield step

    monkeypatch.setattr(iddpm_ext, "sample_progressive", signalled)
    path = train(_config(data, tmp_path, steps=steps, save_every=1000, sample_every=3))
    assert len(taken) == 2 and _grids(tmp_path) == []
    assert verify_checkpoint(path) is None and path.name == f"step-{min(steps, 4)}"


def test_resuming_with_another_batch_size_says_so_and_continues_the_data(data, tmp_path, capsys):
    train(_config(data, tmp_path))
    path = train(_config(data, tmp_path, steps=6, batch_size=2))
    assert read_state(path)["images"] == 4 * 4 + 2 * 2
    assert "batch_size is now 2, was 4" in capsys.readouterr().err


def test_resuming_another_network_is_refused_by_name(data, tmp_path):
    train(_config(data, tmp_path))
    with pytest.raises(ValueError, match=r"num_res_blocks=2 \(was 1\)"):
        train(_config(data, tmp_path, num_res_blocks=2))
    with pytest.raises(ValueError, match="resume='never'"):
        train(_config(data, tmp_path, resume="never"))


def test_a_new_average_on_resume_starts_at_the_weights_and_says_so(data, tmp_path, capsys):
    train(_config(data, tmp_path))
    train(_config(data, tmp_path, steps=6, ema=(0.9, 0.99)))
    assert "decay 0.99 is new" in capsys.readouterr().err


def test_records_after_the_last_checkpoint_are_dropped_on_resume(data, tmp_path):
    config = _config(data, tmp_path)
    train(config)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 1}\n{"step": 6, "lo')
    train(replace(config, steps=8))
    assert [r["step"] for r in _records(tmp_path)] == [2, 4, 6, 8]


def test_gradients_that_are_not_finite_change_nothing_and_end_the_run(data, tmp_path, monkeypatch):
    from iddpm_ext.diffusion import Diffusion

    train(_config(data, tmp_path))
    before = _weights(newest_checkpoint(tmp_path / "ckpt")[0])
    original = Diffusion.training_losses

    def poisoned(self, *arguments, **kwargs):
        losses = original(self, *arguments, **kwargs)
        return {**losses, "loss": losses["loss"] * float("nan")}

    monkeypatch.setattr(Diffusion, "training_losses", poisoned)
    path = train(_config(data, tmp_path, steps=6))
    assert _same(before, _weights(path)) and read_state(path)["updates"] == 4
    with pytest.raises(RuntimeError, match="gradients must be finite, got 20 steps"):
        train(_config(data, tmp_path, steps=60, save_every=60))


def test_average_follows_its_warm_up(data, tmp_path):
    path = train(_config(data, tmp_path, steps=1, save_every=1, ema=(0.9999,)))
    model, average = _weights(path), read_tensors(path, "ema_0.9999.safetensors")
    fresh = _weights(train(_config(data, tmp_path / "b", steps=1, lr=1e-30, ema=(0.5,))))
    name = "input_blocks.0.0.weight"
    # The first update has decay 1/10: the average is nine tenths of the way to the new weights.
    torch.testing.assert_close(average[name], fresh[name] + 0.9 * (model[name] - fresh[name]))


def test_rates_follow_their_formulas():
    assert learning_rate(0, peak=2.0, warmup=4, decay_to=None) == 0.5
    assert learning_rate(10, peak=2.0, warmup=4, decay_to=None) == 2.0
    assert learning_rate(50, peak=2.0, warmup=0, decay_to=100) == 1.0
    assert learning_rate(100, peak=2.0, warmup=0, decay_to=100) == 0.0
    assert [ema_decay(n, 0.5) for n in (0, 8, 100)] == [0.1, 0.5, 0.5]
    assert ema_decay(0, 0.5, warmup=False) == 0.5


def test_processes_share_each_batch_in_order():
    config = TrainConfig(data="d", out="o", batch_size=8, accumulate=2)
    parts = [positions_of(config, 16, rank, 2) for rank in (0, 1)]
    two_steps = [[next(part) for _ in range(4)] for part in parts]
    assert two_steps[0] == [[16, 17], [18, 19], [24, 25], [26, 27]]
    assert two_steps[1] == [[20, 21], [22, 23], [28, 29], [30, 31]]


def test_gradient_noise_scale_is_that_of_known_gradients():
    from iddpm_ext.training.step import MEASURES, summarise

    config = TrainConfig(data="d", out="o", batch_size=32, accumulate=4, noise_scale=True)
    signal_square, trace = 2.0, 12.0
    values = dict.fromkeys(MEASURES, 0.0)
    values["noise_small"] = signal_square + trace / 8
    values["noise_big"] = signal_square + trace / 32
    named = summarise(config, torch.tensor([*values.values(), *[0.0] * 4, *[1.0] * 4]), 1)
    assert named["grad_noise_scale"] == pytest.approx(trace / signal_square)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"steps": 0}, "steps must be above 0"),
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"ema": ()}, "ema must be"),
        ({"ema": (1.0,)}, r"ema must lie in \[0, 1\)"),
        ({"dtype": "int8"}, "dtype must be one of float32"),
        ({"objective": "hybrid", "variance": "fixed_small"}, "objective must be simple or vlb"),
        ({"label_dropout": 0.1}, "label_dropout must be 0 without class_cond"),
        ({"noise_scale": True}, "accumulate must be at least 2"),
        ({"noise_scale": True, "accumulate": 2, "fsdp": True}, "noise_scale must be off with fsdp"),
        ({"batch_size": 5, "accumulate": 2}, "batch_size must be a multiple"),
        ({"device": "tpu"}, "device must be"),
        ({"fsdp": True}, "fsdp must be off"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_named_before_any_work(data, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        train(_config(data, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_classes_are_asked_of_data_that_has_them(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="class_cond must be off"):
        train(_config(str(tmp_path / "a.npy"), tmp_path, class_cond=True))


def _folder_of_classes(path: Path) -> Path:
    """Two classes of three images, an unreadable one among them, and an empty class."""
    from PIL import Image

    for name in "ab":
        (path / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(path / name / f"{i}.png")
    (path / "a" / "1.png").write_bytes(b"no image")
    (path / "empty").mkdir()
    return path


def test_a_second_run_in_a_folder_is_refused_and_writes_nothing(data, tmp_path):
    from iddpm_ext.files import locked

    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    with locked(out, "train"), pytest.raises(RuntimeError, match="train: out must be in use by no"):
        train(_config(data, out))
    assert (out / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert [path.name for path in out.iterdir()] == ["metrics.jsonl"]
    train(_config(data, out))
    assert not (out / "lock").exists()


def test_the_first_lines_come_before_and_after_the_first_step(data, tmp_path, capsys, monkeypatch):
    from iddpm_ext.training import loop

    steps = []

    def step(*arguments):
        steps.append(capsys.readouterr().err)
        return train_step(*arguments)

    train_step = loop.train_step
    monkeypatch.setattr(loop, "train_step", step)
    train(_config(data, tmp_path, steps=3, progress=True, log_every=100))
    assert steps[0].splitlines()[0] == f"reading {data}"
    assert re.search(r"^training [\d,]+ parameters on cpu$", steps[0], re.MULTILINE)
    # The first step packs weights and starts threads: by its pace a short run would seem to take hours.
    assert re.fullmatch(r"step 1/3: loss \d+\.\d{4}\n", steps[1])
    assert steps[2] == "", "then one per minute"
    last = capsys.readouterr().err
    assert re.fullmatch(r"step 3/3: loss \d+\.\d{4}, \d+\.\d images/s\n", last)


def test_images_a_second_do_not_count_the_drawing_of_grids(data, tmp_path, monkeypatch):
    """By a clock that a step moves by a second and a grid by a thousand."""
    from iddpm_ext.training import loop

    now = 0.0

    def passing(seconds, function):
        def timed(*arguments, **more):
            nonlocal now
            now += seconds
            return function(*arguments, **more)

        return timed

    monkeypatch.setattr(loop.time, "monotonic", lambda: now)
    monkeypatch.setattr(loop, "train_step", passing(1, loop.train_step))
    monkeypatch.setattr(loop, "_draw_samples", passing(1000, lambda *_: None))
    train(_config(data, tmp_path, steps=8, batch_size=4, log_every=2, sample_every=3, keep=1))
    records = _records(tmp_path)
    assert [record["images_per_second"] for record in records] == [4.0] * 4
    # By steps 4 and 6 one grid had been drawn: the time left has its share of grids to come.
    assert [record["eta_seconds"] for record in records] == [6, 4 * 1004 // 4, 2 * 1006 // 6, 0]


def test_sizes_that_differ_are_refused_before_any_work(tmp_path):
    from PIL import Image

    folder = _folder_of_classes(tmp_path / "d")
    Image.new("RGB", (8, 9)).save(folder / "b" / "2.png")
    with pytest.raises(ValueError, match="image_size must be given where sizes differ"):
        train(_config(str(folder), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_is_odd_about_the_data_is_said_once(tmp_path, capsys):
    folder = _folder_of_classes(tmp_path / "d")
    odd = {"class_cond": True, "attention_resolutions": (8, 5, 3), "steps": 8}
    train(_config(str(folder), tmp_path / "out", **odd))
    said = capsys.readouterr().err
    assert said.count("classes without images: empty") == 1
    assert said.count("names 5, 3, but the features are 8 wide: no attention there") == 1
    assert said.count("skipped an image: ") == said.count("a/1.png") == 1
    # All 32 places of 8 steps, in passes over 6 images.
    assert _records(tmp_path / "out")[-1]["bad_images"] in (5, 6)
    train(_config(str(folder), tmp_path / "b", attention_resolutions=(8,)))
    said = capsys.readouterr().err
    assert "without images" not in said and "attention" not in said
    assert "the 32 channels of the first level are normalised one by one" in said
    train(_config(str(folder), tmp_path / "c", channel_mult=(2,), steps=1))
    assert "one by one" not in capsys.readouterr().err


def test_a_signal_to_the_decoding_processes_too_saves_all_the_same(data, tmp_path):
    """As `timeout`, Slurm and systemd send it: to every process of the run."""
    program = (
        "import sys; from iddpm_ext.training import TrainConfig, train;"
        "train(TrainConfig.from_json(sys.argv[1]))"
    )
    config = _config(data, tmp_path / "out", steps=100_000, save_every=100_000, workers=2)
    (tmp_path / "c.json").write_text(json.dumps({**config.to_dict(), "log_every": 1}))
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(tmp_path / "c.json")]
    process = subprocess.Popen(command, env=variables, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            if (tmp_path / "out" / "metrics.jsonl").exists() and _records(tmp_path / "out"):
                break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(300) == 0
    finally:
        process.kill()
    ((_, path),) = list_checkpoints(tmp_path / "out" / "ckpt")
    assert verify_checkpoint(path) is None


def test_numbers_that_are_not_finite_are_null_in_the_records(tmp_path):
    from iddpm_ext.training.log import RunLog

    quiet = {"main": True, "tensorboard": False, "progress": False}
    with RunLog(tmp_path, 0, 10, **quiet) as log:
        values = {"step": 1, "loss": float("nan"), "images_per_second": 2.5}
        log.record({**values, "grad_noise_scale": float("inf")})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {
        "step": 1, "loss": None, "images_per_second": 2.5, "grad_noise_scale": None,
    }  # fmt: skip


def test_tensorboard_gets_the_numbers_of_the_records(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = _config(data, tmp_path, tensorboard=True)
    _train_until(replace(config, save_every=3), 3)
    train(config)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    records = _records(tmp_path)
    assert [r["step"] for r in records] == [2, 3, 4]
    for name in ("loss", "grad_norm", "lr", "images_per_second"):
        written = [(e.step, e.value) for e in events.Scalars(name)]
        assert written == [(r["step"], pytest.approx(r[name])) for r in records], name
    assert {f"loss_q{i}" for i in range(4)} <= set(events.Tags()["scalars"])


def test_tensorboard_gets_the_grids_of_samples(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(_config(data, tmp_path, tensorboard=True, sample_every=2, sample_steps=2, sample_count=2))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = events.Images("samples")
    assert [event.step for event in shown] == [2, 4]
    for event in shown:
        with (
            Image.open(io.BytesIO(event.encoded_image_string)) as theirs,
            Image.open(tmp_path / "samples" / f"step-{event.step}.png") as ours,
        ):
            assert np.array_equal(np.asarray(theirs), np.asarray(ours.convert("RGB")))


def test_unknown_settings_in_a_file_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="TrainConfig: path must be a file, got"):
        TrainConfig.from_json(tmp_path / "c.json")
    (tmp_path / "c.json").write_text('{"data": "d", "out": "o", "stepps": 3}')
    with pytest.raises(ValueError, match="stepps"):
        TrainConfig.from_json(tmp_path / "c.json")


def test_configuration_survives_its_file(tmp_path):
    config = TrainConfig(data="d", out="o", channel_mult=(1, 3), ema=(0.9, 0.99), grad_clip=1.0)
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    assert TrainConfig.from_json(tmp_path / "c.json") == config


def _write(folder: Path, step: int, keep: int = 3) -> Path:
    tensors = {"a.safetensors": ({"x": torch.full((64,), float(step))}, None)}
    return write_checkpoint(folder, step, tensors, {"step": step}, keep)


def test_every_damaged_byte_is_found_and_the_older_checkpoint_taken(tmp_path):
    old, new = _write(tmp_path, 1), _write(tmp_path, 2)
    generator = np.random.default_rng(0)
    for _ in range(200):
        files = sorted(new.iterdir())
        path = files[generator.integers(len(files))]
        good = path.read_bytes()
        at = int(generator.integers(len(good)))
        cut = generator.random() < 0.3
        path.write_bytes(
            good[:at] if cut else good[:at] + bytes([good[at] ^ 0x15]) + good[at + 1 :]
        )
        found, skipped = newest_checkpoint(tmp_path)
        # A changed blank in the manifest may leave its meaning: then the files still verify.
        assert (found == old and len(skipped) == 1) or (
            found == new and path.name == "MANIFEST.json"
        )
        path.write_bytes(good)
    assert newest_checkpoint(tmp_path) == (new, [])


def test_missing_files_and_leftovers_are_no_checkpoint(tmp_path):
    new = _write(tmp_path, 2)
    (tmp_path / ".step-3.tmp-1").mkdir()
    (tmp_path / "step-4").mkdir()
    found, skipped = newest_checkpoint(tmp_path)
    assert found == new and len(skipped) == 1 and "step-4" in skipped[0]
    _write(tmp_path, 5)
    assert not (tmp_path / ".step-3.tmp-1").exists()


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    old = _write(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        _write(tmp_path, 2)
    assert newest_checkpoint(tmp_path) == (old, []) and len(list(tmp_path.iterdir())) == 1


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 11):
        _write(tmp_path, step, keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [11, 10]


def test_an_unsound_later_checkpoint_takes_no_ones_place(tmp_path):
    (tmp_path / "step-9").mkdir()
    for step in (1, 2, 3):
        path = _write(tmp_path, step, keep=1)
        assert newest_checkpoint(tmp_path)[0] == path
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9, 3]


def test_checkpoint_files_are_readable_as_the_umask_says(tmp_path):
    previous = os.umask(0o022)
    try:
        path = _write(tmp_path, 1)
    finally:
        os.umask(previous)
    assert (path / "a.safetensors").stat().st_mode & 0o777 == 0o644


def test_processes_that_do_not_speak_want_no_line_and_write_nothing(tmp_path):
    from iddpm_ext.training.log import RunLog

    with RunLog(tmp_path, 0, 3, main=False, tensorboard=False, progress=True) as log:
        log.step()
        assert not log.due(1) and not log.due(3)
        log.record({"step": 1})
        log.say("nothing")
    assert list(tmp_path.iterdir()) == []

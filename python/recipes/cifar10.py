"""Train the class-conditional CIFAR-10 network within a given time, or for a number of steps.

    python python/recipes/cifar10.py --data cifar10/train --out runs/cifar10 --minutes 30

The learning rate is constant for the first six tenths of the time; the speed in them determines how many
steps fit into the rest, over which the rate falls to zero. With --steps both parts have fixed numbers of
steps. The decisions and the time spent are stored in OUT/recipe.json: stopped and called again, on this
machine or another, the training continues from its newest valid checkpoint. In the end it writes the
averaged weights as float16, cifar10-ema-DECAY, and a sheet of samples, to OUT or to --export. Files above
15 MB are written in parts: `cat FILE.* > FILE` joins them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import iddpm_ext
from iddpm_ext.checkpoint.runs import ema_file
from iddpm_ext.files import write_whole
from iddpm_ext.text import duration
from iddpm_ext.training import TrainConfig, newest_checkpoint, read_records, train

CONSTANT = 0.6  # share of the time, or of the steps, with a constant learning rate
MARGIN = 0.93  # share of the rest that is planned: the training starts anew, and the device may slow down
OPEN_END = 1_000_000_000  # steps of a part that the clock ends
PART_MB = 15


def configuration(arguments: argparse.Namespace) -> TrainConfig:
    """The configuration of the whole training, except for the number of steps."""
    return TrainConfig(
        data=str(arguments.data),
        out=str(arguments.out),
        batch_size=arguments.batch_size,
        flip=True,
        workers=arguments.workers,
        cache=True,
        class_cond=True,
        label_dropout=0.1,
        model_channels=arguments.width,
        num_res_blocks=arguments.res_blocks,
        channel_mult=tuple(arguments.channel_mult),
        attention_resolutions=tuple(arguments.attention),
        objective="hybrid",
        lr=arguments.lr,
        lr_warmup=arguments.lr_warmup,
        ema=(0.999, 0.9995),
        grad_clip=1.0,
        dtype=arguments.dtype,
        save_every=arguments.save_every,
        keep=2,
        sample_every=0,
        device=arguments.device,
    )


class Plan:
    """The decisions in OUT/recipe.json, in their order."""

    def __init__(self, out: Path):
        self._path = out / "recipe.json"
        found = self._path.is_file()
        self.decided: dict[str, Any] = json.loads(self._path.read_text()) if found else {}

    def __getitem__(self, name: str) -> Any:
        return self.decided.get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.decided[name] = value
        write_whole(self._path, (json.dumps(self.decided, indent=1) + "\n").encode())


def say(text: str) -> None:
    """Prints a message."""
    print(text, file=sys.stderr, flush=True)


def images_per_second(out: Path) -> float:
    """The speed of the second half of a run's records, over which it may vary."""
    found = read_records(out)
    half = found[len(found) // 2 :]
    seconds = sum(
        (record["images"] - before["images"]) / record["images_per_second"]
        for before, record in itertools.pairwise(half)
    )
    if not seconds:
        return float(half[-1]["images_per_second"])
    return float((half[-1]["images"] - half[0]["images"]) / seconds)


def steps_within(seconds: float, rate: float, config: TrainConfig) -> int:
    """How many steps fit into the time."""
    return max(1, int(seconds * MARGIN * rate / config.batch_size))


def until(deadline: float, work: Callable[[], object]) -> bool:
    """Runs `work`, which SIGUSR1 stops; whether `deadline`, of time.monotonic, came before its end."""
    finished = threading.Event()

    def ask() -> None:
        # Again every second: a training that is still reading its data does not listen yet.
        seconds = max(0.0, deadline - time.monotonic())
        while not finished.wait(seconds):
            os.kill(os.getpid(), signal.SIGUSR1)
            seconds = 1.0

    asking = threading.Thread(target=ask)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    asking.start()
    try:
        work()
        return time.monotonic() >= deadline
    finally:
        finished.set()
        asking.join()
        signal.signal(signal.SIGUSR1, before)


def time_spent(plan: Plan, config: TrainConfig) -> float:
    """Seconds of training so far; of a run that was killed, those in its records."""
    found = read_records(Path(config.out))
    return max(plan["spent"] or 0.0, found[-1]["seconds"] if found else 0.0)


def constant_part(plan: Plan, config: TrainConfig, seconds: float) -> bool:
    """Trains with a constant learning rate; whether that part is complete."""
    if plan["constant_steps"] is None:
        began, spent = time.monotonic(), time_spent(plan, config)
        left = CONSTANT * seconds - spent
        say(f"constant learning rate for {duration(max(left, 0.0))}")
        timed = dataclasses.replace(config, steps=OPEN_END, progress=False)
        on_time = until(began + left, lambda: train(timed))
        plan["spent"] = spent + time.monotonic() - began
        if not on_time:
            return False
        plan["constant_steps"] = reached(config)
    elif reached(config) < plan["constant_steps"]:
        train(dataclasses.replace(config, steps=plan["constant_steps"]))
    return reached(config) >= plan["constant_steps"]


def reached(config: TrainConfig) -> int:
    """The step of the newest checkpoint."""
    newest, _ = newest_checkpoint(Path(config.out) / "ckpt")
    return 0 if newest is None else int(newest.name.removeprefix("step-"))


def fall(plan: Plan, config: TrainConfig, left: float) -> TrainConfig:
    """The configuration of the second part, in which the learning rate falls to zero in `left` seconds."""
    constant = plan["constant_steps"]
    if plan["steps"] is None:
        rate = images_per_second(Path(config.out))
        plan["images_per_second"] = rate
        plan["steps"] = constant + steps_within(max(left, 0.0), rate, config)
        say(
            f"step {constant}, {rate:.0f} images/s: the learning rate falls to zero at step "
            f"{plan['steps']}, in {duration(max(left, 0.0))}"
        )
    steps = plan["steps"]
    # A straight line to zero at the last step that passes through the constant rate where this part begins.
    peak = config.lr / (1 - constant / steps)
    return dataclasses.replace(config, steps=steps, lr=peak, lr_decay=True)


def export(config: TrainConfig, checkpoint: Path, folder: Path) -> list[Path]:
    """Writes the averaged weights as float16, large files in parts."""
    files = []
    for decay in config.ema:
        model = iddpm_ext.load(checkpoint / ema_file(decay))
        target = folder / f"cifar10-ema-{decay:g}.safetensors"
        iddpm_ext.save(model, target, dtype=torch.float16)
        files += in_parts(target)
    return files


def in_parts(path: Path, megabytes: int = PART_MB) -> list[Path]:
    """The file itself if it is small enough, else its parts, which replace it."""
    data, size = path.read_bytes(), megabytes << 20
    if len(data) <= size:
        return [path]
    parts = []
    for number, begin in enumerate(range(0, len(data), size)):
        parts.append(path.with_name(f"{path.name}.{number}"))
        write_whole(parts[-1], data[begin : begin + size])
    path.unlink()
    return parts


def draw(config: TrainConfig, checkpoint: Path, count: int, path: Path) -> Path:
    """A sheet of samples, the classes in turn."""
    model = iddpm_ext.load(checkpoint / ema_file(config.ema[0])).to(_device(config))
    classes = model.config.num_classes
    assert classes is not None
    labels = torch.arange(count, dtype=torch.int64, device="cpu") % classes
    images = iddpm_ext.sample(model, 50, labels=labels, progress=False)
    iddpm_ext.save_images(images, path, recipe={"steps": 50, "seed": 0})
    return path


def _device(config: TrainConfig) -> str:
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def parser() -> argparse.ArgumentParser:
    """The command line's."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--data", type=Path, required=True, help="a folder a class, or an archive")
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--export", type=Path, help="where weights and samples go; OUT if not given")
    length = found.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=30.0, help="of training, in all calls")
    length.add_argument(
        "--steps", type=int, help="instead of a time: the same training on any device"
    )
    found.add_argument("--batch-size", type=int, default=128)
    found.add_argument("--width", type=int, default=64)
    found.add_argument("--res-blocks", type=int, default=3)
    found.add_argument("--channel-mult", type=int, nargs="+", default=[1, 2, 3])
    found.add_argument("--attention", type=int, nargs="+", default=[16, 8])
    found.add_argument("--lr", type=float, default=8e-4)
    found.add_argument("--lr-warmup", type=int, default=500)
    found.add_argument("--dtype", default="bfloat16")
    found.add_argument("--save-every", type=int, default=2000)
    found.add_argument("--workers", type=int, default=4, help="that decode, once")
    found.add_argument("--samples", type=int, default=100)
    found.add_argument("--device", default="auto")
    return found


def main() -> int:
    """Trains for the remaining time, exports and draws; returns 1 if the run was stopped before its end."""
    arguments = parser().parse_args()
    config, seconds = configuration(arguments), 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(arguments.out)
    if arguments.steps is not None and plan["steps"] is None:
        plan["constant_steps"], plan["steps"] = int(CONSTANT * arguments.steps), arguments.steps
    if not constant_part(plan, config, seconds):
        return 1
    second = fall(plan, config, seconds - (plan["spent"] or 0.0))
    checkpoint = train(second)
    if reached(config) < second.steps:
        return 1
    folder = arguments.export or arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    files = export(config, checkpoint, folder)
    if arguments.samples:
        files.append(draw(config, checkpoint, arguments.samples, folder / "samples.png"))
    for file in files:
        print(f"{file}  {file.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

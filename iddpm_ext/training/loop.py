"""The training loop."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor

import iddpm_ext
from iddpm_ext.data import CachedData, ImageData, Order, batches, empty_classes, open_data
from iddpm_ext.data.classes import shown
from iddpm_ext.files import write_whole
from iddpm_ext.networks.config import NUM_GROUPS
from iddpm_ext.text import duration

from .averages import drop_after
from .captured import why_not_captured
from .config import TrainConfig
from .design import Design, design_of_checkpoint, design_of_file, design_of_settings
from .initial import start_from
from .log import RunLog, say
from .memory import keep_freed_memory
from .parallel import Parallel
from .resume import find_resume, require_same_data
from .signals import StopSignals
from .state import TrainState, new_state
from .step import positions_of, reduced, summarise, train_step

# Steps in a row without a finite gradient that end a run; float16 needs a few to find its scale.
_MAX_SKIPPED = 20
# Steps between exchanges on whether to stop, for which processes wait for one another.
_AGREE_EVERY = 5


def train(config: TrainConfig) -> Path:
    """Trains a network as `config` says and returns the path of the last checkpoint.

    If the folder holds a run, it is resumed: weights, optimiser, averages, loss scale, the sampler's history
    and the position in the data are restored from the newest valid checkpoint. On the CPU with a fixed
    number of threads, a run that was stopped and resumed ends with the same bits as one that was not.
    SIGTERM, SIGINT and SIGUSR1 save a checkpoint and return early. Under torchrun all processes train one
    network. On the CPU, glibc keeps freed memory in this process from then on (`memory.keep_freed_memory`).

    Raises:
        ValueError, FileNotFoundError: the data or the configuration cannot be used.
        RuntimeError: 20 steps in a row had no finite gradient.
    """
    for name in ("data", "out"):
        if not getattr(config, name):
            raise ValueError(f"train: {name} must be given, got an empty string")
    out, folder = Path(config.out), Path(config.out) / "ckpt"
    with (
        Parallel(config.device, sharded=config.fsdp) as parallel,
        StopSignals() as stop,
        parallel.holding(out),
    ):
        if config.batch_size % (config.accumulate * parallel.size):
            raise ValueError(
                f"train: batch_size must be a multiple of accumulate {config.accumulate} times "
                f"{parallel.size} processes, got {config.batch_size}"
            )
        if parallel.device.type == "cpu":
            keep_freed_memory()
        if parallel.rank == 0:
            say(f"reading {config.data}")
        data = _open(config)
        newest, notes = find_resume(folder, config, parallel.size)
        if newest is not None:
            notes += require_same_data(newest, config, data)
        design = _design(config, data, newest)
        notes += design.notes
        state = new_state(config, data.image_shape, data.class_names, parallel, design)
        state.data_images = len(data)
        if newest is not None:
            notes += state.restore(newest)
        elif design.start is not None:
            notes += start_from(state, config, design.start)
        del design  # frees the file's tensors
        if parallel.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            drop_after(out, state.step)
            _write_json(out / "config.json", config)
        parallel.barrier()
        log = RunLog(
            out, state.step, config.steps,
            main=parallel.rank == 0, tensorboard=config.tensorboard, progress=config.progress,
        )  # fmt: skip
        with log, _own_generator():
            notes += [*_notes_on(data, config, state), *_notes_on_device(config, parallel)]
            for note in (*notes, _announcement(state, parallel)):
                log.say(note)
            if newest is not None and state.step >= config.steps:
                log.say(f"nothing to do: {newest} has all of the {config.steps} steps")
                return newest
            return _run(config, state, data, parallel, log, stop)


def _run(
    config: TrainConfig,
    state: TrainState,
    data: ImageData,
    parallel: Parallel,
    log: RunLog,
    stop: StopSignals,
) -> Path:
    folder = Path(config.out) / "ckpt"
    positions = positions_of(config, state.images, parallel.rank, parallel.size)
    if config.cache:
        began = time.monotonic()
        data = CachedData(data, config.workers)
        log.say(f"decoded {len(data)} images into memory, {duration(time.monotonic() - began)}")
    workers = 0 if config.cache else config.workers
    source = batches(
        data, Order(len(data), config.seed), positions, workers, random_crop=config.random_crop
    )
    meter = _Meter(config, state, parallel)
    bad_images, named = 0, set[str]()
    while True:
        measures, complaints = train_step(config, state, source, parallel)
        bad_images += len(complaints)
        for complaint in complaints:
            # Once, not in every pass over the data.
            if complaint not in named:
                log.say(f"skipped an image: {complaint}")
            named.add(complaint)
        log.step()
        meter.add(measures)
        if log.due(state.step):
            log.line(meter.glance())
        done = state.step >= config.steps
        stopping = _agreed(stop.received is not None, state.step, parallel)
        save = done or stopping or state.step % config.save_every == 0
        if save or state.step % config.log_every == 0:
            _require_finite(state, folder)
        if state.step % config.log_every == 0 or done or stopping:
            skipped = parallel.sum(
                torch.tensor(bad_images, dtype=torch.int64, device=parallel.device)
            )
            log.record({**meter.record(), "bad_images": int(skipped)})
        # Before the checkpoint: a run that is stopped between them goes on from before both.
        if config.ema_profile == "power" and _stored_now(config, state.step, done):
            state.store_averages(Path(config.out), parallel)
        if save:
            path = state.save(folder, config, parallel)
        drawn = config.sample_every and not config.classifier
        if drawn and (done or state.step % config.sample_every == 0):
            with meter.paused():
                _draw_samples(config, state, data, parallel, stop, log)
        if stopping and not done:
            log.say(f"stopped by {stop.received or 'another process'}; saved {path}")
        if done or stopping:
            return path


def _stored_now(config: TrainConfig, step: int, done: bool) -> bool:
    """Whether the averages of this step are kept; never because a run is stopped at it."""
    return done or step % (config.ema_every or config.save_every) == 0


class _Meter:
    """Sums the measures between two records, and measures the time."""

    def __init__(self, config: TrainConfig, state: TrainState, parallel: Parallel):
        self._config, self._state, self._parallel = config, state, parallel
        self._started, self._seconds_before = time.monotonic(), state.seconds
        # Start of the measured interval, moved on by pauses; and images by then.
        self._last = (self._started, state.images)
        self._drawn = 0.0
        # When the first step was done, which also packs weights, starts threads and captures graphs.
        self._warm: tuple[float, int] | None = None
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, measures: Tensor) -> None:
        self._sum = measures if self._sum is None else self._sum + measures
        self._count += 1
        now = time.monotonic()
        self._state.seconds = self._seconds_before + now - self._started
        if self._warm is None:
            self._warm = (now, self._state.images)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time counts for the remaining time, not for the images per second."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self._drawn += seconds
        self._last = (self._last[0] + seconds, self._last[1])

    def glance(self) -> dict[str, float | int]:
        """The numbers of a line: those of this process alone, without waiting for others.

        There is no pace after the first step of this process, which is far slower than later ones.
        """
        assert self._sum is not None and self._warm is not None
        loss = summarise(self._config, self._sum / self._count, self._parallel.size)["loss"]
        since = max(self._last, self._warm)
        pace = self._pace(time.monotonic(), since) if self._state.images > since[1] else {}
        return {"step": self._state.step, "loss": loss, **pace}

    def _pace(self, now: float, since: tuple[float, int]) -> dict[str, float | int]:
        """Images per second from `since`, (time, images), and the remaining seconds at that pace."""
        then, images = since
        rate = (self._state.images - images) / max(now - then, 1e-9)
        left = (self._config.steps - self._state.step) * self._config.batch_size / rate
        training = max(now - self._started - self._drawn, 1e-9)
        return {
            "images_per_second": round(rate, 2),
            "eta_seconds": round(left * (1 + self._drawn / training)),
        }

    def record(self) -> dict[str, float | int]:
        """The record of the steps since the last one; every process must call it."""
        assert self._sum is not None
        state, now = self._state, time.monotonic()
        mean = self._parallel.mean(self._sum / self._count)
        self._sum, self._count = None, 0
        pace = self._pace(now, self._last)
        self._last = (now, state.images)
        return {
            "step": state.step,
            "images": state.images,
            "seconds": round(state.seconds, 1),
            **pace,
            "lr": state.optimizer.param_groups[0]["lr"],
            **summarise(self._config, mean, self._parallel.size),
            "loss_scale": state.scaler.get_scale(),
        }


def _agreed(wish: bool, step: int, parallel: Parallel) -> bool:
    """Whether any process wants to stop; all processes find out at the same step."""
    if parallel.size == 1:
        return wish
    return step % _AGREE_EVERY == 0 and parallel.any(wish)


def _require_finite(state: TrainState, folder: Path) -> None:
    skipped = int(state.skipped)
    if skipped >= _MAX_SKIPPED:
        raise RuntimeError(
            f"train: gradients must be finite, got {skipped} steps in a row without, up to step "
            f"{state.step}; the last checkpoint in {folder} is from before. Try a lower lr, a longer "
            "lr_warmup, grad_clip, or bfloat16 instead of float16"
        )


def _draw_samples(
    config: TrainConfig,
    state: TrainState,
    data: ImageData,
    parallel: Parallel,
    stop: StopSignals,
    log: RunLog,
) -> None:
    """Writes a grid of samples of the averaged weights to out/samples, always from the same noise.

    A super-resolution network enlarges the first images of the data, reduced in size.

    Once the run is asked to stop, sampling is abandoned: whoever asks may not wait so long.
    """
    model = state.averaged_model(parallel)
    if model is not None:
        classes = model.config.num_classes
        labels = None
        if classes is not None:
            counted = torch.arange(config.sample_count, dtype=torch.int64, device="cpu")
            labels = counted % classes
        low_res, count = None, config.sample_count
        if state.low_res is not None:
            first = torch.arange(min(count, len(data)), dtype=torch.int64, device="cpu")
            images, used, _ = data.images(first)
            low_res, count = reduced(images.to(parallel.device), state.low_res), len(images)
            labels = None if labels is None else data.labels(used)
        assert model.diffusion is not None
        chain = iddpm_ext.sample_progressive(
            model,
            steps=min(config.sample_steps, model.diffusion.num_timesteps),
            n=count,
            labels=labels,
            low_res=low_res,
            seed=config.seed,
            progress=False,
        )
        for step in chain:
            images = step.x
            if stop.received is not None:
                break
        else:
            folder = Path(config.out) / "samples"
            folder.mkdir(exist_ok=True)
            path = iddpm_ext.save_images(
                images,
                folder / f"step-{state.step}.png",
                recipe={"step": state.step, "seed": config.seed, "steps": config.sample_steps},
                labels=labels,
                class_names=state.class_names,
            )
            log.picture("samples", path, state.step)
    parallel.barrier()


def _design(config: TrainConfig, data: ImageData, newest: Path | None) -> Design:
    """The design from the checkpoint if the run is resumed, else from `init_from`, else from the settings."""
    if newest is not None:
        return design_of_checkpoint(config, newest)
    if config.init_from:
        return design_of_file(config, data.image_shape, data.class_names)
    return design_of_settings(config, data.image_shape, data.class_names)


def _open(config: TrainConfig) -> ImageData:
    data = open_data(
        config.data,
        split=config.split,
        image_size=config.image_size,
        channels=config.channels,
        bad_images=config.bad_images,
        classes=config.classes,
        value_range=config.value_range,
        alpha=config.alpha,
    )
    if (config.class_cond or config.classifier) and data.class_names is None:
        setting = "classifier" if config.classifier else "class_cond"
        raise ValueError(
            f"train: {setting} must be off for data without classes (every image in a folder of its "
            "class, or names that begin with it and '_'; two images per class on average), "
            f"got on for {'; '.join([config.data, *data.notes])}"
        )
    _, height, width = data.image_shape
    low, side = config.super_resolution, max(height, width)
    if low is not None and low >= side:
        raise ValueError(
            f"train: super_resolution must be below the side of the images, {side}, got {low}"
        )
    if low is not None and low * min(height, width) % side:
        raise ValueError(
            f"train: super_resolution must be the longer side of images of whole pixels, the other one "
            f"{low}/{side} of {min(height, width)}, got {low}"
        )
    return data


def _notes_on(data: ImageData, config: TrainConfig, state: TrainState) -> list[str]:
    channels, height, width = data.image_shape
    classes = f", {len(data.class_names)} classes" if data.class_names else ""
    notes = [
        f"{config.data}: {len(data)} images of {channels}x{height}x{width}{classes}",
        *data.notes,
    ]
    if len(data) < config.batch_size:
        notes.append(
            f"there are fewer images than the {config.batch_size} of a batch: batches repeat them"
        )
    network = state.model.config
    if network.num_classes is not None and data.class_names:
        empty = empty_classes(data)
        notes += [f"classes without images: {shown(empty)}"] if empty else []
    sides = [max(height, width) >> level for level in range(len(network.channel_mult))]
    unused = [side for side in network.attention_resolutions if side not in sides]
    if unused:
        notes.append(
            f"attention_resolutions names {', '.join(map(str, unused))}, but the features are "
            f"{', '.join(map(str, sides))} wide: no attention there (--attention-resolutions {sides[-1]} "
            "for the smallest)"
        )
    if network.model_channels * network.channel_mult[0] == NUM_GROUPS and not config.classifier:
        notes.append(
            f"the {NUM_GROUPS} channels of the first level are normalised one by one, which hides "
            "brightness and colour from the output: samples will be tinted, 64 channels are far better"
        )
    return notes


def _notes_on_device(config: TrainConfig, parallel: Parallel) -> list[str]:
    reason = why_not_captured(config, parallel.device)
    if parallel.device.type != "cuda" or reason is None:
        return []
    return [f"kernels are launched one by one, without a CUDA graph: {reason}"]


def _announcement(state: TrainState, parallel: Parallel) -> str:
    parameters = sum(p.numel() for p in state.model.parameters())
    processes = f", {parallel.size} processes" if parallel.size > 1 else ""
    return f"training {parameters:,} parameters on {parallel.device}{processes}"


def _own_generator() -> AbstractContextManager[None]:
    """A context that restores the global generators at its end, so that they may be seeded in it."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices=devices)


def _write_json(path: Path, config: TrainConfig) -> None:
    write_whole(path, (json.dumps(config.to_dict(), indent=1) + "\n").encode())

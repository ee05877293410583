"""The parts on the run and the checkpoint: losses, and the configuration."""

from __future__ import annotations

import json
import shlex

from iddpm_ext.report.charts import Line, chart
from iddpm_ext.report.elements import Body, Chart, Command, Missing, Table, Text
from iddpm_ext.report.subject import Subject
from iddpm_ext.training import read_records

_POINTS = 400


def training(subject: Subject) -> Body:
    """The losses of the run by quarter of t, and whether to train on."""
    if subject.run is None:
        raise Missing(
            "This is a checkpoint without its run's metrics.jsonl; give the run's folder to see it."
        )
    records = read_records(subject.run)
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
    further: list[Command] = []
    if falling and settings.is_file():
        # The file names data and folder, so that the run is resumed.
        file = shlex.quote(str(settings))
        further = [Command(f"iddpm train --config-file {file} --steps {2 * last['step']}")]
    return Body((Text(words + "."), Chart(svg, alt), advice, *further), facts)


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

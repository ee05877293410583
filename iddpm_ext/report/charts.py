"""Charts as SVG that adapts to the page: to its text colour, its width, light and dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Placeholder for the page's text colour, which is unknown when the chart is drawn.
_INK = "#010203"
# Distinguishable on white and on black; markers distinguish lines without colours.
_COLOURS = ("#2f7ed8", "#d9730d", "#2f9e44", "#c2417c")
_MARKERS = ("o", "s", "^", "D")
_SIZE = (5.2, 3.3)  # inches of 72 CSS pixels: as wide as a phone, so that its text stays legible


@dataclass(frozen=True)
class Line:
    """Points with a name. marked: draw a marker at each. labels: texts beside the points.

    low, high: bounds of y, drawn as error bars for marked points, else as a band.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    labels: Sequence[str] = ()
    marked: bool = True


def chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_log: bool = False,
    y_log: bool = False,
) -> str:
    """An <svg> element of lines, with their bands, a grid, and a legend if there are several."""
    matplotlib = require_matplotlib()
    settings = {
        "svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif", "font.size": 10,
        "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK,
        "ytick.color": _INK, "axes.titlesize": 11, "legend.fontsize": 9,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = matplotlib.figure.Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        for line, colour, marker in zip(lines, _COLOURS, _MARKERS, strict=False):
            _draw(axes, line, colour, marker)
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.set(xscale="log" if x_log else "linear", yscale="log" if y_log else "linear")
        if x_log:  # matplotlib's own labels would overlap on a short axis
            axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5), numticks=8))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.grid(alpha=0.25)
        if len(lines) > 1:
            axes.legend(framealpha=0)
        data = io.BytesIO()
        figure.savefig(data, format="svg", transparent=True, metadata={"Date": None})
    return _embedded(data.getvalue().decode())


def _draw(axes: Any, line: Line, colour: str, marker: str) -> None:
    if line.low is not None and line.high is not None:
        if line.marked:
            axes.vlines(line.x, line.low, line.high, color=colour, alpha=0.5)
        else:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(
        line.x, line.y, color=colour, label=line.name, linewidth=1.5,
        marker=marker if line.marked else None, markersize=4,
    )  # fmt: skip
    for x, y, text in zip(line.x, line.y, line.labels, strict=False):
        axes.annotate(text, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=9)


def _embedded(svg: str) -> str:
    """The <svg> element alone, without the headers of a file, in the text's colour."""
    element = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    element = re.sub(r'^(<svg[^>]*?) (width|height)="[^"]*"', r"\1", element)
    element = re.sub(r'^(<svg[^>]*?) (width|height)="[^"]*"', r"\1", element)
    return element.replace(_INK, "currentColor")


def require_matplotlib() -> Any:
    """matplotlib with its figure; ImportError says how to install it."""
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise ImportError("report: charts must have matplotlib: pip install matplotlib") from error
    return matplotlib

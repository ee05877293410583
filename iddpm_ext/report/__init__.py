"""One self-contained HTML page about a trained model: samples, likelihood, cost, training.

`write_report` measures and writes; `parts` has the functions that make its parts, `page.html.jinja` is
its template.
"""

from __future__ import annotations

from .write import write_report

__all__ = ["write_report"]

"""Text for messages: durations, and names without control characters."""

from __future__ import annotations

_LONGEST = 200


def duration(seconds: float) -> str:
    """A duration as text: "0.4 s", "12 s", "3 min 05 s", "1 h 02 min", "2 d 03 h"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def printable(text: str, longest: int = _LONGEST) -> str:
    """`text` with control characters escaped, cut after `longest` characters.

    For text from files, such as names of tensors and errors of the libraries that read them.
    """
    cut = text if len(text) <= longest else f"{text[:longest]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)

"""The command line: `iddpm VERB ...`.

A verb is a module of this package without a leading underscore: the first line of its docstring is
its summary, and the arguments of its function `run` are its flags. Where a file among the arguments sets
the flags' defaults, its function `bind` gives `run` with them. Nothing is registered elsewhere.
"""

from __future__ import annotations

import importlib
import io
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType

import iddpm_ext
from iddpm_ext.text import printable

_LONGEST_ERROR = 2000
_ORDER = (
    "sample",
    "train",
    "nll",
    "evaluate",
    "report",
    "steps",
    "convert",
    "plot",
    "data",
    "tune",
    "info",
)


def verbs() -> list[str]:
    """The verbs that there are, in the order in which the help lists them."""
    found = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]
    return sorted(found, key=lambda v: (_ORDER.index(v) if v in _ORDER else len(_ORDER), v))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status: 0, 1 for an error, 2 for a wrong call.

    Errors are one line on stderr; with `--debug` they keep their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # The name of a file may be of any bytes; to print it must not fail after the work.
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if not given or given[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if given else 2
    if given[0] == "--version":
        print(f"iddpm {iddpm_ext.__version__}")
        return 0
    verb, *rest = given
    if verb not in verbs():
        print(f"iddpm: verb must be one of {', '.join(verbs())}, got {verb!r}", file=sys.stderr)
        return 2
    try:
        status = _run(verb, rest)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        print(f"iddpm {verb}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        words = printable(" ".join(str(error).split()), longest=_LONGEST_ERROR)
        text = words.removeprefix(f"{verb}: ") or type(error).__name__
        print(f"iddpm {verb}: {text}", file=sys.stderr)
        return 1
    return status or 0


def _run(verb: str, arguments: Sequence[str]) -> int | None:
    from iddpm_ext.cli._flags import parse_and_call

    module = _module(verb)
    run = module.bind(arguments) if hasattr(module, "bind") else module.run
    return parse_and_call(run, arguments, prog=f"iddpm {verb}", description=module.__doc__ or "")


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{verb}")


def _usage() -> str:
    lines = ["usage: iddpm VERB [flags]", "", iddpm_ext.__doc__ or "", ""]
    for verb in verbs():
        summary = (_module(verb).__doc__ or "").strip().splitlines()[0]
        lines.append(f"  {verb:<10}{summary}")
    lines += ["", "`iddpm VERB --help` lists a verb's flags; `--debug` shows where an error arose."]
    return "\n".join(lines)

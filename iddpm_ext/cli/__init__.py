"""The command line: `iddpm VERB ...`.

A verb is a module of this package without a leading underscore: the first line of its docstring is
its summary, and the arguments of its function `run` are its flags. Where a file among the arguments sets
the flags' defaults, its function `bind` gives `run` with them. Nothing is registered elsewhere.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import pkgutil
import select
import sys
from collections.abc import Sequence
from types import ModuleType

import iddpm_ext
from iddpm_ext.cli._common import Manner, speaking
from iddpm_ext.text import printable

_LONGEST_ERROR = 2000
# Flags that every verb takes, in any place.
_COMMON = ("--debug", "--json", "--quiet")
_ORDER = (
    "sample",
    "train",
    "nll",
    "evaluate",
    "report",
    "steps",
    "covariance",
    "convert",
    "average",
    "plot",
    "data",
    "tune",
    "info",
    "completion",
)


def verbs() -> list[str]:
    """All verbs, in the order of the help."""
    found = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]
    return sorted(found, key=lambda v: (_ORDER.index(v) if v in _ORDER else len(_ORDER), v))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status: 0, 1 for an error, 2 for a wrong call, 130 interrupted.

    Where nobody reads standard output to its end, as with `| head`, it is 141, as of a program that the
    pipe's signal ends, and nothing is said. Errors are one line on stderr; with `--debug` they keep their
    traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files can be any bytes; printing them must not fail after the work.
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    common = {flag: flag in given for flag in _COMMON}
    try:
        status = _status([argument for argument in given if argument not in _COMMON], common)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_left():
            raise
        # What is still to be written when the process ends goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


def _reader_left() -> bool:
    """Whether nobody reads standard output any more."""
    pipe = select.poll()
    pipe.register(sys.stdout, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in pipe.poll(0))


def _status(given: list[str], common: dict[str, bool]) -> int:
    """Runs what is given, without the common flags."""
    if not given or given[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if given else 2
    if given[0] == "--version":
        print(f"iddpm {iddpm_ext.__version__}")
        return 0
    verb, *rest = given
    if verb not in verbs():
        close = difflib.get_close_matches(verb, verbs(), n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        said = f"iddpm: verb must be one of {', '.join(verbs())}, got {verb!r}{meant}"
        print(said, file=sys.stderr)
        return 2
    try:
        with speaking(Manner(json=common["--json"], quiet=common["--quiet"])):
            status = _run(verb, rest)
        sys.stdout.flush()  # here a full disk is an error of the verb
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        print(f"iddpm {verb}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if common["--debug"] or (isinstance(error, BrokenPipeError) and _reader_left()):
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


def print_completion(shell: str) -> None:
    """Prints the completion script of `iddpm` for a shell."""
    import tyro

    functions = {verb: _module(verb).run for verb in verbs()}
    arguments = ["--tyro-print-completion", shell]
    try:
        tyro.extras.subcommand_cli_from_dict(functions, prog="iddpm", args=arguments)
    except SystemExit as stop:  # raised after the script is printed
        if stop.code:
            raise


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{verb}")


def _usage() -> str:
    lines = ["usage: iddpm VERB [flags]", "", iddpm_ext.__doc__ or "", ""]
    for verb in verbs():
        summary = (_module(verb).__doc__ or "").strip().splitlines()[0]
        lines.append(f"  {verb:<12}{summary}")
    lines += [
        "",
        "example: iddpm sample fashion-mnist --labels all -n 20 --out garments.png",
        "",
        "`iddpm VERB --help` lists a verb's flags. Of every verb: --quiet shows no progress, --json prints",
        "the result as a line of JSON, --debug shows where an error arose. `iddpm completion bash` prints",
        "what makes the shell complete all of it.",
    ]
    return "\n".join(lines)

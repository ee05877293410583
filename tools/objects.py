"""A cache of object files, which are recompiled only if their command or an included file changed.

pip builds in a new temporary directory every time, and so never incrementally; this cache is in the source
tree's ``build/``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


class CompileError(Exception):
    """A file does not compile; the text is the compiler's."""


@dataclass(frozen=True)
class Unit:
    """An object file to build: ``command`` compiles ``source``, and lacks only the output.

    ``name`` is the object's readable stem. ``identity`` is part of the cache key, for what the command line
    does not show, such as the compiler's version. Texts in ``volatile`` (paths of temporary build
    environments) are ignored in the key.
    """

    name: str
    source: Path
    command: tuple[str, ...]
    identity: str
    volatile: tuple[str, ...] = ()


def compile_all(
    units: list[Unit], cache: Path, say: Callable[[str], None]
) -> tuple[list[Path], int]:
    """Compile what is not in ``cache``, in parallel; returns the objects and how many were new.

    ``say`` gets a line for each one that was compiled, since all of them take minutes.
    """
    done = itertools.count(1)

    def compiled(unit: Unit) -> tuple[Path, bool]:
        began = time.perf_counter()
        path, new = compile_one(unit, cache)
        number = next(done)
        if new:
            say(f"[{number:>2}/{len(units)}] {unit.name}, {time.perf_counter() - began:.1f} s")
        return path, new

    with ThreadPoolExecutor(max_workers=_jobs()) as pool:
        results = list(pool.map(compiled, units))
    return [path for path, _ in results], sum(new for _, new in results)


def compile_one(unit: Unit, cache: Path) -> tuple[Path, bool]:
    """The object file of ``unit`` and whether it had to be compiled.

    Raises CompileError with the compiler's words.
    """
    obj = cache / f"{unit.name}.{_key(unit)}.o"
    record = obj.with_suffix(".json")
    if obj.exists() and _up_to_date(record):
        return obj, False
    fresh = obj.with_suffix(f".{os.getpid()}.tmp.o")
    depfile = fresh.with_suffix(".d")
    command = [*unit.command, str(unit.source), "-MMD", "-MF", str(depfile), "-o", str(fresh)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        fresh.unlink(missing_ok=True)
        depfile.unlink(missing_ok=True)
        raise CompileError(f"{unit.source} does not compile\n$ {' '.join(command)}\n{done.stdout}")
    if done.stdout.strip():
        print(done.stdout.rstrip())
    stable = [p for p in _dependencies(depfile) if not _is_volatile(p, unit)]
    record.write_text(json.dumps({str(path): _digest(path) for path in stable}))
    depfile.unlink()
    fresh.replace(obj)
    return obj, True


def _jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def _key(unit: Unit) -> str:
    text = "\0".join((*unit.command, str(unit.source), unit.identity))
    for path in unit.volatile:
        text = text.replace(path, "")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_volatile(path: Path, unit: Unit) -> bool:
    return any(str(path).startswith(prefix) for prefix in unit.volatile)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _up_to_date(record: Path) -> bool:
    try:
        known = json.loads(record.read_text())
        return all(_digest(Path(path)) == digest for path, digest in known.items())
    except (OSError, ValueError):
        return False


def _dependencies(depfile: Path) -> list[Path]:
    """The files a make rule ``object: a b \\`` names."""
    words = depfile.read_text().replace("\\\n", " ").replace("\\ ", "\0").split()
    start = next(i for i, word in enumerate(words) if word.endswith(":")) + 1
    return [Path(word.replace("\0", " ")) for word in words[start:]]

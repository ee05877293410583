"""What goes with every published number: hardware, versions, commit, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import iddpm_ext


def context(program: str, packages: Iterable[str] = ("torch",)) -> dict[str, Any]:
    """Hardware, versions and commit of a run of `python -m <program>`."""
    cpu = next(
        (s.split(":")[1].strip() for s in _read("/proc/cpuinfo") if s.startswith("model name")),
        platform.processor(),
    )
    versions = {"python": platform.python_version(), "iddpm_ext": iddpm_ext.__version__}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "command": f"python -m {program} " + " ".join(sys.argv[1:]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": versions,
    }


def _read(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []

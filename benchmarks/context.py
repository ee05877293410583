"""The context of a published number: hardware, versions, commit, command, load."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import iddpm_ext

_FAMILIES = {("AuthenticAMD", "25"): "Zen 3 or 4", ("AuthenticAMD", "26"): "Zen 5"}


def cpu_name() -> str:
    """The processor's name in /proc/cpuinfo, with the core's generation if known."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    first = path.read_text().split("\n\n")[0]
    pairs = (line.partition(":")[::2] for line in first.splitlines())
    fields = {key.strip(): value.strip() for key, value in pairs}
    name = fields.get("model name", platform.machine())
    generation = _FAMILIES.get((fields.get("vendor_id", ""), fields.get("cpu family", "")))
    model = f"family {fields.get('cpu family', '?')}, model {fields.get('model', '?')}"
    return f"{name} ({generation}, {model})" if generation else f"{name} ({model})"


def context(program: str, packages: Iterable[str] = ("torch",)) -> dict[str, Any]:
    """The context of a run of `python -m <program>`, with the versions of `packages`."""
    versions = {"python": platform.python_version(), "iddpm_ext": iddpm_ext.__version__}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join(["python -m", program, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "load_average": os.getloadavg()[0],
        "versions": versions,
    }


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes the record atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(record, indent=1) + "\n")
    fresh.replace(path)

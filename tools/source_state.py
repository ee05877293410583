"""Which commit a build is of: `_C.build_info()["source"]`, which `iddpm info` shows."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SourceState:
    """commit: "" where it is not known, and the reason why. changed: whether tracked files differ from it."""

    commit: str = ""
    changed: bool = False
    reason: str = ""


def source_state(root: Path) -> SourceState:
    """Of the source tree at `root`. A repository that merely surrounds it is not its own."""
    try:
        inside = _git(root, "rev-parse", "--show-prefix")
        if inside:
            return SourceState(reason="no repository of its own: a source distribution, or a copy")
        commit = _git(root, "rev-parse", "HEAD")
        changed = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except FileNotFoundError:
        return SourceState(reason="git is not installed")
    except subprocess.CalledProcessError as error:
        words = error.stderr.strip().splitlines()
        return SourceState(reason=words[0] if words else f"git failed with {error.returncode}")
    return SourceState(commit, changed)


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()

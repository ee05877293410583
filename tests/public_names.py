"""What a type checker knows of the public names; `make check` runs mypy on it, nothing imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import iddpm_ext


def use(path: Path) -> dict[str, Any]:
    """Names that are there have types, and one that is not is an error."""
    model: iddpm_ext.UNet = iddpm_ext.load(path)
    iddpm_ext.save(model, str(path))
    iddpm_ext.save(path, model)  # type: ignore[arg-type]
    iddpm_ext.smaple(model)  # type: ignore[attr-defined]
    return iddpm_ext.images.read_recipe(path)

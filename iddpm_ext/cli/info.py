"""Say what was built, which backend each op takes and why, and what a checkpoint holds.

Example: iddpm info fashion-mnist
"""

from __future__ import annotations

from typing import Annotated

import tyro

from iddpm_ext.cli._common import result


def run(checkpoint: Annotated[str | None, tyro.conf.Positional] = None) -> None:
    """Prints the report.

    Args:
        checkpoint: a bundled name or a file: prints its network and process instead.
    """
    if checkpoint is None:
        from iddpm_ext.cli._environment import report

        text = report()
        result(text, {"report": text.splitlines()})
        return
    import iddpm_ext

    model = iddpm_ext.load(checkpoint)
    parameters = sum(p.numel() for p in model.parameters())
    rows = [("checkpoint", checkpoint), ("parameters", f"{parameters:,}")]
    rows += [(name, str(value)) for name, value in model.config.to_dict().items()]
    rows.append(("diffusion", repr(model.diffusion)))
    recognised = model.extra.get("openai", {}).get("recognised")
    rows += [("recognised", ", ".join(recognised))] if recognised else []
    names = model.extra.get("class_names")
    rows += [("classes", ", ".join(names))] if names else []
    width = max(len(name) for name, _ in rows)
    result("\n".join(f"{name:<{width}}  {value}" for name, value in rows), dict(rows))

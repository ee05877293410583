"""Convert a checkpoint between this package's format, OpenAI's, diffusers' and ONNX.

Example: iddpm convert fashion-mnist garments/ --verify
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from iddpm_ext.cli._common import result, starting


def run(
    source: Annotated[str, tyro.conf.Positional],
    target: Annotated[Path, tyro.conf.Positional],
    *,
    verify: bool = False,
    flags: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    stock: bool | None = None,
) -> None:
    """Converts and writes; the target appears when it is complete.

    Args:
        source: a bundled name, a file or run folder of this package, an OpenAI .pt, a folder of diffusers,
            or hf://org/name.
        target: a .safetensors or .onnx file, or a new folder for diffusers' from_pretrained.
        verify: read the target back and print the largest difference of its outputs.
        flags: for an OpenAI .pt, those that do not follow from its tensors: "noise_schedule=cosine ...".
        dtype: of the written weights.
        stock: in a folder, write the stock UNet2DModel; by default, if that can compute the network.
    """
    starting("convert", f"loading {source}")
    import torch

    import iddpm_ext
    from iddpm_ext.checkpoint import save
    from iddpm_ext.interop import verification

    kind = _kind(target)
    model = iddpm_ext.load(source, flags=flags)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    if kind == "onnx":
        from iddpm_ext.interop.export import export_onnx

        export_onnx(model, target)
    elif kind == "folder":
        from iddpm_ext.interop.folder import write_folder

        write_folder(model, target, stock=stock)
    else:
        save(model, target)
    parameters = sum(p.numel() for p in model.parameters())
    lines = [f"{target}: {parameters:,} parameters of {source}"]
    verified = list(verification.compare(model, target)) if verify else []
    result(
        "\n".join([*lines, *verified]),
        {"file": str(target), "source": source, "parameters": parameters, "verified": verified},
    )


def _kind(target: Path) -> str:
    kinds = {".safetensors": "safetensors", ".onnx": "onnx", "": "folder"}
    if target.suffix not in kinds:
        raise ValueError(
            f"target must end in .safetensors or .onnx, or be a folder, got {str(target)!r}"
        )
    return kinds[target.suffix]

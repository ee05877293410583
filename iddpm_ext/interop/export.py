"""Exports the network to other runtimes: `torch.export` and ONNX."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iddpm_ext.engines.structure import weights_alone
from iddpm_ext.files import flush, temporary_name
from iddpm_ext.networks.unet import UNet
from iddpm_ext.scalars import plain
from iddpm_ext.sizes import ImageSize, checked_size, height_and_width

# Larger weights are in a second file, as protocol buffers are limited to 2 GiB.
_SINGLE_FILE_BYTES = 1_900_000_000


def export_program(
    model: UNet, *, image_size: ImageSize | None = None
) -> torch.export.ExportedProgram:
    """The network as an `ExportedProgram` of PyTorch's own operators, with any batch size.

    Args:
        model: a UNet, also inside PyTorch's wrappers (`torch.compile`, DataParallel and the like); its
            weights are shared, not copied.
        image_size: the side of its images, or (height, width), which is fixed in the graph; the
            configuration's if None.

    Returns:
        a program with the arguments of `model`: x, timesteps, and y or low_res if the network has them.

    Raises:
        ValueError, TypeError: image_size does not fit the network, or model is no UNet, or is more
            than its configuration says: has hooks, say, or layers of another kind.
    """
    return _program(weights_alone("export_program", model), image_size)


def _program(model: UNet, image_size: ImageSize | None) -> torch.export.ExportedProgram:
    copy = _plain_copy(model)
    inputs = _example(model, plain(image_size))
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    with torch.no_grad():
        return torch.export.export(
            copy, (), inputs, dynamic_shapes={name: {0: batch} for name in inputs}
        )


def export_onnx(
    model: UNet, path: str | os.PathLike[str], *, image_size: ImageSize | None = None
) -> Path:
    """Writes the network as an ONNX model that ONNX Runtime and others run, with any batch size.

    Inputs are x float32 [N, C, H, W], timesteps float32 [N], and y int64 [N] or low_res where the
    network has them; the output is `output`. The sampling chain is not included. The file is written
    atomically.

    Args:
        model: a UNet, as of `export_program`.
        path: an .onnx file in an existing folder; weights of more than 1.9 GB go to a second file
            beside it, NAME.onnx.data.
        image_size: the side of its images, or (height, width); the configuration's if None.

    Returns:
        the path.

    Raises:
        ImportError: onnx or onnxscript is missing.
        ValueError, TypeError, OSError: an argument does not fit, or the file cannot be written.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "export_onnx: this needs onnx and onnxscript: pip install onnx onnxscript"
        ) from error
    target = Path(path).resolve()
    if target.suffix != ".onnx" or target.is_dir():
        raise ValueError(f"export_onnx: path must end in .onnx, got {str(path)!r}")
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"export_onnx: path must be in an existing folder, got {str(path)!r}"
        )
    model = weights_alone("export_onnx", model)
    program = _program(model, image_size)
    names = [spec.arg.name for spec in program.graph_signature.input_specs if not spec.target]
    with _quiet():
        exported: Any = torch.onnx.export(
            program, (), dynamo=True, verbose=False, output_names=["output"],
            dynamic_shapes={name: {0: "batch"} for name in names},
        )  # fmt: skip
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    temporary = temporary_name(target)
    temporary.mkdir()
    try:
        exported.save(temporary / target.name, external_data=size > _SINGLE_FILE_BYTES)
        # Weights first, so that the model never exists without them.
        for file in sorted(temporary.iterdir(), key=lambda file: file.suffix == ".onnx"):
            flush(file)
            os.replace(file, target.parent / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    flush(target.parent)
    return target


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A context that hides the exporter's warnings about itself, which callers cannot change."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _plain_copy(model: UNet) -> UNet:
    """The network with the same weights, by PyTorch's own functions, in evaluation mode."""
    with torch.device("meta"):
        copy = UNet(model.config)
    copy.load_state_dict(model.state_dict(), assign=True)
    copy.backend = "plain"
    return copy.eval().requires_grad_(False)


def _example(model: UNet, image_size: ImageSize | None) -> dict[str, Tensor]:
    """Inputs for tracing: a batch of two, since a batch of one would be traced as a constant."""
    config = model.config
    size = config.size
    if image_size is not None:
        size = height_and_width(checked_size("export_program", image_size))
    if any(side % config.size_multiple for side in size):
        raise ValueError(
            f"export_program: image_size must be a multiple of {config.size_multiple}, got {image_size!r}"
        )
    device, dtype = model.input_blocks[0].get_parameter("0.weight").device, torch.float32
    inputs = {
        "x": torch.zeros(2, config.in_channels, *size, device=device, dtype=dtype),
        "timesteps": torch.zeros(2, device=device, dtype=dtype),
    }
    if config.num_classes is not None:
        inputs["y"] = torch.zeros(2, device=device, dtype=torch.int64)
    if config.super_resolution:
        height, width = (max(1, side // 4) for side in size)
        inputs["low_res"] = inputs["x"][:, :, :height, :width].clone()
    return inputs

"""Compares a converted network with its original."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import iddpm_ext
from iddpm_ext.networks.unet import UNet

_BATCH = 2
_FRACTIONS = (0.0, 0.001, 0.25, 0.5, 0.75, 1.0)


def compare(model: UNet, target: str | os.PathLike[str]) -> Iterator[str]:
    """Lines with the differences of the outputs of the file or folder `target` from the network's.

    `target` is read back and run by its own library: diffusers, ONNX Runtime, or this package. Inputs are
    random, of the network's image size, at six timesteps from the first to the last.
    """
    run = _runner(Path(target))
    worst, scale = 0.0, 0.0
    for t in _times(model):
        inputs = _inputs(model, t)
        with torch.no_grad():
            ours = model.float()(**inputs)
        theirs = run(inputs)
        difference = float((ours - theirs).abs().max())
        yield f"  t = {t:8.3f}  largest difference {difference:.2e}"
        worst, scale = max(worst, difference), max(scale, float(ours.abs().max()))
    yield f"largest difference {worst:.2e}, largest output {scale:.2f}"


def _times(model: UNet) -> list[float]:
    """Timestep inputs of the network, from the first step of its process to the last."""
    if model.diffusion is None:
        return [fraction * 999 for fraction in _FRACTIONS]
    last = model.diffusion.num_timesteps - 1
    steps = torch.tensor(
        [round(fraction * last) for fraction in _FRACTIONS], dtype=torch.int64, device="cpu"
    )
    return model.diffusion.model_timesteps(steps).tolist()


def _inputs(model: UNet, t: float) -> dict[str, Tensor]:
    config, generator = model.config, torch.Generator().manual_seed(0)
    height, width = config.size
    inputs = {
        "x": torch.randn(
            _BATCH,
            config.in_channels,
            height,
            width,
            generator=generator,
            dtype=torch.float32,
            device="cpu",
        ),
        "timesteps": torch.full((_BATCH,), t, dtype=torch.float32, device="cpu"),
    }
    if config.num_classes is not None:
        inputs["y"] = torch.tensor([0, config.num_classes - 1], dtype=torch.int64, device="cpu")
    if config.super_resolution:
        small = (_BATCH, config.in_channels, height // 4, width // 4)
        inputs["low_res"] = torch.randn(
            small, generator=generator, dtype=torch.float32, device="cpu"
        )
    return inputs


def _runner(target: Path) -> Callable[[dict[str, Tensor]], Tensor]:
    if target.suffix == ".onnx":
        return _onnx_runner(target)
    if target.is_dir():
        return _diffusers_runner(target)
    network = iddpm_ext.load(target)

    def run(inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return network(**inputs)

    return run


def _onnx_runner(target: Path) -> Callable[[dict[str, Tensor]], Tensor]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("verify needs ONNX Runtime: pip install onnxruntime") from error

    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> Tensor:
        feed = {name: value.numpy() for name, value in inputs.items()}
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def _diffusers_runner(target: Path) -> Callable[[dict[str, Tensor]], Tensor]:
    from iddpm_ext.interop.diffusers_api import UNet2DModel
    from iddpm_ext.interop.unet2d import IDDPMUNet2DModel

    folder = target / "unet" if (target / "unet").is_dir() else target
    own = UNet2DModel.load_config(folder)["_class_name"] == "IDDPMUNet2DModel"
    unet: Any = (IDDPMUNet2DModel if own else UNet2DModel).from_pretrained(
        folder, use_safetensors=True, low_cpu_mem_usage=False, local_files_only=True
    )

    def run(inputs: dict[str, Tensor]) -> Tensor:
        kwargs = {"low_res": inputs["low_res"]} if "low_res" in inputs else {}
        with torch.no_grad():
            labels = inputs.get("y")
            return unet(inputs["x"], inputs["timesteps"], class_labels=labels, **kwargs).sample

    return run

"""Draw images from a checkpoint into a grid, a folder, an array or an animation.

Example: iddpm sample fashion-mnist --labels all -n 20 --out garments.png
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from iddpm_ext.cli._common import (
    MaybeCount,
    pick_device,
    pick_dtype,
    quiet,
    read_steps,
    result,
    starting,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from iddpm_ext.networks.config import UNetConfig


def run(
    checkpoint: Annotated[str, tyro.conf.Positional] = "fashion-mnist",
    *,
    n: MaybeCount = None,
    steps: str = "50",
    labels: tuple[str, ...] | None = None,
    sampler: Literal["ddpm", "ddim", "dpm++", "dpm++3", "dpm++sde", "unipc", "unipc3"] = "ddpm",
    eta: float = 0.0,
    variance: Literal["fixed_small", "fixed_large", "analytic", "optimal"] | None = None,
    guidance_scale: float = 1.0,
    classifier: Path | None = None,
    classifier_scale: float = 1.0,
    classifier_flags: str | None = None,
    seed: int | Literal["random"] = 0,
    out: Path = Path("samples.png"),
    animate: Path | None = None,
    image: Path | None = None,
    mask: Path | None = None,
    strength: float = 1.0,
    repaint: int = 1,
    low_res: Path | None = None,
    upsampler: str | None = None,
    upsampler_steps: str | None = None,
    flags: str | None = None,
    columns: int | None = None,
    scale: int | None = None,
    batch_size: int | None = None,
    clip: bool = True,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    engine: bool = True,
    exact: bool = False,
    backend: str = "auto",
    device: str = "auto",
) -> None:
    """Draws images and writes them.

    Under torchrun, the processes divide the batches among them; the first one writes.

    Args:
        checkpoint: a bundled name, a file, a run's folder, or hf://org/name.
        n: how many images; 16, or one per label.
        steps: 50; ddim50; 10,15,20 for sections; optimal-8, analytic-8
            or pictures-8 for a schedule of the checkpoint.
        labels: class numbers or names, 0,1,boot; -1 for none; "all" for all classes in turn.
        sampler: ancestral (ddpm), DDIM, or a solver for few steps: DPM-Solver++ (dpm++, dpm++3, with noise
            dpm++sde) or UniPC (unipc, unipc3).
        eta: the noise of DDIM, from 0 to 1.
        variance: with ddpm and ddim: analytic, by the moments that `iddpm steps` stores, or optimal, by the
            heads that `iddpm covariance` trains; with ddpm: fixed_small or fixed_large; by default the
            network's own.
        guidance_scale: of classifier-free guidance; 1 for none.
        classifier: a classifier of noisy images that guides the samples to their labels: a .safetensors file,
            the folder of a run, or a .pt of guided-diffusion.
        classifier_scale: factor of its gradient.
        classifier_flags: for a .pt that needs them, "image_size=64 classifier_depth=2 ...".
        seed: of all noise; random draws one and prints it.
        out: a .png for a grid, an .npz for arrays, no suffix for a folder of PNGs.
        animate: a .webp or .gif file for the chain.
        image: to change: an image file for all samples, or an .npz of uint8 images [N, H, W, C] (arr_0).
        mask: an image file, white where the chain paints and black where image stays.
        strength: share of the chain that image is taken through; 1 begins with pure noise.
        repaint: how often each step is taken, for a better fit of what is painted.
        low_res: an .npz of uint8 images [N, h, w, C] (arr_0), for a super-resolution checkpoint.
        upsampler: a super-resolution checkpoint that enlarges the images, with the same labels.
        upsampler_steps: its steps; by default those of --steps.
        flags: for an OpenAI .pt that needs them, "image_size=64 noise_schedule=cosine ...".
        columns: of the grid.
        scale: output pixels per image pixel in the grid.
        batch_size: maximum number of images at once.
        clip: clamp every predicted image to [-1, 1].
        dtype: precision of the network.
        engine: use an engine where one supports the network.
        exact: engines use only algorithms as accurate as direct convolution.
        backend: of the op reverse_step: auto, reference, cpu, cuda or triton.
        device: auto, cpu, cuda or cuda:1.
    """
    starting("sample", f"loading {checkpoint}")

    import iddpm_ext
    from iddpm_ext.images import check_writable, save_animation, save_images
    from iddpm_ext.sampling import distributed, loop
    from iddpm_ext.sampling.classifier_guidance import CondFn, require_same_noise
    from iddpm_ext.sampling.request import Request, make_request
    from iddpm_ext.sampling.two_stage import rounded_to_levels, upsampler_request
    from iddpm_ext.text import duration

    drawn = seed == "random"
    number = secrets.randbits(32) if isinstance(seed, str) else seed
    check_writable(out)
    if animate is not None:
        check_writable(animate, suffixes=(".webp", ".gif"))
        if distributed.world_size() > 1:
            raise ValueError(f"animate must be left out under torchrun, got {str(animate)!r}")
    if upsampler is not None and (animate is not None or distributed.world_size() > 1):
        raise ValueError(
            "upsampler must be left out with animate and under torchrun; there, give the images of "
            f"a first command as low_res to a second one, got {upsampler!r}"
        )
    model = iddpm_ext.load(checkpoint, flags=flags).to(pick_device(device))
    class_names, num_classes = model.extra.get("class_names"), model.config.num_classes
    cond_fn: CondFn | None = None
    if classifier is not None:
        guide = iddpm_ext.load_classifier(classifier, flags=classifier_flags)
        require_same_noise(guide, model)
        cond_fn = iddpm_ext.classifier_gradient(guide.to(pick_device(device)), classifier_scale)
        if num_classes is None:
            class_names, num_classes = guide.extra.get("class_names"), guide.config.num_classes
            if labels is None:
                raise ValueError(
                    "labels must be given with classifier to a network without classes, got None"
                )
    chosen = _labels(labels, n, num_classes, class_names)
    count = len(chosen) if chosen is not None else n
    request = make_request(
        "sample", model, read_steps(steps), n=n, sampler=sampler, eta=eta,
        labels=chosen,
        x_0=_read_images(image, model.config, count, pick_device(device)),
        mask=_read_mask(mask, model.config, pick_device(device)), strength=strength,
        repaint=repaint,
        guidance_scale=guidance_scale, cond_fn=cond_fn,
        low_res=_read_levels("low_res", low_res, pick_device(device)), seed=number,
        clip=clip, batch_size=batch_size,
        dtype=pick_dtype(dtype), engine=engine, exact=exact,
        backend=backend, progress=distributed.rank() == 0 and not quiet(), variance=variance,
    )  # fmt: skip

    second: Request | None = None
    if upsampler is not None:
        enlarging = iddpm_ext.load(upsampler).to(pick_device(device))
        second = upsampler_request(request, enlarging, read_steps(upsampler_steps or steps))

    began = time.perf_counter()
    frames: list[Tensor] = []
    if animate is not None:
        # At most a hundred frames.
        every = -(-request.spec.diffusion.num_timesteps // 100)
        frames = [step.x for step in loop.walk(request) if step.t % every == 0]
        x: Tensor | None = frames[-1]
    elif distributed.world_size() > 1:
        x = distributed.run_shared(request)
    else:
        x = loop.run(request, loop.batches(request.n, request.batch_size))
    drawn_labels = request.spec.labels
    if second is not None and x is not None:
        drawn_labels = second.spec.labels if drawn_labels is None else drawn_labels
        second = second.with_low_res(rounded_to_levels(x))
        x = loop.run(second, loop.batches(second.n, second.batch_size))
    seconds = time.perf_counter() - began
    if x is None:
        return

    recipe: dict[str, Any] = {
        "checkpoint": checkpoint, "seed": number, "steps": steps, "sampler": sampler, "eta": eta,
        "guidance_scale": guidance_scale,
        **({} if variance is None else {"variance": variance}),
    }  # fmt: skip
    if image is not None:
        recipe.update(image=str(image), strength=strength, repaint=repaint)
    if mask is not None:
        recipe.update(mask=str(mask))
    if classifier is not None:
        recipe.update(classifier=str(classifier), classifier_scale=classifier_scale)
    if upsampler is not None:
        recipe.update(upsampler=upsampler, upsampler_steps=upsampler_steps or steps)
    written = save_images(
        x, out, recipe=recipe, labels=drawn_labels, class_names=class_names, columns=columns,
        scale=scale,
    )  # fmt: skip
    places = [written]
    if animate is not None:
        places += [save_animation(frames, animate, recipe=recipe, columns=columns, scale=scale)]
    engine_name = loop.network_of(request).name
    taken = request.steps
    result(
        f"{', '.join(str(path.resolve()) for path in places)}: {len(x)} images of {checkpoint} in "
        f"{duration(seconds)} ({taken} steps, {engine_name}, {request.spec.device}"
        f"{f', seed {number}' if drawn else ''})",
        {
            "files": [str(path.resolve()) for path in places], "images": len(x),
            "seconds": round(seconds, 3), "steps_taken": taken, "network": engine_name,
            "device": str(request.spec.device), **recipe,
        },
    )  # fmt: skip


def _labels(
    given: tuple[str, ...] | None,
    n: int | None,
    num_classes: int | None,
    class_names: Sequence[str] | None,
) -> list[int] | None:
    """Class numbers from numbers, names and the word "all"."""
    if given is None:
        return None
    if num_classes is None:
        raise ValueError(f"labels must be left out for an unconditional model, got {given}")
    if given == ("all",):
        n = n or num_classes
        return [i * num_classes // n for i in range(n)]
    names = {name.casefold(): i for i, name in enumerate(class_names or ())}
    labels = []
    for word in given:
        if word.casefold() in names:
            labels.append(names[word.casefold()])
        elif word.lstrip("-").isdigit():
            labels.append(int(word))
        else:
            known = ", ".join(class_names or ()) or "none"
            raise ValueError(
                f"labels must be class numbers, names (the checkpoint has {known}) or all, "
                f"got {word!r}"
            )
    return labels


def _read_images(
    path: Path | None, config: UNetConfig, n: int | None, device: torch.device
) -> Tensor | None:
    """One image file n times (16 if None), or those of an .npz, float32 [n, C, H, W] in [-1, 1]."""
    if path is None or path.suffix == ".npz":
        return _read_levels("image", path, device)
    read = _read_picture("image", path, config, config.in_channels, device)
    return read.expand(16 if n is None else n, -1, -1, -1)


def _read_mask(path: Path | None, config: UNetConfig, device: torch.device) -> Tensor | None:
    """An image file as float32 [1, 1, H, W], white 1 and black 0."""
    return None if path is None else (_read_picture("mask", path, config, 1, device) + 1) / 2


def _read_picture(
    name: str, path: Path, config: UNetConfig, channels: int, device: torch.device
) -> Tensor:
    """An image file of the network's size, float32 [1, channels, H, W] in [-1, 1]."""
    import torch

    from iddpm_ext.data.image import open_image, to_array

    if not path.is_file():
        raise FileNotFoundError(f"{name} must exist, got {str(path)!r}")
    read = open_image(path.read_bytes(), str(path))
    height, width = config.size
    if read.size != (width, height):
        raise ValueError(
            f"{name} must be {width}x{height} for this network, got {read.width}x{read.height}"
        )
    array = to_array(read, channels, None, name=str(path))
    return torch.from_numpy(array).permute(2, 0, 1)[None].contiguous().to(device)


def _read_levels(name: str, path: Path | None, device: torch.device) -> Tensor | None:
    """uint8 [N, h, w, C] of an .npz -> float32 [N, C, h, w] in [-1, 1]."""
    if path is None:
        return None
    import numpy as np
    import torch

    from iddpm_ext.data.formats import read_npz

    levels = read_npz(path).images
    if levels.dtype != np.uint8 or levels.ndim != 4:
        raise ValueError(
            f"{name} must be an .npz of uint8 [N, h, w, C], got {levels.dtype} {levels.shape}"
        )
    return torch.from_numpy(levels).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1

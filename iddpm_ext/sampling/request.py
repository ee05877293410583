"""What one call of `sample` asks for, checked in full before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iddpm_ext import foreign
from iddpm_ext.checkpoint.unlabelled import warn_if_never_unlabelled
from iddpm_ext.diffusion import SAMPLERS as ONE_STEP_SAMPLERS
from iddpm_ext.diffusion import Diffusion
from iddpm_ext.interop.process import diffusion_of
from iddpm_ext.interop.twin import twin
from iddpm_ext.networks.splice import Splice
from iddpm_ext.networks.unet import UNet
from iddpm_ext.ops.spec import resolve_backend
from iddpm_ext.random import STREAM_CHOICE, NoiseKey, integers

SAMPLERS = (*ONE_STEP_SAMPLERS, "dpm++")
# The models that say themselves what they are.
_OURS = (UNet, Splice)
Steps = int | str | Sequence[int] | None
_NETWORK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEFAULT_N = 16


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of `sample`, resolved: every tensor on `device`, every default filled in.

    diffusion: the chain to walk. image_shape: (C, H, W). labels: int64 [n] or None.
    low_res: [n, C, h, w] or None. x_T: [n, C, H, W] or None, for noise from the seed.
    """

    model: Callable[..., Tensor]
    diffusion: Diffusion
    image_shape: tuple[int, int, int]
    n: int
    batch_size: int
    device: torch.device
    labels: Tensor | None
    low_res: Tensor | None
    x_T: Tensor | None
    sampler: str
    eta: float
    guidance_scale: float
    cond_fn: Callable[..., Tensor] | None
    seed: int
    clip: bool
    dtype: torch.dtype | None
    engine: bool
    exact: bool
    backend: str
    progress: bool

    @property
    def network_takes_labels(self) -> bool:
        """Whether the labels are the network's, or those of `cond_fn` alone."""
        own = isinstance(self.model, UNet) and self.model.config.num_classes is None
        return self.labels is not None and not own


def make_request(
    model: Callable[..., Tensor],
    steps: Steps,
    *,
    n: int | None,
    sampler: str,
    eta: float,
    labels: Sequence[int] | Tensor | None,
    guidance_scale: float,
    low_res: Tensor | None,
    seed: int,
    x_T: Tensor | None,
    clip: bool,
    batch_size: int | None,
    diffusion: Diffusion | None,
    image_shape: Sequence[int] | None,
    dtype: torch.dtype | None,
    engine: bool,
    exact: bool,
    backend: str,
    progress: bool,
    cond_fn: Callable[..., Tensor] | None = None,
) -> Request:
    """Checks the arguments of `sample` and fills in what they leave open.

    Raises ValueError, TypeError or RuntimeError as `sample` documents.
    """
    if not callable(model):
        raise TypeError(f"sample: model must be callable, got {type(model).__name__}")
    model, diffusion, image_shape = _adapted(model, diffusion, image_shape, engine)
    for name, flag in (
        ("clip", clip),
        ("engine", engine),
        ("exact", exact),
        ("progress", progress),
    ):
        if not isinstance(flag, bool):
            raise TypeError(f"sample: {name} must be True or False, got {flag!r}")
    if cond_fn is not None and not callable(cond_fn):
        raise TypeError(f"sample: cond_fn must be callable, got {type(cond_fn).__name__}")
    _check_sampler(sampler, eta)
    _check_seed(seed)
    chain = _respaced(_process(model, diffusion), steps, model)
    device = _device(model, x_T, low_res)
    shape = _image_shape(model, image_shape, x_T)
    _check_x_T(x_T, shape, device)
    _check_low_res(model, low_res, shape, device)
    labels = _labels(model, labels, for_cond_fn=cond_fn is not None)
    count = _count(n, labels=labels, low_res=low_res, x_T=x_T)
    if labels is None and isinstance(model, _OURS) and model.config.num_classes is not None:
        key = NoiseKey(seed, STREAM_CHOICE, torch.arange(count), 0)
        labels = integers(key, model.config.num_classes, (count, 1))[:, 0]
    scale = _guidance_scale(guidance_scale, labels, model)
    if dtype is not None and dtype not in _NETWORK_DTYPES:
        raise ValueError(f"sample: dtype must be float32, bfloat16 or float16, got {dtype}")
    resolve_backend("reverse_step", backend, device, torch.float32 if x_T is None else x_T.dtype)
    return Request(
        model=model,
        diffusion=chain,
        image_shape=shape,
        n=count,
        batch_size=_batch_size(batch_size, count, shape, device),
        device=device,
        labels=None if labels is None else labels.to(device),
        low_res=low_res,
        x_T=x_T,
        sampler=sampler,
        eta=float(eta),
        guidance_scale=scale,
        cond_fn=cond_fn,
        seed=seed,
        clip=clip,
        dtype=dtype,
        engine=engine,
        exact=exact,
        backend=backend,
        progress=progress,
    )


def _adapted(
    model: Callable[..., Tensor],
    diffusion: Diffusion | None,
    image_shape: Sequence[int] | None,
    engine: bool,
) -> tuple[Callable[..., Tensor], Diffusion | None, Sequence[int] | None]:
    """Networks and pipelines of diffusers as any other callable, with what they say of themselves."""
    if foreign.is_pipeline(model):
        pipeline: Any = model
        model = pipeline.unet
        diffusion = diffusion_of(pipeline.scheduler.config) if diffusion is None else diffusion
    if foreign.is_unet2d(model):
        assert isinstance(model, nn.Module)
        if engine and (ours := twin(model)) is not None:
            return ours, diffusion, image_shape
        network = foreign.UNet2DNetwork(model)
        return network, diffusion, network.image_shape if image_shape is None else image_shape
    return model, diffusion, image_shape


def _check_sampler(sampler: str, eta: float) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"sample: sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0 <= eta <= 1:
        raise ValueError(f"sample: eta must be a number from 0 to 1, got {eta!r}")
    if eta and sampler != "ddim":
        raise ValueError(
            f"sample: eta must be 0 with sampler {sampler!r} (it is DDIM's), got {eta}"
        )


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ValueError(f"sample: seed must be an int from 0 to 2^64 - 1, got {seed!r}")


def _process(model: Callable[..., Tensor], given: Diffusion | None) -> Diffusion:
    own = model.diffusion if isinstance(model, _OURS) else None
    if given is None:
        if own is None:
            raise ValueError("sample: diffusion must be given for a model that has none, got None")
        return own
    if not isinstance(given, Diffusion):
        raise TypeError(
            f"sample: diffusion must be an iddpm_ext.Diffusion, got {type(given).__name__}"
        )
    if own is not None and _training_process(own) != _training_process(given):
        raise ValueError(
            f"sample: diffusion must be the model's own {own!r} or a respacing of it, got {given!r}"
        )
    if isinstance(model, _OURS) and own is None:
        channels, learned = model.config.in_channels, given.variance.startswith("learned")
        if learned and model.config.out_channels != 2 * channels:
            raise ValueError(
                f"sample: diffusion must have a fixed variance, as the network has "
                f"{model.config.out_channels} output channels for {channels}, got {given!r}"
            )
    return given


def _training_process(diffusion: Diffusion) -> dict[str, Any]:
    return {**diffusion.to_dict(), "timesteps": None}


def _respaced(diffusion: Diffusion, steps: Steps, model: object) -> Diffusion:
    total = diffusion.num_timesteps
    if steps is None:
        return diffusion
    if isinstance(steps, str) and steps.startswith("optimal-"):
        return diffusion.respace(_optimal(diffusion, steps, model))
    if isinstance(steps, int) and not isinstance(steps, bool) and not 2 <= steps <= total:
        raise ValueError(f"sample: steps must be from 2 to {total}, got {steps}")
    try:
        return diffusion.respace(steps)
    except (TypeError, ValueError) as error:
        reason = str(error).removeprefix("respace: ")
        text = f"sample: steps must be steps of this chain of {total}, got {steps!r} ({reason})"
        raise type(error)(text) from None


def _optimal(diffusion: Diffusion, steps: str, model: object) -> list[int]:
    """What the checkpoint's `extra["step_schedules"]` says, K -> K indices in the training chain."""
    schedules = (getattr(model, "extra", None) or {}).get("step_schedules", {})
    found = {f"optimal-{count}": indices for count, indices in schedules.items()}
    if steps not in found:
        names = list(found)
        have = ", ".join(names) if len(names) < 5 else f"{names[0]} .. {names[-1]}"
        have = have or "the checkpoint has none"
        raise ValueError(
            f"sample: steps must be a schedule of the checkpoint ({have}), got {steps!r}"
        )
    position = {int(step): i for i, step in enumerate(diffusion.timesteps)}
    missing = [step for step in found[steps] if int(step) not in position]
    if missing:
        raise ValueError(
            f"sample: diffusion must visit every step of the schedule {steps!r}, got {diffusion!r} "
            f"without step {missing[0]}"
        )
    return [position[int(step)] for step in found[steps]]


def _device(model: object, *tensors: Tensor | None) -> torch.device:
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            return parameter.device
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            return tensor.device
    return torch.device("cpu")


def _image_shape(
    model: object, given: Sequence[int] | None, x_T: Tensor | None
) -> tuple[int, int, int]:
    if given is None and isinstance(x_T, Tensor) and x_T.dim() == 4:
        given = x_T.shape[1:]
    if given is None:
        if not isinstance(model, _OURS):
            raise ValueError(
                "sample: image_shape must be given as (C, H, W) for a model of another kind, got None"
            )
        side = model.config.image_size
        return (model.config.in_channels, side, side)
    sizes = tuple(given)
    if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(
            f"sample: image_shape must be three positive ints (C, H, W), got {given!r}"
        )
    channels, height, width = sizes
    if isinstance(model, _OURS):
        multiple = model.config.size_multiple
        if channels != model.config.in_channels or height % multiple or width % multiple:
            raise ValueError(
                f"sample: image_shape must be ({model.config.in_channels}, H, W) with H and W "
                f"multiples of {multiple}, got {sizes}"
            )
    return (channels, height, width)


def _check_x_T(x_T: Tensor | None, shape: tuple[int, int, int], device: torch.device) -> None:
    if x_T is None:
        return
    _check_images("x_T", x_T, device)
    if tuple(x_T.shape[1:]) != shape:
        rule = f"[n, {', '.join(map(str, shape))}]"
        raise ValueError(f"sample: x_T must be {rule}, got {list(x_T.shape)}")


def _check_low_res(
    model: object, low_res: Tensor | None, shape: tuple[int, int, int], device: torch.device
) -> None:
    if isinstance(model, _OURS) and model.config.super_resolution != (low_res is not None):
        rule = "given" if low_res is None else "None"
        because = f"the network has super_resolution={model.config.super_resolution}"
        got = "None" if low_res is None else "a value"
        raise ValueError(f"sample: low_res must be {rule}, as {because}, got {got}")
    if low_res is None:
        return
    _check_images("low_res", low_res, device)
    if low_res.shape[1] != shape[0]:
        raise ValueError(
            f"sample: low_res must be [n, {shape[0]}, h, w], got {list(low_res.shape)}"
        )


def _check_images(name: str, value: Tensor, device: torch.device) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"sample: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"sample: {name} must be float32 or float64, got {value.dtype}")
    if value.dim() != 4 or 0 in value.shape:
        raise ValueError(f"sample: {name} must be [n, C, H, W], got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"sample: {name} must be on {device}, got {value.device}")
    if not bool(value.isfinite().all()):
        at = (~value.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"sample: {name} must be finite, got {value[tuple(at)]} at {at}")


def _labels(
    model: object, labels: Sequence[int] | Tensor | None, *, for_cond_fn: bool
) -> Tensor | None:
    if labels is None:
        return None
    try:
        values = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"sample: labels must be integers [n], got {labels!r}") from None
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"sample: labels must be integers [n], got {values.dtype}")
    if values.dim() != 1 or not len(values):
        raise ValueError(f"sample: labels must be integers [n], got shape {list(values.shape)}")
    values = values.long()
    if isinstance(model, _OURS):
        classes = model.config.num_classes
        if classes is None and for_cond_fn:
            return values
        if classes is None:
            raise ValueError("sample: labels must be None for an unconditional network, got labels")
        outside = values[(values < -1) | (values >= classes)]
        if len(outside):
            raise ValueError(
                f"sample: labels must be from 0 to {classes - 1}, or -1 for none, "
                f"got {int(outside[0])}"
            )
    return values


def _count(n: int | None, **tensors: Tensor | None) -> int:
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise ValueError(f"sample: n must be an int above 0, got {n!r}")
    lengths = {name: len(value) for name, value in tensors.items() if value is not None}
    if n is not None:
        lengths = {"n": n, **lengths}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"sample: n, labels, low_res and x_T must agree in length, got {got}")
    return next(iter(lengths.values()), _DEFAULT_N)


def _guidance_scale(scale: float, labels: Tensor | None, model: object) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"sample: guidance_scale must be a finite number, got {scale!r}")
    unlabelled = isinstance(model, UNet) and model.config.num_classes is None
    if scale != 1 and (labels is None or unlabelled):
        raise ValueError(
            f"sample: guidance_scale must be 1 for a model without labels, got {scale}"
        )
    if scale != 1:
        warn_if_never_unlabelled(model, "sample")
    return float(scale)


def _batch_size(
    given: int | None, n: int, shape: tuple[int, int, int], device: torch.device
) -> int:
    if given is None:
        given = default_batch_size(shape, device)
    elif isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"sample: batch_size must be an int above 0, got {given!r}")
    return min(given, n)


def default_batch_size(shape: tuple[int, int, int], device: torch.device) -> int:
    """Enough images (C, H, W) to fill the device, few enough that a large one's activations fit."""
    most, pixels = (16, 1 << 16) if device.type == "cpu" else (256, 1 << 20)
    return max(1, min(most, pixels // (shape[1] * shape[2])))

"""Which network a call evaluates, and how: the checks that every public function on networks begins with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iddpm_ext.diffusion import Diffusion
from iddpm_ext.diffusion.moments import Moments
from iddpm_ext.engines.forked import go_on_after_fork
from iddpm_ext.networks.foreign import unwrapped
from iddpm_ext.networks.splice import Splice
from iddpm_ext.networks.unet import UNet
from iddpm_ext.ops.spec import resolve_backend
from iddpm_ext.scalars import plain

Steps = int | str | Sequence[int] | None
#: Name of a stored schedule in `steps` -> its key in a checkpoint's `extra`.
_STORED = {"optimal": "step_schedules", "pictures": "picture_schedules"}
_NETWORK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class NetworkSpec:
    """A network, its chain and its inputs, resolved: every tensor on `device`.

    who: the public function, for errors and warnings. diffusion: the respaced chain. image_shape:
    (C, H, W). dtype: in which the network is evaluated; None for that of its weights. labels: int64 [n]
    or None. low_res: [n, C, h, w] or None. state: dtype of x_t. finish: called with the network's output
    and the steps t int64 [n], returns the output that the chain reads; None for the output itself.
    """

    who: str
    model: Callable[..., Tensor]
    diffusion: Diffusion
    image_shape: tuple[int, int, int]
    device: torch.device
    dtype: torch.dtype | None
    engine: bool
    exact: bool
    backend: str
    labels: Tensor | None
    low_res: Tensor | None
    state: torch.dtype = torch.float32
    finish: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def network_takes_labels(self) -> bool:
        """Whether the network takes the labels; otherwise they are for classifier guidance alone."""
        ours = describing(self.model)
        own = isinstance(ours, UNet) and ours.config.num_classes is None
        return self.labels is not None and not own


def describing(model: object) -> UNet | Splice | None:
    """The `UNet` or `Splice` that a model is or, in a wrapper of PyTorch's, holds; None for other models."""
    inside = unwrapped(model)
    return inside if isinstance(inside, (UNet, Splice)) else None


def check_network(
    who: str,
    model: Callable[..., Tensor],
    steps: Steps,
    *,
    diffusion: Diffusion | None,
    image_shape: Sequence[int] | None,
    dtype: torch.dtype | None,
    engine: bool,
    exact: bool,
    backend: str,
    labels: Sequence[int] | Tensor | None,
    low_res: Tensor | None,
    images: tuple[str, Tensor | None] = ("x_T", None),
    labels_for_guidance: bool = False,
) -> NetworkSpec:
    """Checks the arguments of a public function that concern the network, and fills in their defaults.

    who: the function, for its errors. images: name and value of the images that the chain starts from,
    which determine device and dtype. labels_for_guidance: labels are allowed for an unconditional network.

    Raises ValueError, TypeError or RuntimeError as `sample` documents.
    """
    go_on_after_fork(who)
    if not callable(model):
        raise TypeError(f"{who}: model must be callable, got {type(model).__name__}")
    check_flags(who, engine=engine, exact=exact)
    ours = describing(model)
    steps, image_shape = plain(steps), plain(image_shape)
    chain = _respaced(who, _process(who, ours, diffusion), steps, ours)
    device = _device(model, images[1], low_res)
    shape = _image_shape(who, ours, image_shape, images)
    name, start = images
    if start is not None:
        _check_images(who, name, start, device)
        if tuple(start.shape[1:]) != shape:
            rule = f"[n, {', '.join(map(str, shape))}]"
            raise ValueError(f"{who}: {name} must be {rule}, got {list(start.shape)}")
    _check_low_res(who, ours, low_res, shape, device)
    checked = _labels(who, ours, labels, labels_for_guidance)
    if dtype is not None and dtype not in _NETWORK_DTYPES:
        raise ValueError(f"{who}: dtype must be float32, bfloat16 or float16, got {dtype}")
    state = torch.float32 if start is None else start.dtype
    resolve_backend("reverse_step", backend, device, state)
    return NetworkSpec(
        who=who,
        model=model,
        diffusion=chain,
        image_shape=shape,
        device=device,
        dtype=dtype,
        engine=engine,
        exact=exact,
        backend=backend,
        labels=None if checked is None else checked.to(device),
        low_res=low_res,
        state=state,
    )


def check_flags(who: str, **flags: bool) -> None:
    """TypeError unless all are True or False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{who}: {name} must be True or False, got {flag!r}")


def require_within_float16(spec: NetworkSpec, result: Tensor) -> None:
    """RuntimeError if the network overflowed on the way to `result`, in float16, as a sound one can there.

    A feature that overflows makes the statistics of its group NaN, and so the output, and the images that
    are made of it from then on: they are looked at once a call, and where there are none, outputs are.
    """
    if spec.dtype == torch.float16 and not bool(result.isfinite().all()):
        raise RuntimeError(
            f"{spec.who}: dtype must be bfloat16 or float32 for this network, whose features leave the "
            "range of float16 (65504), got float16"
        )


def check_seed(who: str, seed: int) -> None:
    """ValueError unless it is an int of 64 bits, unsigned."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ValueError(f"{who}: seed must be an int from 0 to 2^64 - 1, got {seed!r}")


def count_of(who: str, n: int | None, default: int, **tensors: Tensor | None) -> int:
    """How many images: n, or the length of the tensors that are given, which must agree."""
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise ValueError(f"{who}: n must be an int above 0, got {n!r}")
    lengths = {name: len(value) for name, value in tensors.items() if value is not None}
    if n is not None:
        lengths = {"n": n, **lengths}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{name} {length}" for name, length in lengths.items())
        *first, last = ("n", *tensors)
        raise ValueError(f"{who}: {', '.join(first)} and {last} must agree in length, got {got}")
    return next(iter(lengths.values()), default)


def batch_size_of(
    who: str, given: int | None, n: int, shape: tuple[int, int, int], device: torch.device
) -> int:
    """How many images are evaluated at once, at most n."""
    given = plain(given)
    if given is None:
        given = default_batch_size(shape, device)
    elif isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"{who}: batch_size must be an int above 0, got {given!r}")
    return min(given, n)


def default_batch_size(shape: tuple[int, int, int], device: torch.device) -> int:
    """A batch size that fills the device with images (C, H, W), and whose activations fit its memory."""
    most, pixels = (16, 1 << 16) if device.type == "cpu" else (256, 1 << 20)
    return max(1, min(most, pixels // (shape[1] * shape[2])))


def _process(who: str, ours: UNet | Splice | None, given: Diffusion | None) -> Diffusion:
    own = None if ours is None else ours.diffusion
    if given is None:
        if own is None:
            raise ValueError(f"{who}: diffusion must be given for a model that has none, got None")
        return own
    if not isinstance(given, Diffusion):
        raise TypeError(
            f"{who}: diffusion must be an iddpm_ext.Diffusion, got {type(given).__name__}"
        )
    if own is not None and _training_process(own) != _training_process(given):
        raise ValueError(
            f"{who}: diffusion must be the model's own {own!r} or a respacing of it, got {given!r}"
        )
    if ours is not None and own is None:
        channels, learned = ours.config.in_channels, given.variance.startswith("learned")
        if learned and ours.config.out_channels != 2 * channels:
            raise ValueError(
                f"{who}: diffusion must have a fixed variance, as the network has "
                f"{ours.config.out_channels} output channels for {channels}, got {given!r}"
            )
    return given


def _training_process(diffusion: Diffusion) -> dict[str, Any]:
    if (
        diffusion.prediction == "edm"
    ):  # told its noise level, the network has no schedule of its own
        return {name: getattr(diffusion, name) for name in ("prediction", "sigma_data", "variance")}
    return {**diffusion.to_dict(), "timesteps": None}


def _respaced(who: str, diffusion: Diffusion, steps: Steps, ours: object) -> Diffusion:
    total = diffusion.num_timesteps
    if steps is None:
        return diffusion
    kind = steps.partition("-")[0] if isinstance(steps, str) and "-" in steps else ""
    if kind in _STORED:
        return diffusion.respace(_stored(who, diffusion, str(steps), ours))
    if kind == "analytic":
        return diffusion.respace(_analytic(who, diffusion, str(steps), ours))
    if isinstance(steps, int) and not isinstance(steps, bool) and not 2 <= steps <= total:
        raise ValueError(f"{who}: steps must be from 2 to {total}, got {steps}")
    try:
        return diffusion.respace(steps)
    except (TypeError, ValueError) as error:
        reason = str(error).removeprefix("respace: ")
        text = f"{who}: steps must be steps of this chain of {total}, got {steps!r} ({reason})"
        raise type(error)(text) from None


def _stored(who: str, diffusion: Diffusion, steps: str, ours: object) -> list[int]:
    """A schedule that the checkpoint's `extra` holds, K -> K indices in the training chain."""
    kind = steps.partition("-")[0]
    schedules = (getattr(ours, "extra", None) or {}).get(_STORED[kind], {})
    found = {f"{kind}-{count}": indices for count, indices in schedules.items()}
    if steps not in found:
        names = list(found)
        have = ", ".join(names) if len(names) < 5 else f"{names[0]} .. {names[-1]}"
        have = have or "the checkpoint has none"
        raise ValueError(
            f"{who}: steps must be a schedule of the checkpoint ({have}), got {steps!r}"
        )
    own = getattr(ours, "diffusion", None)
    if own is not None and not own.same_training(diffusion):
        raise ValueError(
            f"{who}: diffusion must be {own!r} or a respacing of it for steps {steps!r}, got {diffusion!r}"
        )
    return _positions(who, diffusion, steps, found[steps])


def _analytic(who: str, diffusion: Diffusion, steps: str, ours: object) -> list[int]:
    """The steps with the best bound of analytic variances, by the moments of the checkpoint."""
    count = steps.partition("-")[2]
    if not count.isdigit() or int(count) < 2:
        raise ValueError(f"{who}: steps must be analytic-K with K of at least 2, got {steps!r}")
    found = moments_of(who, ours, diffusion)
    if int(count) > len(found.timesteps):
        raise ValueError(
            f"{who}: steps must be analytic-K with K of at most the {len(found.timesteps)} moments of "
            f"the checkpoint, got {steps!r}"
        )
    return _positions(who, diffusion, steps, found.best_steps(diffusion, int(count)))


def _positions(who: str, diffusion: Diffusion, steps: str, wanted: Sequence[int]) -> list[int]:
    """The indices in this chain of steps of the training chain."""
    position = {int(step): i for i, step in enumerate(diffusion.timesteps)}
    missing = [step for step in wanted if int(step) not in position]
    if missing:
        raise ValueError(
            f"{who}: diffusion must visit every step of the schedule {steps!r}, got {diffusion!r} "
            f"without step {missing[0]}"
        )
    return [position[int(step)] for step in wanted]


def moments_of(who: str, model: object, diffusion: Diffusion) -> Moments:
    """The moments that the checkpoint holds for its present weights; ValueError where there are none."""
    ours = describing(model)
    if not isinstance(ours, nn.Module):
        raise ValueError(
            f"{who}: variance must go with a network that has a checkpoint's moments, "
            f"got 'analytic' for {type(model).__name__}"
        )
    return Moments.from_extra(who, ours.extra, weights_fingerprint(ours), diffusion)


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of the weights rounded to bfloat16, so that storing a checkpoint in bfloat16 keeps it."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        rounded = value.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(rounded.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _device(model: object, *tensors: Tensor | None) -> torch.device:
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            return parameter.device
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            return tensor.device
    return torch.device("cpu")


def _image_shape(
    who: str,
    ours: UNet | Splice | None,
    given: Sequence[int] | None,
    images: tuple[str, Tensor | None],
) -> tuple[int, int, int]:
    if given is None and isinstance(images[1], Tensor) and images[1].dim() == 4:
        given = images[1].shape[1:]
    if given is None:
        if ours is None:
            raise ValueError(
                f"{who}: image_shape must be given as (C, H, W) for a model of another kind, got None"
            )
        return (ours.config.in_channels, *ours.config.size)
    sizes = tuple(given)
    if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{who}: image_shape must be three positive ints (C, H, W), got {given!r}")
    channels, height, width = sizes
    if ours is not None:
        multiple = ours.config.size_multiple
        if channels != ours.config.in_channels or height % multiple or width % multiple:
            raise ValueError(
                f"{who}: image_shape must be ({ours.config.in_channels}, H, W) with H and W "
                f"multiples of {multiple}, got {sizes}"
            )
    return (channels, height, width)


def check_like(who: str, name: str, value: Tensor, other: Tensor) -> None:
    """Raises unless `value` is finite and has the image shape, dtype and device of `other`."""
    _check_images(who, name, value, other.device)
    if value.shape[1:] != other.shape[1:] or value.dtype != other.dtype:
        raise ValueError(
            f"{who}: {name} must be {other.dtype} [n, {', '.join(map(str, other.shape[1:]))}], "
            f"got {value.dtype} {list(value.shape)}"
        )


def _check_low_res(
    who: str,
    ours: UNet | Splice | None,
    low_res: Tensor | None,
    shape: tuple[int, int, int],
    device: torch.device,
) -> None:
    if ours is not None and ours.config.super_resolution != (low_res is not None):
        rule = "given" if low_res is None else "None"
        because = f"the network has super_resolution={ours.config.super_resolution}"
        got = "None" if low_res is None else "a value"
        raise ValueError(f"{who}: low_res must be {rule}, as {because}, got {got}")
    if low_res is None:
        return
    _check_images(who, "low_res", low_res, device)
    if low_res.shape[1] != shape[0]:
        raise ValueError(f"{who}: low_res must be [n, {shape[0]}, h, w], got {list(low_res.shape)}")


def _check_images(who: str, name: str, value: Tensor, device: torch.device) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{who}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{who}: {name} must be float32 or float64, got {value.dtype}")
    if value.dim() != 4 or 0 in value.shape:
        raise ValueError(f"{who}: {name} must be [n, C, H, W], got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{who}: {name} must be on {device}, got {value.device}")
    if not bool(value.isfinite().all()):
        at = (~value.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{who}: {name} must be finite, got {value[tuple(at)]} at {at}")


def _labels(
    who: str,
    ours: UNet | Splice | None,
    labels: Sequence[int] | Tensor | None,
    for_guidance: bool,
) -> Tensor | None:
    if labels is None:
        return None
    try:
        given = labels.cpu() if isinstance(labels, Tensor) else np.asarray(labels)
        values = given if isinstance(given, Tensor) else torch.from_numpy(given)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{who}: labels must be integers [n], got {labels!r}") from None
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{who}: labels must be integers [n], got {values.dtype}")
    if values.dim() != 1 or not len(values):
        raise ValueError(f"{who}: labels must be integers [n], got shape {list(values.shape)}")
    values = values.long()
    if ours is not None:
        classes = ours.config.num_classes
        if classes is None and for_guidance:
            return values
        if classes is None:
            raise ValueError(f"{who}: labels must be None for an unconditional network, got labels")
        outside = values[(values < -1) | (values >= classes)]
        if len(outside):
            raise ValueError(
                f"{who}: labels must be from 0 to {classes - 1}, or -1 for none, "
                f"got {int(outside[0])}"
            )
    return values

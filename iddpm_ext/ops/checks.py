"""Checks that ops share; errors read `<op>: <argument> must be <rule>, got <value>`.

Values are checked only where that costs no synchronisation: on the CPU, outside of tracing. On a GPU only
types, shapes and devices are; for a step outside the table the kernels write NaN, so nothing crashes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iddpm_ext.ops.columns import NUM_COLUMNS, Column
from iddpm_ext.ops.modes import transformed
from iddpm_ext.random import NoiseKey

HALVES = (torch.float16, torch.bfloat16)
_FEW = 128
FLOATS = (torch.float32, torch.float64, *HALVES)


def looks(value: Tensor) -> bool:
    """Whether the values of a tensor may be read now."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()


def floating(op: str, name: str, value: Any, rank: int | None = None) -> None:
    """A floating tensor, of the given rank if one is given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} must be float16, bfloat16, float32 or float64, got {value.dtype}"
        )
    if rank is not None and value.ndim != rank:
        raise ValueError(f"{op}: {name} must have {rank} dimensions, got shape {list(value.shape)}")


def image_batch(op: str, name: str, value: Any) -> None:
    """A floating tensor [N, C, H, W]."""
    floating(op, name, value)
    if value.ndim != 4:
        raise ValueError(f"{op}: {name} must be [N, C, H, W], got shape {list(value.shape)}")


def has_shape(value: Tensor, *shapes: tuple[int, ...]) -> bool:
    """Whether the tensor has one of the shapes.

    By ==, for torch.compile: of sizes that it leaves free, `in` says that they differ from every number.
    """
    return any(tuple(value.shape) == expected for expected in shapes)


def shape(op: str, name: str, value: Tensor, expected: tuple[int, ...], rule: str) -> None:
    """A tensor of exactly this shape; `rule` describes it in the error."""
    if tuple(value.shape) != expected:
        raise ValueError(
            f"{op}: {name} must be {rule} {list(expected)}, got shape {list(value.shape)}"
        )


def same_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    """Every tensor on the device of the first."""
    for name, value in others.items():
        if value is not None and value.device != first.device:
            raise ValueError(f"{op}: {name} must be on {first.device}, got {value.device}")


def table(op: str, value: Any, device: torch.device) -> None:
    """A coefficient table, float32 or float64 [T, 16], as `Diffusion.table` gives it."""
    floating(op, "table", value)
    if value.ndim != 2 or value.shape[1] != NUM_COLUMNS or value.shape[0] < 1:
        raise ValueError(f"{op}: table must be [T, {NUM_COLUMNS}], got shape {list(value.shape)}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: table must be float32 or float64, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{op}: table must be on {device}, got {value.device}")


def timesteps(op: str, value: Any, batch: int, num_timesteps: int, device: torch.device) -> None:
    """Steps of the chain, int64 [N] in [0, T-1]."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: t must be an int64 tensor [N], got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{op}: t must be int64, got {value.dtype}")
    if tuple(value.shape) != (batch,):
        raise ValueError(f"{op}: t must be [N] with N = {batch}, got shape {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{op}: t must be on {device}, got {value.device}")
    if batch and looks(value):
        # A few numbers are looked at faster by Python than by two kernels.
        few = value.tolist() if batch <= _FEW else torch.aminmax(value)
        low, high = int(min(few)), int(max(few))
        if low < 0 or high >= num_timesteps:
            at = int(((value < 0) | (value >= num_timesteps)).nonzero()[0])
            raise ValueError(
                f"{op}: t must lie in [0, {num_timesteps - 1}] (0-based), got {int(value[at])} at index {at}"
            )


def model_output(op: str, value: Any, x_t: Tensor, table: Tensor) -> None:
    """The network's output for x_t: [N, C, H, W], or [N, 2C, H, W] with the variance head."""
    image_batch(op, "model_output", value)
    n, c, h, w = x_t.shape
    if not has_shape(value, (n, c, h, w), (n, 2 * c, h, w)):
        raise ValueError(
            f"{op}: model_output must be [N, C, H, W] or [N, 2C, H, W] for x_t {list(x_t.shape)}, "
            f"got shape {list(value.shape)}"
        )
    if (
        value.shape[1] == c
        and c
        and looks(table)
        and bool(table[:, Column.LOG_VARIANCE_SCALE].any())
    ):
        raise ValueError(
            f"{op}: model_output must have 2C = {2 * c} channels because the table learns the variance, "
            f"got {c}"
        )


#: (noise, samples, steps, seed, stream + 16 draw): the arguments for noise in an operator's schema.
NoiseArguments = tuple[Tensor | None, Tensor | None, Tensor | None, int, int]


def noise_arguments(op: str, noise: Any, like: Tensor) -> NoiseArguments:
    """Checks noise (a tensor of the shape of `like`, a `NoiseKey` or None) and turns it into those."""
    if noise is None:
        return (None, None, None, 0, 0)
    if isinstance(noise, Tensor):
        floating(op, "noise", noise)
        shape(op, "noise", noise, tuple(like.shape), "of the shape of x_t")
        same_device(op, like, noise=noise)
        return (noise, None, None, 0, 0)
    if not isinstance(noise, NoiseKey):
        raise TypeError(
            f"{op}: noise must be a tensor, a NoiseKey or None, got {type(noise).__name__}"
        )
    batch, device = like.shape[0], like.device
    steps = noise.steps
    if not isinstance(steps, Tensor):
        steps = torch.full((batch,), int(steps), dtype=torch.int64, device=device)
    for name, value in (("samples", noise.samples), ("steps", steps)):
        if not isinstance(value, Tensor) or value.dtype != torch.int64:
            raise TypeError(f"{op}: noise.{name} must be an int64 tensor [N], got {value!r}")
        shape(op, f"noise.{name}", value, (batch,), "[N] =")
        same_device(op, like, **{f"noise.{name}": value})
    # A schema's integers are signed; kernels take the same 64 bits for an unsigned seed.
    seed = noise.seed - (1 << 64) if noise.seed >= 1 << 63 else noise.seed
    return (None, noise.samples, steps, seed, noise.stream + 16 * noise.draw)

"""Counter-based noise: a pure function of (seed, stream, draw, sample, step, element).

Philox4x32-10 with key = (seed low, seed high) and counter = (element // 4, sample, step,
stream + 16 * draw). Its four words w give four numbers; for normals, with
u_i = (w_i + 0.5) / 2^32 rounded in float32,

    z_0 = sqrt(-2 ln u_0) cos(2 pi u_1),  z_1 = sqrt(-2 ln u_0) sin(2 pi u_1),

and z_2, z_3 likewise from u_2, u_3. Elements count within a sample in the order of its
dimensions (C, H, W for images), whatever the memory format.

This file is the definition, which every kernel follows; it runs on any device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iddpm_ext.scalars import make_fields_plain, plain

STREAM_INITIAL = 0
STREAM_REVERSE = 1
STREAM_FORWARD = 2
STREAM_CHOICE = 3
STREAM_DROPOUT = 4

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


@dataclass(frozen=True, eq=False)
class NoiseKey:
    """The key of a tensor of noise: row i belongs to ``samples[i]`` at ``steps[i]``.

    Args:
        seed: 0 <= seed < 2^64.
        stream: 0 x_T, 1 reverse noise, 2 forward noise, 3 timesteps and labels, 4 dropout.
        samples: int64 [N], the global index of each row, of which the low 32 bits are used.
        steps: int64 [N], or one int for all rows: the index in the training chain.
        draw: counts repeated draws for the same sample and step, 0 <= draw < 2^28.
    """

    seed: int
    stream: int
    samples: Tensor
    steps: Tensor | int
    draw: int = 0

    def __post_init__(self) -> None:
        make_fields_plain(self)
        if not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 64:
            raise ValueError(f"NoiseKey: seed must be an int from 0 to 2^64 - 1, got {self.seed!r}")
        if not isinstance(self.stream, int) or not 0 <= self.stream < 16:
            raise ValueError(f"NoiseKey: stream must be an int from 0 to 15, got {self.stream!r}")
        if not isinstance(self.draw, int) or not 0 <= self.draw < 1 << 28:
            raise ValueError(f"NoiseKey: draw must be an int from 0 to 2^28 - 1, got {self.draw!r}")
        _check_indices("samples", self.samples)
        if isinstance(self.steps, Tensor):
            _check_indices("steps", self.steps)
            if self.steps.shape != self.samples.shape:
                raise ValueError(
                    f"NoiseKey: steps must have the shape of samples {tuple(self.samples.shape)}, "
                    f"got {tuple(self.steps.shape)}"
                )
        elif isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise TypeError(f"NoiseKey: steps must be an int or int64 [N], got {self.steps!r}")


def philox_4x32(counter: Sequence[Tensor | int], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 of four counter words and two key words.

    Args:
        counter: four int64 tensors (or ints) with values in [0, 2^32), shapes that broadcast.
        key: two ints in [0, 2^32).

    Returns:
        four int64 tensors with values in [0, 2^32).

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    device = next(
        (word.device for word in counter if isinstance(word, Tensor)), torch.device("cpu")
    )
    # `full` passes the number as a kernel argument; a copy from the host would wait for the device.
    c0, c1, c2, c3 = (
        word if isinstance(word, Tensor) else torch.full((), word, dtype=torch.int64, device=device)
        for word in counter
    )
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64, so masking gives both halves of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            (p0 >> 32 & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = k0 + _KEY_INCREMENTS[0] & _MASK, k1 + _KEY_INCREMENTS[1] & _MASK
    return [c0, c1, c2, c3]


def words(key: NoiseKey, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Uniform 32-bit words in [0, 2^32), int64 of ``shape`` = [N, ...], N as in ``key.samples``."""
    shape = _check_shape(key, shape)
    device = key.samples.device if device is None else torch.device(device)
    elements = math.prod(shape[1:])
    quads = torch.arange((elements + 3) // 4, device=device, dtype=torch.int64)
    samples = key.samples.to(device)[:, None] & _MASK
    steps = key.steps
    steps = steps.to(device)[:, None] & _MASK if isinstance(steps, Tensor) else steps & _MASK
    counter = (quads, samples, steps, key.stream + 16 * key.draw)
    result = philox_4x32(counter, (key.seed & _MASK, key.seed >> 32))
    stacked = torch.stack(torch.broadcast_tensors(*result), dim=-1)
    return stacked.flatten(1)[:, :elements].reshape(shape)


def normal(key: NoiseKey, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Standard normal noise.

    Args:
        key: of the noise, ``key.samples`` int64 [N].
        shape: [N, ...] of the result.
        device: of the result; by default that of ``key.samples``.

    Returns:
        float32 of ``shape``: the formula of this file's docstring in float64, from the float32 u_i,
        rounded once.

    Raises:
        ValueError: shape does not begin with N.
    """
    shape = _check_shape(key, shape)
    elements = math.prod(shape[1:])
    padded = (elements + 3) // 4 * 4
    uniforms = _float32_uniforms(words(key, (shape[0], padded), device)).double()
    pairs = uniforms.view(shape[0], padded // 2, 2)
    radius, angle = (-2 * pairs[..., 0].log()).sqrt(), 2 * math.pi * pairs[..., 1]
    normals = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return normals.flatten(1)[:, :elements].reshape(shape).float()


def uniform(
    key: NoiseKey, shape: Sequence[int], device: torch.device | str | None = None
) -> Tensor:
    """Uniform numbers (w + 0.5) / 2^32 in (0, 1), float64 of ``shape`` = [N, ...], exact."""
    return (words(key, shape, device).double() + 0.5) * 2.0**-32


def integers(
    key: NoiseKey, high: int, shape: Sequence[int], device: torch.device | str | None = None
) -> Tensor:
    """Integers floor(w * high / 2^32) in [0, high), int64 of ``shape`` = [N, ...].

    ``high`` is from 1 to 2^31; no value is more likely than another by more than high / 2^32.
    """
    high = plain(high)
    if isinstance(high, bool) or not isinstance(high, int) or not 1 <= high <= 1 << 31:
        raise ValueError(f"integers: high must be an int from 1 to 2^31, got {high!r}")
    return words(key, shape, device) * high >> 32


def _float32_uniforms(words: Tensor) -> Tensor:
    return (words.float() + 0.5) * 2.0**-32


def _check_indices(name: str, indices: Tensor) -> None:
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1:
        got = f"{indices.dtype} {tuple(indices.shape)}" if isinstance(indices, Tensor) else indices
        raise TypeError(f"NoiseKey: {name} must be an int64 tensor [N], got {got}")


def _check_shape(key: NoiseKey, shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(int(size) for size in shape)
    if not shape or shape[0] != len(key.samples):
        raise ValueError(
            f"noise: shape must begin with the number of samples {len(key.samples)}, got {shape}"
        )
    return shape

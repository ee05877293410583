"""Weights in the layouts that the CPU engine's kernels read (`csrc/unet_engine/plan.h`).

A panel is 32 output channels wide (`_C.PANEL`); missing ones are zero. Computed once, in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm_ext import _native

# Winograd's interpolation points besides infinity; those of F(4, 3) are chosen for powers close to one.
POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.5**0.5, -(0.5**0.5), 2.0**0.5, -(2.0**0.5))}


def pack_matrix(weight: Tensor) -> Tensor:
    """weight [K, C] -> float32 [ceil(K / 32), C, 32]."""
    columns, panel = weight.shape[0], _native.native().PANEL
    padded = F.pad(weight.detach(), (0, 0, 0, -columns % panel))
    return padded.unflatten(0, (-1, panel)).transpose(1, 2).float().contiguous()


def pack_vector(vector: Tensor) -> Tensor:
    """vector [K] -> a float32 copy [ceil(K / 32) * 32], zero-padded."""
    width = vector.shape[0] + -vector.shape[0] % _native.native().PANEL
    packed = torch.zeros(width, dtype=torch.float32, device="cpu")
    packed[: vector.shape[0]] = vector.detach()
    return packed


def pack_taps(weight: Tensor) -> Tensor:
    """weight [K, C, 3, 3] -> float32 [ceil(K / 32), 9 * C, 32], for a product with im2col rows."""
    return pack_matrix(weight.permute(0, 2, 3, 1).flatten(1))


def pack_pairs(packed: Tensor) -> Tensor:
    """packed [..., C, 32], C even -> bfloat16 [..., C / 2, 32, 2], the order that vdpbf16ps reads."""
    return packed.unflatten(-2, (-1, 2)).transpose(-1, -2).bfloat16().contiguous()


def pack_tiles(weight: Tensor) -> Tensor:
    """weight [K, C, taps] -> bfloat16 [ceil(K / 32), taps, ceil(C / 32), 2, 16, 16, 2] for AMX.

    The last three: pairs of input channels, output channels, the two of a pair. Missing ones are 0.
    """
    columns, channels, taps = weight.shape
    padded = F.pad(weight.detach(), (0, 0, 0, -channels % 32, 0, -columns % 32))
    shape = (padded.shape[0] // 32, 2, 16, padded.shape[1] // 32, 16, 2, taps)
    return padded.reshape(shape).permute(0, 6, 3, 1, 4, 2, 5).bfloat16().contiguous()


def split_products(weight: Tensor) -> Tensor:
    """weight [K, C] -> [K, C, 3], by which a product has 16 correct bits from bfloat16 operands.

    x w is summed as round(x) round(w) + (x - round(x)) round(w) + round(x) (w - round(w)); only the product
    of the two remainders is left out.
    """
    rounded = weight.detach().bfloat16().to(weight.dtype)
    return torch.stack((rounded, rounded, weight.detach() - rounded), -1)


def filter_transform(tile: int) -> Tensor:
    """G of F(tile, 3), float64 [tile + 2, 3]: row p is (1, p, p^2) / prod_{q != p} (p - q)."""
    points = POINTS[tile]
    rows = []
    for p in points:
        norm = 1.0
        for q in points:
            norm *= p - q if q != p else 1.0
        # The input transform's first row is normalised to a leading +1.
        norm = abs(norm) if p == 0 else norm
        rows.append([1 / norm, p / norm, p * p / norm])
    rows.append([0.0, 0.0, 1.0])
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def pack_winograd(weight: Tensor, tile: int) -> Tensor:
    """weight [K, C, 3, 3] -> G g G^T as float32 [ceil(K / 32), (tile + 2)^2, C, 32]."""
    g = filter_transform(tile)
    u = torch.einsum("ia,jb,kcab->ijkc", g, g, weight.detach().double()).flatten(0, 1)
    panel = _native.native().PANEL
    padded = F.pad(u, (0, 0, 0, -weight.shape[0] % panel)).unflatten(1, (-1, panel))
    return padded.permute(1, 0, 3, 2).float().contiguous()

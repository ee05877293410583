"""The forward process in Triton: a program computes BLOCK Philox counters, four elements each."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from iddpm_ext.ops.arguments import empty_images, plane
from iddpm_ext.ops.columns_triton import (
    NUM_COLUMNS,
    SQRT_ALPHA_BAR,
    SQRT_ONE_MINUS_ALPHA_BAR,
)
from iddpm_ext.ops.noise_triton import normals
from iddpm_ext.ops.plane_triton import offset

BLOCK = 256


@triton.jit
def _kernel(
    x_0, x_n, x_c, x_p,
    noise, z_n, z_c, z_p,
    result, r_n, r_c, r_p,
    t, table, samples, steps,
    seed, stream_draw, num_timesteps, hw, count, blocks_per_sample,
    DRAWN: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    sample = block // blocks_per_sample
    quad = (block - sample * blocks_per_sample) * BLOCK
    at = 4 * quad + tl.arange(0, 4 * BLOCK).to(tl.int64)
    inside = at < count

    step = tl.load(t + sample)
    known = (step >= 0) & (step < num_timesteps)
    row = table + tl.where(known, step, 0) * NUM_COLUMNS
    poison = tl.where(known, 0.0, float("nan"))

    x = tl.load(x_0 + sample * x_n + offset(at, hw, x_c, x_p, DENSE), mask=inside, other=0.0)
    if DRAWN:
        z = normals(
            seed, quad, tl.load(samples + sample), tl.load(steps + sample), stream_draw, BLOCK
        )
    else:
        z = tl.load(noise + sample * z_n + offset(at, hw, z_c, z_p, DENSE), mask=inside, other=0.0)
    x_t = tl.load(row + SQRT_ALPHA_BAR) * x + (tl.load(row + SQRT_ONE_MINUS_ALPHA_BAR) + poison) * z
    tl.store(result + sample * r_n + offset(at, hw, r_c, r_p, DENSE), x_t, mask=inside)


def q_sample(
    x_0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    samples: Tensor | None,
    steps: Tensor | None,
    seed: int,
    stream_draw: int,
) -> Tensor:
    x_t = empty_images(x_0)
    if x_0.numel() == 0:
        return x_t
    n, c, h, w = x_0.shape
    x, result = plane(x_0), plane(x_t)
    z = plane(noise.float()) if noise is not None else x
    blocks = triton.cdiv(c * h * w, 4 * BLOCK)
    _kernel[(n * blocks,)](
        x.tensor, *x.view[1:],
        z.tensor, *z.view[1:],
        x_t, *result.view[1:],
        t.contiguous(), table.float().contiguous(),
        samples.contiguous() if samples is not None else t,
        steps.contiguous() if steps is not None else t,
        seed, stream_draw, table.shape[0], h * w, c * h * w, blocks,
        DRAWN=samples is not None,
        DENSE=all(p.view[2:] == (h * w, 1) for p in (x, z, result)),
        BLOCK=BLOCK,
    )  # fmt: skip
    return x_t


def aot_cases() -> list[tuple[object, dict[str, str], dict[str, object]]]:
    """(kernel, signature, constants) of the variants that people run, for compilation without a GPU."""
    pointers = {
        "x_0": "*fp32", "noise": "*fp32", "result": "*fp32",
        "t": "*i64", "table": "*fp32", "samples": "*i64", "steps": "*i64",
    }  # fmt: skip
    signature = {
        name: pointers.get(name, "constexpr" if name.isupper() else "i64")
        for name in _kernel.arg_names
    }
    return [
        (_kernel, signature, {"DRAWN": drawn, "DENSE": True, "BLOCK": BLOCK})
        for drawn in (False, True)
    ]

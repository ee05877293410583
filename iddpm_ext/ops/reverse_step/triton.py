"""The reverse step in Triton: a program computes BLOCK Philox counters of a sample, four elements each."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from iddpm_ext.ops.arguments import empty_images, plane
from iddpm_ext.ops.columns_triton import (
    LOG_VARIANCE_BIAS,
    LOG_VARIANCE_SCALE,
    MEAN_X0,
    MEAN_XT,
    NOISE_SCALE,
    NUM_COLUMNS,
    X0_FROM_OUT,
    X0_FROM_XT,
)
from iddpm_ext.ops.noise_triton import normals
from iddpm_ext.ops.plane_triton import offset

BLOCK = 256


@triton.jit
def _kernel(
    x_t, x_n, x_c, x_p,
    out, out_n, out_c, out_p,
    noise, z_n, z_c, z_p,
    result_prev, result_x_0, r_n, r_c, r_p,
    t, table, samples, steps,
    seed, stream_draw, num_timesteps, hw, count, blocks_per_sample,
    LEARNED: tl.constexpr, NOISE: tl.constexpr, CLIP: tl.constexpr, DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # NOISE: 0 none, 1 given as a tensor, 2 drawn here.
    block = tl.program_id(0).to(tl.int64)
    sample = block // blocks_per_sample
    quad = (block - sample * blocks_per_sample) * BLOCK
    at = 4 * quad + tl.arange(0, 4 * BLOCK).to(tl.int64)
    inside = at < count

    step = tl.load(t + sample)
    known = (step >= 0) & (step < num_timesteps)
    row = table + tl.where(known, step, 0) * NUM_COLUMNS
    poison = tl.where(known, 0.0, float("nan"))

    x = tl.load(x_t + sample * x_n + offset(at, hw, x_c, x_p, DENSE), mask=inside, other=0.0)
    eps = tl.load(
        out + sample * out_n + offset(at, hw, out_c, out_p, DENSE), mask=inside, other=0.0
    )
    x_0 = (tl.load(row + X0_FROM_XT) + poison) * x + tl.load(row + X0_FROM_OUT) * eps.to(tl.float32)
    if CLIP:
        x_0 = tl.where(x_0 < -1.0, -1.0, x_0)
        x_0 = tl.where(x_0 > 1.0, 1.0, x_0)
    prev = tl.load(row + MEAN_X0) * x_0 + tl.load(row + MEAN_XT) * x
    if NOISE != 0:
        log_variance = tl.load(row + LOG_VARIANCE_BIAS) + tl.zeros_like(x)
        if LEARNED:
            v_at = offset(at + count, hw, out_c, out_p, DENSE)
            v = tl.load(out + sample * out_n + v_at, mask=inside, other=0.0)
            log_variance += tl.load(row + LOG_VARIANCE_SCALE) * v.to(tl.float32)
        if NOISE == 1:
            z = tl.load(
                noise + sample * z_n + offset(at, hw, z_c, z_p, DENSE), mask=inside, other=0.0
            )
        else:
            z = normals(
                seed, quad, tl.load(samples + sample), tl.load(steps + sample), stream_draw, BLOCK
            )
        scale = tl.load(row + NOISE_SCALE)
        # A product with 0 would turn an infinite deviation into NaN.
        prev += tl.where(scale != 0.0, scale * tl.exp(0.5 * log_variance) * z, 0.0)
    target = sample * r_n + offset(at, hw, r_c, r_p, DENSE)
    tl.store(result_prev + target, prev, mask=inside)
    tl.store(result_x_0 + target, x_0, mask=inside)


def reverse_step(
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    samples: Tensor | None,
    steps: Tensor | None,
    seed: int,
    stream_draw: int,
    clip: bool,
) -> tuple[Tensor, Tensor]:
    x_prev, x_0 = empty_images(x_t), empty_images(x_t)
    if x_t.numel() == 0:
        return x_prev, x_0
    n, c, h, w = x_t.shape
    x, out, result = plane(x_t), plane(model_output), plane(x_prev)
    z = plane(noise.float()) if noise is not None else x
    unused = t
    blocks = triton.cdiv(c * h * w, 4 * BLOCK)
    _kernel[(n * blocks,)](
        x.tensor, *x.view[1:],
        out.tensor, *out.view[1:],
        z.tensor, *z.view[1:],
        x_prev, x_0, *result.view[1:],
        t.contiguous(), table.float().contiguous(),
        samples.contiguous() if samples is not None else unused,
        steps.contiguous() if steps is not None else unused,
        seed, stream_draw, table.shape[0], h * w, c * h * w, blocks,
        LEARNED=model_output.shape[1] > c,
        NOISE=2 if samples is not None else int(noise is not None),
        CLIP=clip,
        DENSE=all(p.view[2:] == (h * w, 1) for p in (x, out, z, result)),
        BLOCK=BLOCK,
    )  # fmt: skip
    return x_prev, x_0


def aot_cases() -> list[tuple[object, dict[str, str], dict[str, object]]]:
    """(kernel, signature, constants) of the variants that people run, for ahead-of-time compilation."""
    pointers = {
        "x_t": "*fp32", "out": "*bf16", "noise": "*fp32", "result_prev": "*fp32",
        "result_x_0": "*fp32", "t": "*i64", "table": "*fp32", "samples": "*i64", "steps": "*i64",
    }  # fmt: skip
    signature = {
        name: pointers.get(name, "constexpr" if name.isupper() else "i64")
        for name in _kernel.arg_names
    }
    return [
        (
            _kernel,
            signature,
            {"LEARNED": True, "NOISE": noise, "CLIP": True, "DENSE": True, "BLOCK": BLOCK},
        )
        for noise in (1, 2)
    ]

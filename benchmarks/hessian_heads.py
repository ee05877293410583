"""Heads of variances by the network's derivative, to compare with those of `iddpm covariance`.

    python -m benchmarks.hessian_heads fashion-mnist --data /usr/share/datasets/fashion-mnist \\
        --out hessian.safetensors

trains the same heads on the same images with another target: the variance of x_0 given x_t that the network's
own derivative J implies, (1 - ab) / sqrt(ab) J, whose diagonal is the mean of v (J v) over signs v (Ou et al.
2025, "OCM-DPM"). `--variance optimal` of `iddpm nll` and `iddpm sample`, and the rows of covariances in
`benchmarks.few_steps --model hessian.safetensors`, then measure them.

Single targets are negative at times, so the loss is exp(h) - r h, which has the same minimum for these. J v
is a central difference. Near pure noise the mean of the target is no variance (it leaves (0, 1]); such steps
count as unknown: V_t stays at the greatest known one, and the ratio is 1.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

import iddpm_ext
from iddpm_ext.engines.spec import weights_fingerprint
from iddpm_ext.likelihood.covariance import SquaredErrors, heads_request, train_heads
from iddpm_ext.likelihood.evaluate import Rows
from iddpm_ext.random import STREAM_CHOICE, NoiseKey, integers

# Of the noise's standard deviation: the error falls with its square, rounding grows with its inverse.
_STEP = 0.02
_LEAST_VARIANCE = 1e-10


class HessianDiagonal(SquaredErrors):
    """Estimates of the diagonal of Var(x_0 | x_t) by the derivative of the network's x_0."""

    def scale(self, means: Tensor) -> tuple[Tensor, Tensor]:
        """V_t that never falls, and the steps before the first whose mean is no variance."""
        known = ((means <= 0) | (means > 1)).long().cumsum(0) == 0
        return means.clamp(_LEAST_VARIANCE, 1).cummax(0).values, known

    def loss(self, h: Tensor, ratio: Tensor) -> Tensor:
        """Least where exp(h) is the conditional mean of the ratio, which may be negative at times."""
        return (torch.exp(h) - ratio * h).mean()

    def __call__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """One estimate [n, C, H, W], and features [n, width, H, W]."""
        _, x_t, out, t = self._evaluator.outputs(rows)
        # Far from the draws that choose images, two of each update.
        key = NoiseKey(
            self.request.seed, STREAM_CHOICE, rows.image, rows.t, (1 << 26) + int(rows.draw[0])
        )
        v = (2 * integers(key, 2, x_t.shape) - 1).to(x_t)
        return v * self.along(x_t, t, rows.image, v), self._features(out)

    def along(self, x_t: Tensor, t: Tensor, image: Tensor, v: Tensor) -> Tensor:
        """(1 - ab) / sqrt(ab) J v for noised images [n, C, H, W] at steps t int64 [n]."""
        ab = self.request.spec.diffusion.alphas_cumprod.to(t.device)[t][:, None, None, None]
        step = (_STEP * (1 - ab).sqrt()).float()
        ahead, behind = (
            self._x_0(x, self._evaluator.output(x, t, image), t)
            for x in (x_t + step * v, x_t - step * v)
        )
        return ((1 - ab) / ab.sqrt()).float() * (ahead - behind) / (2 * step)


def main() -> None:
    """Trains the heads and writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a name or file of iddpm_ext.load")
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=4096, help="images")
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = iddpm_ext.load(args.model)
    began = time.perf_counter()
    request = heads_request(model, args.data, limit=args.limit, seed=args.seed)
    found = train_heads(HessianDiagonal(request), args.updates, True)
    model.extra = {**model.extra, "covariance": found.to_extra(weights_fingerprint(model))}
    iddpm_ext.save(model, args.out)
    print(f"{args.out}: {args.updates} updates, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()

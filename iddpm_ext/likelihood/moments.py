"""Computes E|eps_theta|^2 at the steps of a chain, from which analytic variances follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from iddpm_ext.diffusion import Diffusion
from iddpm_ext.diffusion.moments import Moments, spread_steps
from iddpm_ext.likelihood.evaluate import Evaluator, Outputs, Rows, progress_bar
from iddpm_ext.likelihood.images import Data
from iddpm_ext.likelihood.request import make_likelihood_request
from iddpm_ext.ops.columns import Column

_STEPS = 128


def find_moments(
    model: Callable[..., Tensor],
    data: Data,
    *,
    labels: Sequence[int] | Tensor | None = None,
    limit: int | None = 10,
    batch_size: int | None = None,
    seed: int = 0,
    split: str = "train",
    diffusion: Diffusion | None = None,
    engine: bool = True,
    backend: str = "auto",
    progress: bool = True,
) -> Moments:
    """E|eps_theta|^2 / d of 128 steps, half of them evenly spaced in t and half in log-SNR.

    Costs 128 network evaluations per image. (`find_schedules` also returns the moments of its candidates.)

    Args: as in `find_schedules`; ten images suffice.

    Returns:
        `Moments`; `extra["moments"] = moments.to_extra(weights_fingerprint(model))` makes
        `variance="analytic"` work.

    Raises: as `nll`.

    Source: Bao et al. 2022, "Analytic-DPM", equation 8.
    """
    request = make_likelihood_request(
        model, data, labels=labels, low_res=None, budget=None, steps=None, clip=False, exact=False,
        batch_size=batch_size, seed=seed, split=split, limit=limit, diffusion=diffusion, dtype=None,
        engine=engine, backend=backend, progress=progress, who="find_moments", shuffle=True,
    )  # fmt: skip
    chain, count = request.spec.diffusion, len(request.x_0)
    steps = spread_steps(chain, _STEPS)
    evaluator = Evaluator(request, request.batch_size)
    image = torch.arange(count, dtype=torch.int64, device="cpu")
    means = []
    with progress_bar(len(steps) * count, 0, progress) as bar:
        for step in steps:
            total = 0.0
            for part in image.split(request.batch_size):
                t = torch.full_like(part, step)
                outputs = evaluator.outputs(Rows(part, t, torch.zeros_like(t)))
                total += float(eps_squares(chain, outputs).sum())
            means.append(total / count)
            bar.update(count)
    found = torch.tensor(means, dtype=torch.float64, device="cpu")
    return Moments(chain.timesteps[steps], found)


def eps_squares(chain: Diffusion, outputs: Outputs) -> Tensor:
    """1 + (|eps_theta|^2 - |eps|^2) / d of evaluations, float64 [n].

    The expectation is that of |eps_theta|^2 / d, as E|eps|^2 / d = 1; but near pure noise the two vary
    together, so that 1 - E|eps_theta|^2 / d, which matters, is estimated with little variance.
    """
    x_0, x_t, out, t = outputs
    row = chain.table(x_t.device, dtype=torch.float64)[t][:, :, None, None, None]
    root = row[:, Column.SQRT_ALPHA_BAR]
    rest = row[:, Column.SQRT_ONE_MINUS_ALPHA_BAR]
    predicted = (
        row[:, Column.X0_FROM_XT] * x_t + row[:, Column.X0_FROM_OUT] * out[:, : x_t.shape[1]]
    )
    eps_theta, eps = ((x_t - root * image) / rest for image in (predicted, x_0))
    return 1 + (eps_theta.square() - eps.square()).flatten(1).mean(1)

"""Steps for pictures: the K steps whose walk stays nearest to a fine one.

In x / sqrt(alpha_bar) the flow is dx / ds = eps(x, s) with s = sqrt((1 - alpha_bar) / alpha_bar), and a jump
of DDIM from s_i to s_j is Euler's step. From the points of a fine walk, the error of every jump is known
without a further evaluation:

    e(i, j) = E|x(s_j) - x(s_i) - (s_j - s_i) eps(x(s_i), s_i)|

What becomes of it on the way to s = 0 is estimated by the flow of normal data of the images' deviation d,
which shrinks it by d / sqrt(d^2 + s_j^2). The sum over a schedule's jumps bounds the error of its images to
first order, and `shortest_paths` finds the schedule of every length for which it is least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from iddpm_ext.diffusion import Diffusion
from iddpm_ext.diffusion.moments import spread_steps
from iddpm_ext.diffusion.shortest import JumpTerms, shortest_paths
from iddpm_ext.ops.columns import Column
from iddpm_ext.sampling.loop import SampleStep, batches, initial, network_of, numbers, run
from iddpm_ext.sampling.request import make_request
from iddpm_ext.scalars import plain


@dataclass(frozen=True, eq=False)
class PictureSchedules:
    """What `find_picture_schedules` found.

    steps: K -> its K indices in the training chain, ascending. distance: K -> the bound of its error a
    dimension, root mean square.
    """

    steps: dict[int, list[int]]
    distance: dict[int, float]

    def to_extra(self) -> dict[str, list[int]]:
        """What a checkpoint's `extra["picture_schedules"]` holds."""
        return {str(count): indices for count, indices in self.steps.items()}


def find_picture_schedules(
    model: Callable[..., Tensor],
    *,
    n: int = 256,
    labels: Sequence[int] | Tensor | None = None,
    candidates: int = 128,
    most: int = 100,
    batch_size: int | None = None,
    seed: int = 0,
    diffusion: Diffusion | None = None,
    image_shape: Sequence[int] | None = None,
    engine: bool = True,
    progress: bool = True,
) -> PictureSchedules:
    """For every K up to `most`, the K steps whose images stay nearest to those of a fine walk.

    Costs `candidates` network evaluations an image, and no data.

    Args:
        model, labels, batch_size, seed, diffusion, image_shape, engine, progress: as in `sample`.
        n: how many images are walked. candidates: how many of the chain's steps may be chosen, at
            least 4: half evenly spaced in t and half in log-SNR; the last step is in every schedule.
        most: the largest K, at least 2.

    Returns:
        `PictureSchedules`; `extra["picture_schedules"] = schedules.to_extra()` makes
        `steps="pictures-K"` work.

    Raises: as `sample`.

    Source: after Chen et al. 2024, "On the Trajectory Regularity of ODE-based Diffusion Sampling".
    """
    n, candidates, most = plain((n, candidates, most))
    for name, value, least in (("n", n, 1), ("candidates", candidates, 4), ("most", most, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"find_picture_schedules: {name} must be an int of at least {least}, got {value!r}"
            )
    request = make_request(
        "find_picture_schedules", model, None, n=n, sampler="unipc", labels=labels, seed=seed,
        batch_size=batch_size, diffusion=diffusion, image_shape=image_shape, engine=engine,
        progress=progress,
    )  # fmt: skip
    whole = request.spec.diffusion
    steps = spread_steps(whole, candidates)
    chain = whole.respace(steps)
    request = replace(request, spec=replace(request.spec, diffusion=chain))
    network, total = network_of(request), None
    for images in batches(n, request.batch_size):
        x_0: list[Tensor] = []
        x = [initial(request, numbers(images, request.spec.device))]

        def keep(step: SampleStep, x: list[Tensor] = x, x_0: list[Tensor] = x_0) -> None:
            x.append(step.x)
            x_0.append(step.x_0)

        run(request, [images], keep, network)
        errors = jump_errors(chain, x[::-1], x_0[::-1]) * (len(images) / n)
        total = errors if total is None else total + errors
    assert total is not None
    terms = _as_terms(total)
    paths = shortest_paths(terms, most)
    timesteps = chain.timesteps.tolist()
    return PictureSchedules(
        steps={count: [timesteps[i] for i in path] for count, path in paths.items()},
        distance={count: terms.bound(path) for count, path in paths.items()},
    )


def jump_errors(chain: Diffusion, x: Sequence[Tensor], x_0: Sequence[Tensor]) -> Tensor:
    """e(i, j) as it arrives at s = 0, a mean over images, root mean square, float64 [G, G + 1].

    x: of G + 1 points of a fine walk, s = 0 and the steps of `chain`, each [N, C, H, W]. x_0: what the
    network saw at each step. Entry (i, 0) is the jump from step i to s = 0, (i, j + 1) that to step j; those
    to no earlier place are 0.
    """
    row = chain.table(dtype=torch.float64)
    root = row[:, Column.SQRT_ALPHA_BAR]
    s = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"),
                   row[:, Column.SQRT_ONE_MINUS_ALPHA_BAR] / root])  # fmt: skip
    points = [x[0].double(), *(p.double() / float(r) for p, r in zip(x[1:], root, strict=True))]
    deviation = float((points[0] - points[0].mean(0)).square().mean().sqrt())
    shrunk = deviation / (deviation**2 + s.square()).sqrt()
    count = len(root)
    errors = torch.zeros(count, count + 1, dtype=torch.float64, device="cpu")
    for i in range(count):
        toward = points[i + 1] - x_0[i].double()  # s_i eps
        for j in range(i + 1):
            left = points[j] - x_0[i].double() - float(s[j] / s[i + 1]) * toward
            errors[i, j] = left.square().flatten(1).mean(1).sqrt().mean() * shrunk[j]
    return errors


def _as_terms(errors: Tensor) -> JumpTerms:
    """For `shortest_paths`: the jump to s = 0 in the place of the decoder, and no end but the last."""
    ends = torch.full((len(errors),), torch.inf, dtype=torch.float64, device="cpu")
    ends[-1] = 0
    return JumpTerms(errors[:, 1:].tril(-1), errors[:, :1].expand(-1, len(errors)).triu(1), ends)

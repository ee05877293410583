"""Step schedules for image quality: the K steps with which DDIM stays closest to DDIM with many steps.

For x / sqrt(alpha_bar) the probability flow ODE is dx / ds = eps(x, s) with
s = sqrt((1 - alpha_bar) / alpha_bar), and a DDIM step from s_i to s_j is an Euler step. From the points of a
trajectory of many steps, the error of every such step follows without another evaluation:

    e(i, j) = E|x(s_j) - x(s_i) - (s_j - s_i) eps(x(s_i), s_i)|

Near pure noise a network knows next to nothing of x_0, and its error, divided by sqrt(alpha_bar), becomes
colours and shapes. Ancestral steps forget them; DDIM and the solvers, which add no noise, carry them into the
images. So schedules begin later, where two draws of noise lead to predictions that differ little.

On the way to s = 0 it shrinks; by d / sqrt(d^2 + s_j^2), if the data were normal with the images' standard
deviation d. The sum over the steps of a schedule bounds the error of its images to first order, and
`shortest_paths` finds the schedule of every length that minimises it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from iddpm_ext.diffusion import Diffusion
from iddpm_ext.diffusion.moments import spread_steps
from iddpm_ext.diffusion.shortest import JumpTerms, shortest_paths
from iddpm_ext.engines.base import undisturbed
from iddpm_ext.engines.choosing import Network
from iddpm_ext.ops.columns import Column
from iddpm_ext.random import STREAM_INITIAL, NoiseKey, normal
from iddpm_ext.sampling.loop import SampleStep, batches, initial, network_of, numbers, run
from iddpm_ext.sampling.request import Request, make_request
from iddpm_ext.scalars import plain

# Draws of noise, two each, and how much farther apart than at their closest predictions may be.
_PAIRS = 32
_FACTOR = 2.0


@dataclass(frozen=True, eq=False)
class PictureSchedules:
    """What `find_picture_schedules` found.

    steps: K -> K indices in the training chain, ascending. distance: K -> the bound of their error, as root
    mean square over the dimensions of an image. first: the step that all of them begin with.
    """

    steps: dict[int, list[int]]
    distance: dict[int, float]
    first: int

    def to_extra(self) -> dict[str, list[int]]:
        """The schedules as a checkpoint's `extra["picture_schedules"]` holds them."""
        return {str(count): indices for count, indices in self.steps.items()}


def find_picture_schedules(
    model: Callable[..., Tensor],
    *,
    n: int = 256,
    labels: Sequence[int] | Tensor | None = None,
    candidates: int = 128,
    most: int = 100,
    first: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    diffusion: Diffusion | None = None,
    image_shape: Sequence[int] | None = None,
    engine: bool = True,
    progress: bool = True,
) -> PictureSchedules:
    """For every K up to `most`, the K steps whose images stay closest to those of many steps.

    Costs `candidates` network evaluations per image, and some 5,000 to find the first step; needs no data.

    Args:
        model, labels, batch_size, seed, diffusion, image_shape, engine, progress: as in `sample`.
        n: how many images are drawn. candidates: how many of the chain's steps are considered, at least
            4, half of them evenly spaced in t and half in log-SNR.
        most: the largest K, at least 2.
        first: the step of the training chain that every schedule begins with, from pure noise. None: the
            noisiest candidate where two predictions of x_0 from pure noise, of one class, are at most twice
            as far apart (in mean square) as at the candidate where they are closest.

    Returns:
        `PictureSchedules`; `extra["picture_schedules"] = schedules.to_extra()` makes
        `steps="pictures-K"` work.

    Raises: as `sample`.

    Source: after Chen et al. 2024, "On the Trajectory Regularity of ODE-based Diffusion Sampling".
    """
    n, candidates, most, first = plain((n, candidates, most, first))
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
    begin = None if first is None else _step_of(whole, first)
    network, total = network_of(request), None
    if begin is None:
        begin = _first_step(request, network, spread_steps(whole, candidates))
    chain = whole.respace(spread_steps(whole.respace(list(range(begin + 1))), candidates))
    request = replace(request, spec=replace(request.spec, diffusion=chain))
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
        first=timesteps[-1],
    )


def _step_of(chain: Diffusion, first: object) -> int:
    """The step of a chain that is the training step `first`, not its first one."""
    timesteps = chain.timesteps.tolist()
    if isinstance(first, bool) or first not in timesteps[1:]:
        raise ValueError(
            f"find_picture_schedules: first must be None or a step of the training chain after "
            f"{timesteps[0]}, up to {timesteps[-1]}, got {first!r}"
        )
    return timesteps.index(first)


def _first_step(request: Request, network: Network, steps: list[int]) -> int:
    """The one of `steps`, ascending, that chains should begin with; not the first of them."""
    alpha_bar = request.spec.diffusion.alphas_cumprod
    noisy = [step for step in steps[1:] if alpha_bar[step] < 0.5]
    with undisturbed(request.spec.device.type):
        apart = {step: _apart(request, network, step) for step in noisy}
    least = min(apart.values(), default=0.0)
    return max((step for step in noisy if apart[step] <= _FACTOR * least), default=steps[-1])


def _apart(request: Request, network: Network, step: int) -> float:
    """Mean square of the difference of two predictions of x_0, not clamped, from pure noise at a step."""
    spec, total = request.spec, 0.0
    row, shape = spec.diffusion.table(spec.device)[step], spec.image_shape
    for images in batches(min(_PAIRS, request.n), request.batch_size):
        samples = numbers(images, spec.device)
        t = torch.full_like(samples, step)
        labels = None if spec.labels is None else spec.labels[samples]
        low_res = None if spec.low_res is None else spec.low_res[samples]
        x_0 = []
        for draw in (0, 1):
            key = NoiseKey(request.seed, STREAM_INITIAL, samples, 0, draw)
            x = normal(key, (len(samples), *shape), spec.device)
            out = network.at(x, spec.diffusion.model_timesteps(t), labels, low_res)
            x_0.append(row[Column.X0_FROM_XT] * x + row[Column.X0_FROM_OUT] * out[:, : shape[0]])
        total += float((x_0[0] - x_0[1]).double().square().mean()) * len(samples)
    return total / min(_PAIRS, request.n)


def jump_errors(chain: Diffusion, x: Sequence[Tensor], x_0: Sequence[Tensor]) -> Tensor:
    """The error of every jump when it arrives at s = 0, float64 [G, G + 1].

    Root mean square over dimensions, mean over images. Entry (i, 0) is the jump from step i to s = 0,
    (i, j + 1) that to step j < i; all other entries are 0.

    x: the G + 1 points of the trajectory at s = 0 and at the steps of `chain`, each [N, C, H, W]. x_0: the
    network's prediction at each step.
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
    """As terms for `shortest_paths`: the decoder's is the jump to s = 0; paths begin at the last step."""
    ends = torch.full((len(errors),), torch.inf, dtype=torch.float64, device="cpu")
    ends[-1] = 0
    return JumpTerms(errors[:, 1:].tril(-1), errors[:, :1].expand(-1, len(errors)).triu(1), ends)

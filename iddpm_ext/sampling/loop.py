"""The reverse chain: from x_T to images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iddpm_ext.diffusion import Diffusion
from iddpm_ext.ops import reverse_step
from iddpm_ext.random import STREAM_INITIAL, STREAM_REVERSE, NoiseKey, normal
from iddpm_ext.sampling.engines import Network, choose_network
from iddpm_ext.sampling.request import Request, Steps, make_request


class SampleStep(NamedTuple):
    """The images after one step of the chain.

    x: x_{t-1}, [N, C, H, W]. x_0: the images that the network saw in x_t, like x.
    t: the step of the chain that was taken, T-1 first and 0 last.
    timestep: its index in the training chain.
    first: which image of the call x begins with.
    """

    x: Tensor
    x_0: Tensor
    t: int
    timestep: int
    first: int


def sample(
    model: Callable[..., Tensor],
    steps: Steps = 50,
    *,
    n: int | None = None,
    sampler: str = "ddpm",
    eta: float = 0.0,
    labels: Sequence[int] | Tensor | None = None,
    guidance_scale: float = 1.0,
    low_res: Tensor | None = None,
    seed: int = 0,
    x_T: Tensor | None = None,
    clip: bool = True,
    batch_size: int | None = None,
    diffusion: Diffusion | None = None,
    image_shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    engine: bool = True,
    exact: bool = False,
    backend: str = "auto",
    progress: bool = True,
    callback: Callable[[SampleStep], Any] | None = None,
) -> Tensor:
    """Draws images from a model by walking its chain backwards.

        x_{t-1} = mean(x_t, x_0) + exp(log_variance / 2) z,  x_0 from the network's output

    ancestrally (equations 11 and 15 of Improved DDPM), or by DDIM (equation 12 of Song et al.
    2021). Image i depends on the seed and i, not on the batches, up to the network's rounding.

    Args:
        model: a `UNet`, or any callable (x [N, C, H, W], timesteps float32 [N], **kwargs) ->
            [N, C, H, W], or [N, 2C, H, W] with the variance. It gets `y` where there are labels and
            `low_res` where that is given. Modules run in evaluation mode.
        steps: what `Diffusion.respace` takes (50, [0, 100, 3999], "ddim50", "10,15,20"), counted
            in the steps of `diffusion`; "optimal-K" for a schedule of the checkpoint; None for every step.
        n: how many images; 16, or the length of labels, low_res or x_T, which must agree.
        sampler: "ddpm" (ancestral) or "ddim".
        eta: the noise of DDIM, from 0 (none) to 1.
        labels: integers [n], -1 for an unlabelled image. A class-conditional `UNet` draws those
            that are not given.
        guidance_scale: s of classifier-free guidance, eps = eps_none + s (eps_label - eps_none);
            every step evaluates 2N images then.
        low_res: [n, C, h, w] in [-1, 1], for a super-resolution model.
        seed: 0 <= seed < 2^64, names all noise and the drawn labels.
        x_T: [n, C, H, W] to start from, instead of noise from the seed; float64 makes the whole
            chain float64 (on the reference backend).
        clip: clamp every x_0 to [-1, 1].
        batch_size: most images to evaluate at once; chosen by device and image size if None.
        diffusion: the process; for a `UNet` its own, or a respacing of it.
        image_shape: (C, H, W), where the model or x_T does not say it.
        dtype: bfloat16 or float16 to evaluate the network at that precision, the chain stays float32.
        engine: run a `UNet` by an engine where one can serve it; False for the module itself.
        exact: engines take only algorithms that round like direct convolution.
        backend: of the op `reverse_step`; "reference" also takes the network's plain formulation.
        progress: show a bar where stderr is a terminal.
        callback: called with a `SampleStep` after every step of every batch.

    Returns:
        float32 [n, C, H, W] on the model's device, in [-1, 1] where clip is set.

    Raises:
        ValueError, TypeError: for an argument of a wrong value, shape, dtype or device.
        RuntimeError: if an explicit backend cannot serve.

    Not differentiable. Source: Ho et al. 2020, algorithm 2.
    """
    request = make_request(
        model, steps, n=n, sampler=sampler, eta=eta, labels=labels, guidance_scale=guidance_scale,
        low_res=low_res, seed=seed, x_T=x_T, clip=clip, batch_size=batch_size, diffusion=diffusion,
        image_shape=image_shape, dtype=dtype, engine=engine, exact=exact, backend=backend,
        progress=progress,
    )  # fmt: skip
    return run(request, batches(request), callback)


def sample_progressive(
    model: Callable[..., Tensor],
    steps: Steps = 50,
    *,
    n: int | None = None,
    sampler: str = "ddpm",
    eta: float = 0.0,
    labels: Sequence[int] | Tensor | None = None,
    guidance_scale: float = 1.0,
    low_res: Tensor | None = None,
    seed: int = 0,
    x_T: Tensor | None = None,
    clip: bool = True,
    batch_size: int | None = None,
    diffusion: Diffusion | None = None,
    image_shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    engine: bool = True,
    exact: bool = False,
    backend: str = "auto",
    progress: bool = True,
    callback: Callable[[SampleStep], Any] | None = None,
) -> Iterator[SampleStep]:
    """Yields all n images after every step: the last `x` is what `sample` returns.

    Arguments, and errors (raised by this call, not by the first `next`), as of `sample`.
    """
    request = make_request(
        model, steps, n=n, sampler=sampler, eta=eta, labels=labels, guidance_scale=guidance_scale,
        low_res=low_res, seed=seed, x_T=x_T, clip=clip, batch_size=batch_size, diffusion=diffusion,
        image_shape=image_shape, dtype=dtype, engine=engine, exact=exact, backend=backend,
        progress=progress,
    )  # fmt: skip
    return walk(request, callback)


def batches(request: Request) -> list[range]:
    """The numbers of the images that are computed together."""
    size = request.batch_size
    return [range(i, min(i + size, request.n)) for i in range(0, request.n, size)]


def run(
    request: Request, chosen: list[range], callback: Callable[[SampleStep], Any] | None = None
) -> Tensor:
    """The images of some of a request's batches, one batch after the other, float32 [N, C, H, W]."""
    results = [torch.empty(0, *request.image_shape, device=request.device)]
    network = choose_network(request, _evaluated(request))
    with _bar(request, len(chosen)) as bar:
        for images in chosen:
            for step in _walk_batch(request, network, images):
                if callback is not None:
                    callback(step)
                bar.update()
            results.append(step.x.float())
    return torch.cat(results)


def walk(
    request: Request, callback: Callable[[SampleStep], Any] | None = None
) -> Iterator[SampleStep]:
    """All images of a request after every step: its batches advance in turn."""
    network = choose_network(request, _evaluated(request))
    walks = [_walk_batch(request, network, images) for images in batches(request)]
    with _bar(request, 1) as bar:
        for parts in zip(*walks, strict=True):
            step = SampleStep(
                torch.cat([part.x for part in parts]),
                torch.cat([part.x_0 for part in parts]),
                *parts[0][2:],
            )
            if callback is not None:
                callback(step)
            bar.update()
            yield step


def _walk_batch(request: Request, network: Network, images: range) -> Iterator[SampleStep]:
    """The chain of one batch. Walks that share a network may be advanced in turn."""
    chain, device = request.diffusion, request.device
    samples = torch.arange(images.start, images.stop, device=device)
    x = _initial(request, samples)
    labels = None if request.labels is None else request.labels[samples]
    low_res = None if request.low_res is None else request.low_res[samples]
    guided = request.guidance_scale != 1.0
    if guided:
        assert labels is not None
        labels = torch.cat([labels, torch.full_like(labels, -1)])
        low_res = None if low_res is None else torch.cat([low_res, low_res])
    steps = torch.arange(chain.num_timesteps)
    timesteps = chain.model_timesteps(steps).to(device)
    table = chain.table(device, sampler=request.sampler, eta=request.eta, dtype=x.dtype)
    noisy = request.sampler == "ddpm" or request.eta > 0
    for i in reversed(range(chain.num_timesteps)):
        with torch.no_grad():
            network.begin(timesteps, labels, low_res)
            out = network(torch.cat([x, x]) if guided else x, i)
            if guided:
                out = _guide(out, x.shape[1], request.guidance_scale)
            timestep = int(chain.timesteps[i])
            noise = NoiseKey(request.seed, STREAM_REVERSE, samples, timestep) if noisy else None
            t = torch.full_like(samples, i)
            x, x_0 = reverse_step(
                x, out, t, table, noise, clip=request.clip, backend=request.backend
            )
        yield SampleStep(x, x_0, i, timestep, images.start)


def _guide(out: Tensor, channels: int, scale: float) -> Tensor:
    """Outputs of the labelled, then of the unlabelled images -> the guided output; v is the labelled.

    x_0 and x_prev are affine in eps, so what holds for eps holds for each of them.
    """
    labelled, unlabelled = out.chunk(2)
    predicted = unlabelled[:, :channels].lerp(labelled[:, :channels], scale)
    return torch.cat([predicted, labelled[:, channels:]], dim=1)


def _initial(request: Request, samples: Tensor) -> Tensor:
    if request.x_T is not None:
        return request.x_T[samples]
    key = NoiseKey(request.seed, STREAM_INITIAL, samples, 0)
    return normal(key, (len(samples), *request.image_shape), request.device)


def _evaluated(request: Request) -> int:
    """Most images that the network sees at once."""
    return request.batch_size * (1 if request.guidance_scale == 1.0 else 2)


def _bar(request: Request, chains: int) -> Any:
    from tqdm import tqdm

    total = chains * request.diffusion.num_timesteps
    # None: shown where stderr is a terminal.
    disable = None if request.progress else True
    return tqdm(total=total, desc="sampling", unit="step", leave=False, disable=disable)

"""The reverse chain: from x_T to images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iddpm_ext.diffusion import Diffusion
from iddpm_ext.engines.base import undisturbed
from iddpm_ext.engines.choosing import Network, choose_network
from iddpm_ext.engines.spec import NetworkSpec, Steps, require_within_float16
from iddpm_ext.random import STREAM_INITIAL, STREAM_REVERSE, NoiseKey, normal
from iddpm_ext.sampling import cpu_chain, cuda_chain
from iddpm_ext.sampling.classifier_guidance import CondFn
from iddpm_ext.sampling.predict import Predictor
from iddpm_ext.sampling.request import Request, make_request
from iddpm_ext.sampling.sampler_step import SamplerStep


class SampleStep(NamedTuple):
    """The images after one step of the chain.

    x: x_{t-1}, [N, C, H, W]. x_0: the network's prediction from x_t, like x.
    t: the step that was taken, T-1 first and 0 last. timestep: its index in the training chain.
    first: index of the first of these images among those of the call.
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
    variance: str | None = None,
    labels: Sequence[int] | Tensor | None = None,
    guidance_scale: float = 1.0,
    cond_fn: CondFn | None = None,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
    low_res: Tensor | None = None,
    seed: int = 0,
    x_T: Tensor | None = None,
    x_0: Tensor | None = None,
    mask: Tensor | None = None,
    strength: float = 1.0,
    repaint: int = 1,
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
    """Draws images from a model by running its chain backwards.

        x_{t-1} = mean(x_t, x_0) + exp(log_variance / 2) z,  x_0 from the network's output

    by ancestral sampling (equations 11 and 15 of Improved DDPM), DDIM (equation 12 of Song et al. 2021) or
    a multistep solver (Lu et al. 2022; Zhao et al. 2023). Only ancestral sampling uses a learned variance.
    Image i depends on the seed and i, not on the batches, up to the network's rounding.

    Args:
        model: a `UNet`, or any callable (x [N, C, H, W], timesteps float32 [N], **kwargs) ->
            [N, C, H, W], or [N, 2C, H, W] with the variance. It is passed `y` if there are labels and
            `low_res` if that is given. Modules run in evaluation mode.
        steps: what `Diffusion.respace` takes (50, [0, 100, 3999], "ddim50", "10,15,20"), counted
            in the steps of `diffusion`; "optimal-K" (K steps with the best likelihood bound),
            "analytic-K" (the same with analytic variances) or "pictures-K" (K steps for image quality),
            if the checkpoint has them; None for every step.
        n: how many images; 16, or the length of labels, low_res or x_T, which must agree.
        sampler: "ddpm" (ancestral), "ddim", or, for few steps, a solver: "dpm++" (DPM-Solver++(2M)) and
            "dpm++3" of second and third order, "unipc" and "unipc3" with a corrector that costs no
            evaluation, "dpm++sde" with noise. Extrapolation is limited to the length of the previous step.
        eta: the noise of DDIM, from 0 (none) to 1.
        variance: None for the chain's own; "analytic" (with "ddpm" and "ddim"; the checkpoint needs the
            moments that `iddpm steps` stores); "optimal" (with the same, for an unmodified `UNet`; the
            checkpoint needs the heads that `iddpm covariance` trains); "fixed_small" or "fixed_large"
            (with "ddpm").
        labels: integers [n], -1 for an unlabelled image. For a class-conditional `UNet` they are drawn
            if not given.
        guidance_scale: s of classifier-free guidance, eps = eps_none + s (eps_label - eps_none);
            unless it is 1, every step evaluates 2N images.
        cond_fn: classifier guidance: called with (x_t [N, C, H, W], timesteps float32 [N]), `y` and
            `low_res` where there are, it returns the gradient of log p(y | x_t), scale included,
            like x_t (`classifier_gradient` makes one). An ancestral mean moves by variance * gradient,
            DDIM's eps by -sqrt(1 - alpha_bar) * gradient. With it, an unconditional network may have
            labels, which only cond_fn is passed.
        denoised_fn: takes every predicted x_0 [N, C, H, W], before it is clamped, and returns its
            replacement, such as a thresholded one, or one with known pixels put in (inpainting).
        low_res: [n, C, h, w] in [-1, 1], for a super-resolution model.
        seed: 0 <= seed < 2^64; determines all noise and the drawn labels.
        x_T: [n, C, H, W] to start from, instead of noise from the seed; if float64, the whole chain is
            float64 (on the reference backend).
        x_0: [n, C, H, W] in [-1, 1], images to change. If `strength` is below 1, the chain starts from them
            with noise; parts of them are kept if there is a `mask`.
        mask: broadcastable to x_0: 1 where the chain paints, 0 where x_0 is kept, or between. After every
            step the kept parts, with the noise of that step, replace those of the chain.
        strength: fraction of the steps that are taken, the last ones; 1 starts from pure noise.
        repaint: how many times each step is taken, each time after going back by one step of noise, so
            that the painted parts fit the kept ones (RePaint); multiplies the network evaluations. For
            "ddpm" and "ddim".
        clip: clamp every x_0 to [-1, 1].
        batch_size: maximum number of images to evaluate at once; by device and image size if None.
        diffusion: the process; for a `UNet` its own, or a respacing of it.
        image_shape: (C, H, W), if neither the model nor x_T determines it.
        dtype: bfloat16 or float16 evaluates the network in that precision; the chain stays float32. On a
            GPU float16 is as fast and more accurate; overflow of its narrower range raises at the end.
        engine: run a `UNet` by an engine where one supports it; False runs the module itself.
        exact: engines use only algorithms as accurate as direct convolution.
        backend: of the op `reverse_step`; "reference" also runs the network by PyTorch's functions alone.
        progress: show a bar where stderr is a terminal.
        callback: called with a `SampleStep` after every step of every batch. The chain continues from what
            it writes into `x` in place; what it writes into `x_0` affects only solvers, which keep x_0.

    Returns:
        float32 [n, C, H, W] on the model's device, in [-1, 1] where clip is set.

    Raises:
        ValueError, TypeError: for an argument of a wrong value, shape, dtype or device.
        RuntimeError: if an explicit backend does not support the call; if the network overflows float16.

    Not differentiable. Source: Ho et al. 2020, algorithm 2; Meng et al. 2022 (strength); Lugmayr et al.
    2022, algorithm 1 (mask, repaint).
    """
    request = make_request(
        "sample", model, steps, n=n, sampler=sampler, eta=eta, labels=labels,
        guidance_scale=guidance_scale, cond_fn=cond_fn, denoised_fn=denoised_fn, low_res=low_res,
        seed=seed, x_T=x_T, x_0=x_0, mask=mask, strength=strength, repaint=repaint, clip=clip,
        batch_size=batch_size, diffusion=diffusion,
        image_shape=image_shape, dtype=dtype,
        engine=engine, exact=exact, backend=backend, progress=progress, variance=variance,
    )  # fmt: skip
    return run(request, batches(request.n, request.batch_size), callback)


def sample_progressive(
    model: Callable[..., Tensor],
    steps: Steps = 50,
    *,
    n: int | None = None,
    sampler: str = "ddpm",
    eta: float = 0.0,
    variance: str | None = None,
    labels: Sequence[int] | Tensor | None = None,
    guidance_scale: float = 1.0,
    cond_fn: CondFn | None = None,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
    low_res: Tensor | None = None,
    seed: int = 0,
    x_T: Tensor | None = None,
    x_0: Tensor | None = None,
    mask: Tensor | None = None,
    strength: float = 1.0,
    repaint: int = 1,
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
    """Yields a `SampleStep` of all n images after every step; the last `x` is what `sample` returns.

    Writing into the yielded images has no effect on the chain.

    Arguments and errors as in `sample`; errors are raised by this call, not by the first `next`.
    """
    request = make_request(
        "sample_progressive", model, steps, n=n, sampler=sampler, eta=eta, labels=labels,
        guidance_scale=guidance_scale, cond_fn=cond_fn, denoised_fn=denoised_fn, low_res=low_res,
        seed=seed, x_T=x_T, x_0=x_0, mask=mask, strength=strength, repaint=repaint, clip=clip,
        batch_size=batch_size, diffusion=diffusion,
        image_shape=image_shape, dtype=dtype,
        engine=engine, exact=exact, backend=backend, progress=progress, variance=variance,
    )  # fmt: skip
    return walk(request, callback)


def batches(n: int, size: int) -> list[range]:
    """The indices of 0 .. n - 1 that form a batch each."""
    return [range(i, min(i + size, n)) for i in range(0, n, size)]


def network_of(request: Request) -> Network:
    """The network that the request's chains call, with the model's present weights."""
    return choose_network(request.spec, evaluated(request.batch_size, request.guidance_scale))


def run(
    request: Request,
    chosen: list[range],
    callback: Callable[[SampleStep], Any] | None = None,
    network: Network | None = None,
) -> Tensor:
    """The images of some of a request's batches, computed one after the other, float32 [N, C, H, W].

    network: from `network_of`, for several runs with the same weights.
    """
    spec = request.spec
    none = torch.empty(0, *spec.image_shape, dtype=torch.float32, device=spec.device)
    results = [none]
    network = network_of(request) if network is None else network
    with progress_bar(spec, len(chosen), request.progress, steps=request.steps) as bar:
        for images in chosen:
            prepare = _whole_chains(request, network) if callback is None else None
            if prepare is not None:
                results.append(_run_prepared(request, network, images, prepare, bar))
                continue
            for step in _walk_batch(request, network, images):
                if callback is not None:
                    callback(step)
                bar.update()
            results.append(step.x.float())
    found = torch.cat(results)
    require_within_float16(spec, found)
    return found


_Prepare = Callable[[Request, Network, Tensor, Tensor], Callable[[int], None]]


def _whole_chains(request: Request, network: Network) -> _Prepare | None:
    """The `prepare` of the engine that runs this request's chains as a whole, if one does."""
    return next((c.prepare for c in (cpu_chain, cuda_chain) if c.supports(request, network)), None)


def _run_prepared(
    request: Request, network: Network, images: range, prepare: _Prepare, bar: Any
) -> Tensor:
    """The last x of `_walk_batch`, faster, because no step's result is needed."""
    samples = numbers(images, request.spec.device)
    with undisturbed(request.spec.device.type):
        x = initial(request, samples).contiguous()
        step = prepare(request, network, samples, x)
        for i in reversed(range(request.steps)):
            step(i)
            bar.update()
    return x


def walk(
    request: Request, callback: Callable[[SampleStep], Any] | None = None
) -> Iterator[SampleStep]:
    """All images of a request after every step; its batches take each step one after the other."""
    return _walk(request, network_of(request), callback)


def _walk(
    request: Request, network: Network, callback: Callable[[SampleStep], Any] | None
) -> Iterator[SampleStep]:
    parts_of = batches(request.n, request.batch_size)
    walks = [_walk_batch(request, network, images) for images in parts_of]
    with progress_bar(request.spec, 1, request.progress, steps=request.steps) as bar:
        for parts in zip(*walks, strict=True):
            step = SampleStep(
                torch.cat([part.x for part in parts]),
                torch.cat([part.x_0 for part in parts]),
                *parts[0][2:],
            )
            if step.t == 0:
                require_within_float16(request.spec, step.x)
            if callback is not None:
                callback(step)
            bar.update()
            yield step


def _walk_batch(request: Request, network: Network, images: range) -> Iterator[SampleStep]:
    """The chain of one batch. Walks that share a network may be interleaved."""
    spec = request.spec
    chain, samples, known = spec.diffusion, numbers(images, spec.device), request.known
    with undisturbed(spec.device.type):
        x = initial(request, samples)
    predict = Predictor(spec, network, samples, request.guidance_scale)
    step = SamplerStep(request, predict, x.dtype)
    for i in reversed(range(request.steps)):
        timestep = int(chain.timesteps[i])
        repeats = known.repaint if known is not None and i > 0 else 1
        for again in range(repeats):
            with undisturbed(spec.device.type):
                if known is not None and again > 0:
                    x = known.renoised(spec, request.seed, samples, x, i, again)
                noise = NoiseKey(request.seed, STREAM_REVERSE, samples, timestep, again)
                x, x_0 = step(x, predict(x, i), i, noise)
                if known is not None:
                    x = known.kept(spec, request.seed, samples, x, i - 1, again)
        yield SampleStep(x, x_0, i, timestep, images.start)


def numbers(images: range, device: torch.device) -> Tensor:
    """The indices of some images as a tensor, int64 [n]."""
    return torch.arange(images.start, images.stop, dtype=torch.int64, device=device)


def initial(request: Request, samples: Tensor) -> Tensor:
    """What the chains of some images of a request begin with, [n, C, H, W]: x_T as a rule."""
    if request.known is not None:
        return request.known.begin(request.spec, request.seed, samples, request.x_T)
    if request.x_T is not None:
        return request.x_T[samples]
    key = NoiseKey(request.seed, STREAM_INITIAL, samples, 0)
    return normal(key, (len(samples), *request.spec.image_shape), request.spec.device)


def evaluated(batch_size: int, guidance_scale: float) -> int:
    """How many images the network sees at once: twice the batch with guidance."""
    return batch_size * (1 if guidance_scale == 1.0 else 2)


def progress_bar(
    spec: NetworkSpec,
    chains: int,
    shown: bool,
    name: str = "sampling",
    steps: int | None = None,
) -> Any:
    """A bar over the steps of some chains, if `shown` and stderr is a terminal."""
    from tqdm import tqdm

    total = chains * (spec.diffusion.num_timesteps if steps is None else steps)
    # tqdm takes None for: disabled unless stderr is a terminal.
    disable = None if shown else True
    return tqdm(total=total, desc=name, unit="step", leave=False, disable=disable)

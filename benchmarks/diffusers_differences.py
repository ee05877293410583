"""Where diffusers' DDPMScheduler and IDDPMScheduler differ: python -m benchmarks.diffusers_differences

Each line is a number of docs/diffusers.md, computed from the installed diffusers. The chains run the
bundled class-conditional model, converted, on the same noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from torch import Tensor

import iddpm_ext
from iddpm_ext import Diffusion, IDDPMScheduler
from iddpm_ext.ops.columns import Column

T = 4000
LEARNED: dict[str, Any] = {
    "num_train_timesteps": T,
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "learned_range",
}


def tables() -> Iterator[str]:
    """float32 against float64."""
    stock, ours = diffusers.DDPMScheduler(**LEARNED), Diffusion()
    theirs = (1 - stock.alphas_cumprod[1:] / stock.alphas_cumprod[:-1]).double()
    error = ((theirs - ours.betas[1:]) / ours.betas[1:]).abs()
    worst = int(error.argmax()) + 1
    yield (
        f"beta_t from its float32 products, relative error: up to {error.max():.1e} (t = {worst}), "
        f"above 1e-3 in {int((error > 1e-3).sum())} of {T} steps"
    )
    stock.set_timesteps(T)
    lower = stock._get_variance(0, torch.tensor(-1.0))
    own = ours.table()[0, Column.POSTERIOR_LOG_VARIANCE]
    yield f"lower bound of the log-variance at t = 0: {float(lower):.2f}, ours {float(own):.2f}"
    linear = diffusers.DDPMScheduler(T, beta_schedule="linear").alphas_cumprod[-1]
    expected = Diffusion("linear", T).alphas_cumprod[-1]
    yield f"linear schedule at T = {T}, last alpha_bar: {linear:.1e}, rescaled {expected:.1e}"


def half_precision() -> Iterator[str]:
    """The noise that add_noise adds in bfloat16 and float16."""
    ours = IDDPMScheduler()
    stock = diffusers.DDPMScheduler(**LEARNED)
    exact = (1 - Diffusion().alphas_cumprod).sqrt()
    t = torch.arange(T)
    for dtype in (torch.bfloat16, torch.float16):
        noise, nothing = torch.ones(T, 1, 1, 1, dtype=dtype), torch.zeros(T, 1, 1, 1, dtype=dtype)
        amounts = [s.add_noise(nothing, noise, t).flatten().double() for s in (stock, ours)]
        off = [int(((a / exact - 1).abs() > 0.05).sum()) for a in amounts]
        none = [int((a == 0).sum()) for a in amounts]
        yield (
            f"add_noise in {str(dtype)[6:]}: no noise at all in {none[0]} of {T} steps (ours "
            f"{none[1]}), more than 5 % wrong in {off[0]} (ours {off[1]})"
        )


def spacing() -> Iterator[str]:
    """Which 50 steps each takes."""
    ours = Diffusion().respace(50).timesteps.flip(0).tolist()
    for name in ("linspace", "leading", "trailing"):
        stock = diffusers.DDPMScheduler(**LEARNED, timestep_spacing=name)
        stock.set_timesteps(50)
        theirs = stock.timesteps.tolist()
        differ = sum(a != b for a, b in zip(theirs, ours, strict=True))
        yield f"50 steps, {name}: {differ} differ from the paper's, the first is {theirs[0]}"


def last_step() -> Iterator[str]:
    """Noise that remains in the final image."""
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for kind in ("fixed_large", "learned_range"):
        stock = diffusers.DDPMScheduler(
            **{**LEARNED, "variance_type": kind}, timestep_spacing="trailing"
        )
        stock.set_timesteps(50)
        out = torch.zeros(1, 3, 64, 64)
        if kind == "learned_range":
            out = torch.cat([out, torch.ones_like(out)], dim=1)  # v = 1
        step = stock.step(
            out, stock.timesteps[-1], noise, generator=torch.Generator().manual_seed(1)
        )
        left = (step.prev_sample - step.pred_original_sample).std()
        yield f"trailing, 50 steps, {kind}: noise of deviation {left:.3f} stays in the last image"


def one_step() -> Iterator[str]:
    """A single step from the same state, over all steps of the chain and of 50."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(1, 3, 8, 8, generator=generator) for _ in range(2))
    v = torch.rand(1, 3, 8, 8, generator=generator) * 2 - 1
    out = torch.cat([x, v], dim=1)
    for steps in (T, 50):
        stock = diffusers.DDPMScheduler(**LEARNED, timestep_spacing="linspace")
        ours = IDDPMScheduler(rescale_timesteps=False)
        for scheduler in (stock, ours):
            scheduler.set_timesteps(steps)
        worst, at = 0.0, 0
        for t in stock.timesteps.tolist():
            theirs = stock.step(out, t, x, generator=Fixed(noise)).prev_sample  # type: ignore[arg-type]
            own = ours.step(out, t, x, variance_noise=noise).prev_sample
            difference = float((theirs - own).abs().max())
            worst, at = (difference, t) if difference > worst else (worst, at)
        yield f"one step of {steps}, same state and noise: up to {worst:.1e} apart (t = {at})"


def chains() -> Iterator[str]:
    """Whole chains of `fashion-mnist`, which was trained on rescaled timesteps."""
    model = iddpm_ext.load("fashion-mnist")
    unet = iddpm_ext.to_diffusers(model)
    labels = torch.arange(8) % 10
    reference = _chain(unet, IDDPMScheduler(rescale_timesteps=True), labels)
    own = iddpm_ext.sample(
        model, 50, labels=labels, x_T=_noise(0, 8), engine=False, progress=False, sampler="ddim"
    )
    ours = _chain(unet, IDDPMScheduler(sampler="ddim", rescale_timesteps=True), labels)
    yield f"50 steps of DDIM, our scheduler and our sampler: {(own - ours).abs().max():.1e} apart"
    for name in ("linspace", "leading"):
        stock = diffusers.DDPMScheduler(**LEARNED, timestep_spacing=name)
        theirs = _chain(unet, stock, labels)
        mean = (theirs - reference).abs().mean()
        yield (
            f"50 ancestral steps, {name}, same noise: up to {(theirs - reference).abs().max():.2f} "
            f"apart, {mean:.3f} on average: integers up to 3999 where the network knows 0 to 999.75"
        )


class Fixed:
    """A substitute for a generator, by which `randn_tensor` returns given noise."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise


def _noise(number: int, n: int) -> Tensor:
    return torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(number))


def _chain(unet: Any, scheduler: Any, labels: Tensor) -> Tensor:
    scheduler.set_timesteps(50)
    x = _noise(0, len(labels))
    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            out = unet(x, t, class_labels=labels).sample
        x = scheduler.step(out, t, x, generator=Fixed(_noise(i + 1, len(labels)))).prev_sample
    return x


def main() -> None:
    """Prints every number."""
    from diffusers.schedulers import scheduling_ddpm

    from iddpm_ext.interop import scheduler as ours

    drawn = scheduling_ddpm.randn_tensor

    def given(shape: Any, generator: Any = None, **kwargs: Any) -> Tensor:
        return (
            generator.noise if isinstance(generator, Fixed) else drawn(shape, generator, **kwargs)
        )

    scheduling_ddpm.randn_tensor = ours.randn_tensor = given
    torch.set_num_threads(1)
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}")
    for part in (tables, half_precision, spacing, last_step, one_step, chains):
        for line in part():
            print(f"- {line}", flush=True)


if __name__ == "__main__":
    main()

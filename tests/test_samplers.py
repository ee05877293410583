"""DPM-Solver++, classifier guidance, inversion: the published formulas, and data with exact answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import iddpm_ext
from iddpm_ext import Diffusion, classifier_gradient, interpolate, invert, sample
from iddpm_ext.random import STREAM_REVERSE, NoiseKey, normal

SHAPE = (1, 4, 4)


def x_T(n: int = 3) -> Tensor:
    return normal(NoiseKey(5, 0, torch.arange(n), 0), (n, *SHAPE)).double()


def two_heads(x: Tensor, t: Tensor, **_: Tensor) -> Tensor:
    """A learned-variance network's shape of output; neither half is trivial."""
    eps = 0.9 * x + 0.1 * torch.sin(t.double() / 50).view(-1, 1, 1, 1)
    return torch.cat([eps, torch.cos(3 * x)], 1)


class Mixture:
    """Data of two classes, N(+-mean, variance) in every pixel, for which everything has a closed form.

    The networks are optimal, and so is the classifier, on noisy images of any t.
    """

    def __init__(self, diffusion: Diffusion, mean: float = 0.5, variance: float = 0.04):
        self.diffusion, self.mean, self.variance = diffusion, mean, variance

    def at(self, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sqrt(ab), 1 - ab and Var(x_t | class)."""
        index = (timesteps.double() * self.diffusion.num_train_timesteps / 1000).round().long()
        ab = self.diffusion.alphas_cumprod[index].view(-1, 1, 1, 1).to(x)
        return ab.sqrt(), 1 - ab, ab * self.variance + 1 - ab

    def conditional(self, x: Tensor, timesteps: Tensor, *, y: Tensor) -> Tensor:
        root, rest, variance = self.at(x, timesteps)
        sign = (2 * y - 1).view(-1, 1, 1, 1)
        return rest.sqrt() * (x - sign * root * self.mean) / variance

    def unconditional(self, x: Tensor, timesteps: Tensor, **_: Tensor) -> Tensor:
        ones = torch.ones(len(x), dtype=torch.int64)
        p = self.classifier(x, timesteps).softmax(1)[:, 1].view(-1, 1, 1, 1)
        up = self.conditional(x, timesteps, y=ones)
        down = self.conditional(x, timesteps, y=0 * ones)
        return p * up + (1 - p) * down

    def classifier(self, x: Tensor, timesteps: Tensor) -> Tensor:
        root, _, variance = self.at(x, timesteps)
        score = (root * self.mean * x / variance).flatten(1).sum(1)
        return torch.stack([-score, score], 1)


# ---- DPM-Solver++


@pytest.mark.parametrize("clip", [True, False])
def test_dpm_solver_is_its_published_formula_with_the_variance_head_ignored(clip):
    diffusion = Diffusion("cosine", 1000)
    chain = diffusion.respace(12)
    alpha = chain.alphas_cumprod.sqrt()
    sigma = (1 - chain.alphas_cumprod).sqrt()
    lam = (alpha / sigma).log()
    x, previous = x_T(), None
    for i in reversed(range(12)):
        timesteps = torch.full((3,), float(chain.timesteps[i]))
        eps = two_heads(x, timesteps)[:, :1]
        x_0 = (x - sigma[i] * eps) / alpha[i]
        x_0 = x_0.clamp(-1, 1) if clip else x_0
        if i == 0:  # lambda is infinite: exp(-h) = 0 and sigma = 0
            x = x_0
            break
        h = lam[i - 1] - lam[i]
        data = x_0
        if previous is not None:
            r = ((lam[i] - lam[i + 1]) / h).clamp(min=1)  # the limit of the extrapolation
            data = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * previous
        x = sigma[i - 1] / sigma[i] * x - alpha[i - 1] * torch.expm1(-h) * data
        previous = x_0
    *_, last = iddpm_ext.sample_progressive(
        two_heads, 12, x_T=x_T(), sampler="dpm++", clip=clip, diffusion=diffusion, progress=False
    )
    torch.testing.assert_close(last.x, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [15, 60])
def test_dpm_solver_is_nearer_to_the_exact_flow_than_ddim_on_the_same_steps(steps):
    """Normal data: the probability flow only rescales, so x_0 is known for every x_T."""
    diffusion = Diffusion("cosine", 4000, variance="fixed_small")
    data = Mixture(diffusion, mean=0.0, variance=0.25)
    model = lambda x, t: data.conditional(x, t, y=torch.ones(len(x)))  # noqa: E731
    ab = diffusion.alphas_cumprod[[0, -1]]
    spread = (ab * 0.25 + 1 - ab).sqrt()
    exact = x_T() * spread[0] / spread[1] * ab[0].sqrt() * 0.25 / spread[0] ** 2

    def error(sampler: str) -> float:
        x = sample(
            model, steps, x_T=x_T(), sampler=sampler, clip=False, diffusion=diffusion,
            progress=False,
        )  # fmt: skip
        return float((x - exact).abs().max())

    assert error("dpm++") < error("ddim") / 10


# ---- classifier guidance


def test_the_guided_mixture_is_the_class_by_ddim():
    """eps - sqrt(1 - ab) grad log p(y | x_t) of optimal parts is the optimal conditional eps."""
    diffusion = Diffusion("cosine", 1000, variance="fixed_small")
    data, y = Mixture(diffusion), torch.tensor([1, 0, 1])
    options: dict[str, Any] = {
        "x_T": x_T(), "clip": False, "diffusion": diffusion, "labels": y, "progress": False,
    }  # fmt: skip
    for sampler in ("ddim", "dpm++"):
        guided = sample(
            data.unconditional, 40, sampler=sampler, cond_fn=classifier_gradient(data.classifier),
            **options,
        )  # fmt: skip
        of_class = sample(data.conditional, 40, sampler=sampler, **options)
        torch.testing.assert_close(guided, of_class, rtol=1e-6, atol=1e-6)
    assert bool((guided.mean((1, 2, 3)).sign() == 2 * y - 1).all())


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
def test_ancestral_guidance_moves_the_mean_by_the_variance_times_the_gradient(variance):
    """The original's p_sample with condition_mean: by beta~_0 = 0, not by its clipped logarithm."""
    diffusion = Diffusion("cosine", 400, variance)
    chain = diffusion.respace(10)
    cond_fn = lambda x, t, **_: 0.3 * torch.sin(x) + t.double().view(-1, 1, 1, 1) / 1e4  # noqa: E731
    x = x_T()
    for i in reversed(range(10)):
        t, step = torch.full((3,), i), int(chain.timesteps[i])
        timesteps = torch.full((3,), step * 1000 / 400)
        mean, log_variance, _ = chain.p_mean_variance(two_heads(x, timesteps), x, t)
        moved = 0.0 if variance == "fixed_small" and i == 0 else log_variance.exp()
        mean = mean + moved * cond_fn(x, timesteps)
        z = normal(NoiseKey(9, STREAM_REVERSE, torch.arange(3), step), x.shape).double()
        x = mean + (i > 0) * (0.5 * log_variance).exp() * z
    *_, last = iddpm_ext.sample_progressive(
        two_heads, 10, x_T=x_T(), seed=9, cond_fn=cond_fn, diffusion=diffusion, progress=False
    )
    torch.testing.assert_close(last.x, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_guidance_moves_eps_and_does_not_clamp_again(eta):
    """The original's ddim_sample with condition_score, in its own words of eps and x_0."""
    diffusion = Diffusion("cosine", 400)
    chain = diffusion.respace(10)
    cond_fn = lambda x, t, **_: 0.3 * torch.sin(x)  # noqa: E731
    ab = chain.alphas_cumprod
    previous = torch.cat([torch.ones(1, dtype=torch.float64), ab[:-1]])
    x = x_T()
    for i in reversed(range(10)):
        step = int(chain.timesteps[i])
        out = two_heads(x, torch.full((3,), step * 1000 / 400))[:, :1]
        x_0 = ((x - (1 - ab[i]).sqrt() * out) / ab[i].sqrt()).clamp(-1, 1)
        eps = (x - ab[i].sqrt() * x_0) / (1 - ab[i]).sqrt()
        eps = eps - (1 - ab[i]).sqrt() * cond_fn(x, None)
        x_0 = (x - (1 - ab[i]).sqrt() * eps) / ab[i].sqrt()
        sigma = eta * ((1 - previous[i]) / (1 - ab[i]) * (1 - ab[i] / previous[i])).sqrt()
        z = normal(NoiseKey(9, STREAM_REVERSE, torch.arange(3), step), x.shape).double()
        x = previous[i].sqrt() * x_0 + (1 - previous[i] - sigma**2).clamp(min=0).sqrt() * eps
        x = x + (i > 0) * sigma * z
    *_, last = iddpm_ext.sample_progressive(
        two_heads, 10, x_T=x_T(), seed=9, cond_fn=cond_fn, sampler="ddim", eta=eta,
        diffusion=diffusion, progress=False,
    )  # fmt: skip
    torch.testing.assert_close(last.x, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last.x_0, x_0, rtol=1e-6, atol=1e-6)


def test_classifier_gradient_is_that_of_log_p_and_spares_the_unlabelled():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).double()
    y = torch.tensor([3, -1, 0])
    got = classifier_gradient(lambda x, t: net(x), scale=2.5)(x_T(), torch.zeros(3), y=y)
    weight: Tensor = net[1].weight.detach()  # type: ignore[assignment]
    p = net(x_T()).softmax(1).detach()
    expected = 2.5 * (weight[y.clamp(min=0)] - p @ weight) * (y >= 0)[:, None]
    torch.testing.assert_close(got.flatten(1), expected)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_labels_guide_an_unconditional_network_through_cond_fn_alone():
    torch.manual_seed(0)
    model = iddpm_ext.UNet(
        iddpm_ext.UNetConfig(
            image_size=8, in_channels=1, out_channels=2, model_channels=32, num_res_blocks=1,
            channel_mult=(1,), attention_resolutions=(),
        )
    )  # fmt: skip
    model.diffusion = Diffusion("cosine", 100)
    seen = []

    def cond_fn(x: Tensor, timesteps: Tensor, *, y: Tensor) -> Tensor:
        seen.append((y.tolist(), float(timesteps[0])))
        return torch.zeros_like(x)

    guided = sample(model, 4, labels=[7, 2, 5], cond_fn=cond_fn, batch_size=2, progress=False)
    assert torch.equal(guided, sample(model, 4, n=3, batch_size=2, progress=False))
    assert [y for y, _ in seen] == [[7, 2]] * 4 + [[5]] * 4
    assert [t for _, t in seen[:4]] == [990.0, 660.0, 330.0, 0.0]


# ---- inversion


def test_an_inversion_step_is_the_originals_ddim_reverse_sample():
    diffusion = Diffusion("cosine", 400)
    chain, x = diffusion.respace(7), x_T() / 4
    ab = chain.alphas_cumprod
    for i in range(6):
        out = two_heads(x, torch.full((3,), float(chain.timesteps[i]) * 1000 / 400))[:, :1]
        x_0 = ((x - (1 - ab[i]).sqrt() * out) / ab[i].sqrt()).clamp(-1, 1)
        eps = (x / ab[i].sqrt() - x_0) / (1 / ab[i] - 1).sqrt()
        x = x_0 * ab[i + 1].sqrt() + (1 - ab[i + 1]).sqrt() * eps
    got = invert(two_heads, x_T() / 4, 7, diffusion=diffusion, progress=False)
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


def test_refinements_bring_a_chain_back_to_its_image():
    diffusion = Diffusion("cosine", 1000, variance="fixed_small")
    data = Mixture(diffusion)
    y = torch.tensor([1, 0, 1])
    options: dict[str, Any] = {"labels": y, "diffusion": diffusion, "progress": False}
    x_0 = sample(data.conditional, 20, x_T=x_T(), sampler="ddim", **options).double()
    errors = []
    for refinements in (0, 1, 8):
        noise = invert(data.conditional, x_0, 20, refinements=refinements, **options)
        back = sample(data.conditional, 20, x_T=noise, sampler="ddim", **options)
        errors.append(float((back - x_0).abs().max()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 2e-3


def test_the_bundled_model_inverts_its_own_samples():
    model = iddpm_ext.load("fashion-mnist")
    labels = [0, 5, 8, 9]
    options: dict[str, Any] = {"labels": labels, "progress": False}
    x_0 = sample(model, 20, sampler="ddim", **options)
    errors = []
    for refinements in (0, 1):
        noise = invert(model, x_0, 20, refinements=refinements, **options)
        back = sample(model, 20, x_T=noise, sampler="ddim", **options)
        errors.append(float((back - x_0).square().mean().sqrt()))
    assert errors[1] < 0.8 * errors[0] and errors[1] < 0.25
    assert float(noise.std()) == pytest.approx(1, abs=0.1)


def test_interpolation_keeps_the_length_of_noise_and_ends_at_both():
    a, b = x_T(2)
    path = interpolate(a, b, [0, 0.25, 0.5, 1])
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    weights = torch.linspace(0, 1, 9)
    lengths = interpolate(a / a.norm(), b / b.norm(), weights).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close(interpolate(a, a, [0.5])[0], a)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: sample(two_heads, 5, x_T=x_T(), diffusion=Diffusion(), cond_fn=3), TypeError,
         "sample: cond_fn must be callable, got int"),
        (lambda: sample(two_heads, 5, x_T=x_T(), diffusion=Diffusion(), cond_fn=lambda x, t: x[0]),
         ValueError, r"sample: cond_fn must return \[3, 1, 4, 4\], got"),
        (lambda: sample(two_heads, 5, x_T=x_T(), diffusion=Diffusion(), sampler="dpm++", eta=0.5),
         ValueError, "sample: eta must be 0 with sampler 'dpm"),
        (lambda: invert(two_heads, x_T(), 5), ValueError, "invert: diffusion must be given"),
        (lambda: invert(two_heads, x_T()[0], 5, diffusion=Diffusion()), ValueError,
         r"invert: x_0 must be \[n, C, H, W\]"),
        (lambda: invert(two_heads, None, 5, diffusion=Diffusion()), TypeError,
         "invert: x_0 must be a tensor, got NoneType"),
        (lambda: invert(two_heads, x_T(), 5, refinements=-1, diffusion=Diffusion()), ValueError,
         "invert: refinements must be an int of at least 0, got -1"),
        (lambda: interpolate(x_T(2), x_T(3), [0.5]), ValueError, "interpolate: a and b must be"),
        (lambda: interpolate(x_T(2), x_T(2), 0.5), ValueError, "interpolate: weights must be"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_denoised_fn_stands_before_the_clamp_in_every_sampler(sampler):
    """The original's process_xstart; the chain is that of a network that predicts the changed x_0."""
    diffusion = Diffusion("cosine", 400)
    seen = []

    def thresholded(x_0: Tensor) -> Tensor:
        """Dynamic thresholding of Imagen: scaled back where a quantile is outside of [-1, 1]."""
        seen.append(x_0)
        limit = x_0.flatten(1).abs().quantile(0.9, dim=1).clamp(min=1).view(-1, 1, 1, 1)
        return x_0.clamp(-limit, limit) / limit

    def changed(x: Tensor, timesteps: Tensor) -> Tensor:
        t = (timesteps.double() * 400 / 1000).round().long()
        out = two_heads(x, timesteps)
        found = diffusion.p_mean_variance(out, x, t, clip=False)
        return torch.cat([thresholded(found.x_0), out[:, 1:]], dim=1)

    options = {"sampler": sampler, "x_T": 3 * x_T(), "seed": 9, "progress": False}
    got = sample(two_heads, 10, denoised_fn=thresholded, diffusion=diffusion, **options)
    assert max(float(x_0.abs().max()) for x_0 in seen) > 1
    wanted = sample(changed, 10, diffusion=diffusion.predicting("x_0"), **options)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    plain = sample(two_heads, 10, diffusion=diffusion, **options)
    assert (plain - got).abs().max() > 0.01
    with pytest.raises(ValueError, match=r"sample: denoised_fn must return \[3, 1, 4, 4\], got"):
        sample(two_heads, 10, denoised_fn=lambda x: x[:1], diffusion=diffusion, **options)
    with pytest.raises(TypeError, match="sample: denoised_fn must be callable, got int"):
        sample(two_heads, 10, denoised_fn=3, diffusion=diffusion, **options)


def test_a_callback_of_sample_may_write_into_x_and_the_chain_goes_on_from_it():
    """Inpainting: what is known is put, with the noise of the step, where a mask says so."""

    def mixing(x: Tensor, timesteps: Tensor) -> Tensor:
        return two_heads(x + 0.2 * x.mean((1, 2, 3), keepdim=True), timesteps)

    diffusion = Diffusion("cosine", 400)
    chain = diffusion.respace(10)
    known, mask = torch.full((3, 1, 4, 4), 0.5), torch.zeros(4, 4, dtype=torch.bool)
    mask[:2] = True

    def put(step) -> None:
        noisy = known
        if step.t > 0:
            t = torch.full((3,), step.t - 1)
            noisy = chain.q_sample(known, t, NoiseKey(5, 0, torch.arange(3), step.t))
        step.x[..., mask] = noisy[..., mask].to(step.x.dtype)

    options = {
        "seed": 9,
        "diffusion": diffusion,
        "progress": False,
        "image_shape": (1, 4, 4),
        "n": 3,
    }
    got = sample(mixing, 10, callback=put, **options)
    assert torch.equal(got[..., mask], known[..., mask])
    free = sample(mixing, 10, **options)
    assert (got - free)[..., ~mask].abs().max() > 1e-3
    # One batch or several, the same images.
    parts = sample(mixing, 10, batch_size=3, callback=lambda step: put(step), **options)
    assert torch.equal(parts, got)
    # The images of sample_progressive are copies.
    walk = iddpm_ext.sample_progressive(mixing, 10, **options)
    for step in walk:
        last = step.x.clone()
        step.x.zero_()
    assert torch.equal(last, free)

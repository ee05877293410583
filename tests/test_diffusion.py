"""The diffusion process agrees with the original code and with itself."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch

from iddpm_ext.diffusion import VARIANCES, Diffusion
from iddpm_ext.random import NoiseKey, normal

GOLDEN = json.loads((Path(__file__).parent / "golden" / "diffusion.json").read_text())
CHAINS = {
    "cosine-4000": ("cosine", 4000, None),
    "cosine-4000-50": ("cosine", 4000, "50"),
    "linear-1000-ddim25": ("linear", 1000, "ddim25"),
    "linear-1000-10,15,20": ("linear", 1000, "10,15,20"),
}
PREDICTIONS = ("epsilon", "x_0", "x_prev")  # the original's
CONFIGURATIONS = [(c, v, p) for c in CHAINS for v in VARIANCES for p in PREDICTIONS]
LEARNED = ("learned_range", "learned")


def chain(name, variance="learned_range", prediction="epsilon"):
    schedule, steps, spec = CHAINS[name]
    diffusion = Diffusion(schedule, steps, variance, prediction)
    return diffusion if spec is None else diffusion.respace(spec)


def times(diffusion):
    last = diffusion.num_timesteps - 1
    return torch.tensor([0, 1, last // 2, last])


def inputs(dtype, learned):
    shape = GOLDEN["inputs"]["shape"]
    read = {
        name: torch.tensor(values, dtype=dtype).view(shape)
        for name, values in GOLDEN["inputs"].items()
        if name != "shape"
    }
    if learned:
        read["out"] = torch.cat([read["out"], read.pop("v")], dim=1)
    return read


def agrees(actual, expected, rtol=1e-9, atol=1e-9):
    expected = torch.tensor(expected, dtype=torch.float64).view(actual.shape)
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("name", "variance", "prediction"), CONFIGURATIONS)
def test_process_computes_the_original_numbers_in_float64(name, variance, prediction):
    expected = GOLDEN["chains"][f"{name} {variance} {prediction}"]
    diffusion = chain(name, variance, prediction)
    given = inputs(torch.float64, variance in LEARNED)
    x_0, noise, out, z = (given[k] for k in ("x_0", "noise", "out", "step_noise"))
    t = times(diffusion)
    x_t = diffusion.q_sample(x_0, t, noise)

    free = diffusion.p_mean_variance(out, x_t, t, clip=False)
    clipped = diffusion.p_mean_variance(out, x_t, t)
    agrees(clipped.log_variance, expected["log_variance"])
    if "mean" in expected:
        agrees(x_t, expected["q_sample"])
        agrees(free.x_0, expected["x_0"])
        agrees(free.mean, expected["mean"])
        agrees(clipped.x_0, expected["x_0 clipped"])
        agrees(diffusion.prior_bpd(x_0), expected["prior"])
        for eta in (0.0, 0.5, 1.0):
            step = diffusion.reverse_step(out, x_t, t, z, "ddim", eta)
            agrees(step.x_prev, expected[f"ddim {eta}"])
    # The original forms the mean of an x_prev network from its output even where x_0 is clipped.
    if prediction != "x_prev":
        agrees(diffusion.vlb_terms_bpd(out, x_0, x_t, t), expected["term"])
        agrees(diffusion.reverse_step(out, x_t, t, z).x_prev, expected["ddpm"])
        if "mean" in expected:
            agrees(clipped.mean, expected["mean clipped"])
    for objective in ("hybrid", "vlb"):
        if objective in expected:
            losses = diffusion.training_losses(lambda x, t: out, x_0, t, noise, objective)
            agrees(losses["loss"], expected[objective])
            agrees(losses["mse"], expected["mse"])


@pytest.mark.parametrize(("name", "variance", "prediction"), CONFIGURATIONS)
def test_float32_losses_err_no_more_than_the_original_in_float32(name, variance, prediction):
    key = f"{name} {variance} {prediction}"
    exact, original = GOLDEN["chains"][key], GOLDEN["chains_float32"][key]
    diffusion = chain(name, variance, prediction)
    given = inputs(torch.float32, variance in LEARNED)
    for objective in ("hybrid", "vlb"):
        if objective in exact:
            losses = diffusion.training_losses(
                lambda x, t: given["out"], given["x_0"], times(diffusion), given["noise"], objective
            )
            expected = torch.tensor(exact[objective]).double()
            error = (losses["loss"].double() - expected).abs() / expected
            allowed = (torch.tensor(original[objective]).double() - expected).abs() / expected
            assert (error <= 2 * allowed.max() + 1e-6).all()


@pytest.mark.parametrize("name", CHAINS)
def test_network_is_told_the_original_timesteps(name):
    diffusion = chain(name)
    assert diffusion.model_timesteps(times(diffusion)).tolist() == GOLDEN["model_timesteps"][name]


def test_network_is_told_plain_indices_without_rescaling():
    diffusion = Diffusion(rescale_timesteps=False).respace(250)
    told = diffusion.model_timesteps(torch.tensor([0, 249]))
    assert told.dtype == torch.float32 and told.tolist() == [0.0, 3999.0]


def test_last_of_250_respaced_steps_is_told_as_999_75():
    assert Diffusion().respace(250).model_timesteps(torch.tensor([249])).item() == 999.75


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_perfect_network_recovers_x_0_and_the_posterior_mean(prediction):
    diffusion = Diffusion(variance="fixed_small", prediction=prediction).respace(50)
    t = torch.tensor([1, 10, 25, 40])
    x_0 = torch.rand(4, 3, 5, 2, dtype=torch.float64) * 2 - 1
    noise = torch.randn_like(x_0)
    x_t = diffusion.q_sample(x_0, t, noise)
    target = {"epsilon": noise, "x_0": x_0}.get(prediction)
    if target is None:
        as_x_0 = Diffusion(variance="fixed_small", prediction="x_0").respace(50)
        target = as_x_0.p_mean_variance(x_0, x_t, t, clip=False).mean
    predicted = diffusion.p_mean_variance(target, x_t, t, clip=False)
    torch.testing.assert_close(predicted.x_0, x_0, rtol=0, atol=1e-9)
    assert diffusion.vlb_terms_bpd(target, x_0, x_t, t, clip=False).abs().max() < 1e-12
    losses = diffusion.training_losses(lambda x, t: target, x_0, t, noise, "simple")
    assert losses["loss"].abs().max() < 1e-18


def test_hybrid_loss_trains_the_mean_by_mse_alone_and_the_variance_by_the_bound_alone():
    diffusion = Diffusion(num_timesteps=100)
    x_0, noise = torch.rand(3, 2, 4, 4) * 2 - 1, torch.randn(3, 2, 4, 4)
    t = torch.tensor([0, 1, 99])

    def gradient(objective, part="loss"):
        out = torch.zeros(3, 4, 4, 4, requires_grad=True)
        losses = diffusion.training_losses(lambda x, t: out, x_0, t, noise, objective)
        return torch.autograd.grad(losses[part].sum(), out)[0]

    hybrid, simple, vlb = gradient("hybrid"), gradient("simple"), gradient("vlb")
    assert torch.equal(hybrid[:, :2], simple[:, :2])
    assert not simple[:, 2:].any()
    torch.testing.assert_close(hybrid[:, 2:], 1e-3 * vlb[:, 2:])
    assert vlb[:, :2].any() and vlb[:, 2:].any()


def test_loss_is_composed_of_its_parts_with_the_length_of_the_respaced_chain():
    diffusion = Diffusion().respace(50)
    x_0, t = torch.rand(3, 1, 4, 4) * 2 - 1, torch.tensor([0, 7, 49])
    key = NoiseKey(1, 2, torch.arange(3), 0)
    for objective in ("hybrid", "simple", "vlb"):
        losses = diffusion.training_losses(
            lambda x, t: torch.cat([x, x], 1), x_0, t, key, objective, vlb_weight=0.01
        )
        expected = {
            "hybrid": losses["mse"] + 0.01 * 50 * losses["vlb"],
            "simple": losses["mse"],
            "vlb": 50 * losses["vlb"],
        }
        assert set(losses) == {"loss", "mse", "vlb"}
        assert losses["loss"].shape == (3,)
        torch.testing.assert_close(losses["loss"], expected[objective])


def test_training_never_clips_the_predicted_x_0():
    diffusion = Diffusion(num_timesteps=100, prediction="x_0", variance="fixed_small")
    x_0, t = torch.zeros(1, 1, 2, 2), torch.tensor([50])
    far, at_edge = (
        diffusion.training_losses(lambda x, t, v=v: x * 0 + v, x_0, t, x_0, "vlb")["loss"]
        for v in (5.0, 1.0)
    )
    assert far > 20 * at_edge


def test_model_arguments_reach_the_model():
    diffusion = Diffusion(num_timesteps=100)
    seen = {}

    def model(x, timesteps, y):
        seen.update(timesteps=timesteps, y=y)
        return torch.cat([x, x], 1)

    labels = torch.tensor([3, 4])
    x_0, t = torch.zeros(2, 1, 2, 2), torch.tensor([1, 99])
    diffusion.training_losses(model, x_0, t, torch.randn_like(x_0), model_kwargs={"y": labels})
    assert seen["y"] is labels
    assert seen["timesteps"].tolist() == [10.0, 990.0]


def test_noise_key_draws_the_noise_that_it_names():
    diffusion = Diffusion(num_timesteps=100)
    key = NoiseKey(3, 1, torch.tensor([5, 6]), torch.tensor([40, 0]))
    x, t = torch.randn(2, 1, 3, 3), torch.tensor([40, 0])
    z, out = normal(key, x.shape), torch.randn(2, 2, 3, 3)
    noisy, same = (diffusion.q_sample(x, t, noise) for noise in (key, z))
    torch.testing.assert_close(noisy, same, rtol=1e-5, atol=1e-5)
    drawn, given = (diffusion.reverse_step(out, x, t, noise) for noise in (key, z))
    torch.testing.assert_close(drawn.x_prev, given.x_prev, rtol=1e-5, atol=1e-5)


def test_no_noise_enters_at_the_first_step():
    diffusion = Diffusion(num_timesteps=100)
    out, x, t = torch.randn(1, 2, 3, 3), torch.randn(1, 1, 3, 3), torch.tensor([0])
    once, again = (diffusion.reverse_step(out, x, t, torch.full_like(x, z)) for z in (0.0, 9.0))
    assert torch.equal(once.x_prev, again.x_prev)


def test_ddim_ignores_the_variance_channels():
    diffusion = Diffusion(num_timesteps=100)
    x, t, out = torch.randn(2, 1, 3, 3), torch.tensor([50, 3]), torch.randn(2, 2, 3, 3)
    whole = diffusion.reverse_step(out, x, t, sampler="ddim")
    assert torch.equal(whole.x_prev, diffusion.reverse_step(out[:, :1], x, t, None, "ddim").x_prev)


def test_step_computes_in_float32_from_half_precision_outputs():
    diffusion = Diffusion(num_timesteps=100)
    x, t, out = torch.randn(2, 1, 3, 3), torch.tensor([50, 3]), torch.randn(2, 2, 3, 3)
    half = diffusion.reverse_step(out.bfloat16(), x, t, x)
    same = diffusion.reverse_step(out.bfloat16().float(), x, t, x)
    assert half.x_prev.dtype == torch.float32 and torch.equal(half.x_prev, same.x_prev)


@pytest.mark.parametrize("objective", ["hybrid", "vlb"])
def test_gradients_of_the_losses_are_right_in_float64(objective):
    diffusion = Diffusion(num_timesteps=100)
    x_0 = torch.tensor([-1.0, 1.0, 0.25], dtype=torch.float64).repeat(3, 1, 1, 1) * 0.9999
    noise, t = torch.randn_like(x_0), torch.tensor([0, 1, 99])
    v = torch.randn(3, 1, 1, 3, dtype=torch.float64, requires_grad=True)
    eps = noise.clone().requires_grad_() if objective == "vlb" else noise

    def loss(eps, v):
        out = torch.cat([eps, v], 1)
        return diffusion.training_losses(lambda x, t: out, x_0, t, noise, objective)["loss"]

    assert torch.autograd.gradcheck(loss, (eps, v))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda d, x: d.q_sample(x, torch.tensor([0, 100]), x),
            r"q_sample: t must lie in \[0, 99\] .*got 100 at index 1",
        ),
        (
            lambda d, x: d.q_sample(x, torch.tensor([-1, 0]), x),
            r"t must lie in \[0, 99\] .*got -1 at index 0",
        ),
        (
            lambda d, x: d.q_sample(x, torch.tensor([0]), x),
            r"t must be \[N\] with N = 2, got shape \[1\]",
        ),
        (
            lambda d, x: d.q_sample(x, torch.tensor([0.0, 1]), x),
            "t must be int64, got torch.float32",
        ),
        (
            lambda d, x: d.q_sample(x, torch.tensor([0, 1]), x[:1]),
            r"noise must be .* \[2, 1, 2, 2\], got shape \[1,",
        ),
        (
            lambda d, x: d.p_mean_variance(x, x, torch.tensor([0, 1])),
            "model_output must have 2C = 2 channels .* got 1",
        ),
        (
            lambda d, x: d.reverse_step(torch.cat([x, x], 1), x, torch.tensor([0, 1])),
            "noise must be given",
        ),
        (
            lambda d, x: d.reverse_step(x, x, torch.tensor([0, 1]), x, "euler"),
            "sampler must be one of",
        ),
        (
            lambda d, x: d.training_losses(None, x, torch.tensor([0, 1]), x, "huber"),
            "objective must be one of",
        ),
        (
            lambda d, x: Diffusion(variance="fixed_small").training_losses(
                None, x, torch.tensor([0, 1]), x
            ),
            "objective must be 'simple' or 'vlb' where the variance is fixed_small, got 'hybrid'",
        ),
    ],
)
def test_bad_arguments_are_refused_with_the_rule_and_the_value(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(Diffusion(num_timesteps=100), torch.zeros(2, 1, 2, 2))


def test_process_is_frozen_equal_by_value_and_survives_copies():
    diffusion = Diffusion("linear", 1000, "fixed_large").respace("ddim25")
    with pytest.raises(AttributeError, match="frozen: num_timesteps"):
        diffusion.num_timesteps = 3
    for same in (copy.deepcopy(diffusion), pickle.loads(pickle.dumps(diffusion))):
        assert same == diffusion and hash(same) == hash(diffusion)
    assert diffusion != Diffusion("linear", 1000, "fixed_large")
    assert diffusion != Diffusion("linear", 1000, "fixed_small").respace("ddim25")


@pytest.mark.parametrize(
    "diffusion",
    [
        Diffusion(),
        Diffusion("linear", 1000, "fixed_small", "x_0", rescale_timesteps=False).respace("10,15"),
        Diffusion(betas=torch.linspace(1e-4, 0.02, 30)).respace(7).respace(3),
    ],
    ids=repr,
)
def test_description_in_json_rebuilds_the_process(diffusion):
    rebuilt = Diffusion.from_dict(json.loads(json.dumps(diffusion.to_dict())))
    assert rebuilt == diffusion
    assert torch.equal(rebuilt.table(), diffusion.table())


def test_description_with_unknown_keys_is_refused():
    with pytest.raises(ValueError, match=r"must have the keys .* got .*'zeal'"):
        Diffusion.from_dict({**Diffusion().to_dict(), "zeal": 1})

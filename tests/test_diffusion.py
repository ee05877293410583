"""The diffusion process agrees with the original code, with exact arithmetic and with itself."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path

import mpmath
import pytest
import torch

from iddpm_ext.diffusion import (
    COLUMN,
    COLUMNS,
    PREDICTIONS,
    VARIANCES,
    Diffusion,
    approx_standard_normal_cdf,
    betas_for_alpha_bar,
    cosine_beta_schedule,
    discretized_gaussian_log_likelihood,
    linear_beta_schedule,
    normal_kl,
)
from iddpm_ext.random import NoiseKey, normal

GOLDEN = json.loads((Path(__file__).parent / "golden" / "diffusion.json").read_text())
CHAINS = {
    "cosine-4000": ("cosine", 4000, None),
    "cosine-4000-50": ("cosine", 4000, "50"),
    "linear-1000-ddim25": ("linear", 1000, "ddim25"),
    "linear-1000-10,15,20": ("linear", 1000, "10,15,20"),
}
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


@pytest.mark.parametrize("name", GOLDEN["schedules"])
def test_named_schedules_have_the_original_betas(name):
    schedule, steps = name.split()
    expected = GOLDEN["schedules"][name]
    diffusion = Diffusion(schedule, int(steps))
    t = torch.tensor(expected["t"])
    agrees(diffusion.betas[t], expected["betas"], rtol=1e-12, atol=0)
    agrees(diffusion.alphas_cumprod[t], expected["alphas_cumprod"], rtol=1e-12, atol=0)


def test_cosine_4000_has_the_published_extremes():
    diffusion = Diffusion()
    assert diffusion.betas[0].item() == pytest.approx(9.866e-6, rel=1e-4)
    assert int((diffusion.betas > 0.998999).sum()) == 1
    assert diffusion.alphas_cumprod[-1].item() == pytest.approx(1.518e-10, rel=1e-3)
    assert diffusion.alphas_cumprod[-1].rsqrt().item() == pytest.approx(81165, abs=1)
    row = diffusion.table()[0]
    ends = row[COLUMN["log_variance_bias"]] + row[COLUMN["log_variance_scale"]] * torch.tensor(
        [-1.0, 1.0]
    )
    assert ends.tolist() == pytest.approx([-12.2045, -11.5264], abs=1e-4)


@pytest.mark.parametrize(
    ("schedule", "steps", "share"),
    [
        ("linear", 4000, (0.325, 0.327)),
        ("linear", 1000, (0.325, 0.327)),
        ("cosine", 4000, (0.064, 0.066)),
    ],
)
def test_share_of_nearly_pure_noise_steps_is_the_known_one(schedule, steps, share):
    noisy = (Diffusion(schedule, steps).alphas_cumprod < 1e-2).double().mean().item()
    assert share[0] <= noisy <= share[1]


def test_own_alpha_bar_gives_betas_that_multiply_back_to_it():
    betas = betas_for_alpha_bar(10, lambda u: 1 - 0.9 * u, max_beta=0.999)
    expected = 1 - 0.9 * torch.arange(1, 11, dtype=torch.float64) / 10
    torch.testing.assert_close((1 - betas).cumprod(0), expected, rtol=1e-14, atol=0)


def test_max_beta_caps_the_cosine_schedule():
    assert cosine_beta_schedule(100, max_beta=0.5).max() == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear_beta_schedule(19), "num_timesteps must be at least 20.*got 19"),
        (
            lambda: Diffusion("linear", 20),
            "every beta must be above 0 and below 1, got 1.0 at t=19",
        ),
        (lambda: Diffusion("cosine", 1), "at least 2, got 1"),
        (lambda: Diffusion("cosine", 0), "at least 1, got 0"),
        (lambda: Diffusion("cosine", 10.0), "must be an int, got 10.0"),
        (lambda: Diffusion("quadratic"), "schedule must be one of cosine, linear, got 'quadratic'"),
        (lambda: Diffusion(variance="big"), "variance must be one of .* got 'big'"),
        (lambda: Diffusion(prediction="v"), "prediction must be one of .* got 'v'"),
        (lambda: Diffusion(betas=[0.1, 0.0]), "above 0 and below 1, got 0.0 at t=1"),
        (lambda: Diffusion(betas=[0.1, math.nan]), "above 0 and below 1, got nan at t=1"),
        (lambda: Diffusion(betas=[[0.1]]), r"betas must be \[T\], got \(1, 1\)"),
        (lambda: Diffusion(num_timesteps=3, betas=[0.1, 0.2]), "number of betas 2, got 3"),
        (lambda: Diffusion(betas=[0.99] * 40), "keep alpha_bar above 1e-75"),
        (
            lambda: Diffusion().table(sampler="heun"),
            "sampler must be one of ddpm, ddim, got 'heun'",
        ),
        (lambda: Diffusion().table(sampler="ddim", eta=1.5), "eta must be from 0 to 1, got 1.5"),
        (
            lambda: cosine_beta_schedule(10, max_beta=1.0),
            "max_beta must be between 0 and 1, got 1.0",
        ),
        (lambda: cosine_beta_schedule(10, s=-1), "s must be at least 0, got -1"),
        (lambda: betas_for_alpha_bar(4, lambda u: 1.0), "alpha_bar must fall"),
    ],
)
def test_impossible_processes_are_refused_with_the_rule_and_the_value(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def exact_columns(betas, kept, eta):
    """The textbook formulas with 50 digits: what each column must round to."""
    with mpmath.workdps(60):
        product, alpha_bars = mpmath.mpf(1), []
        for beta in betas:
            product *= 1 - mpmath.mpf(beta)
            alpha_bars.append(product)
        visited = [alpha_bars[i] for i in kept]
        before = [mpmath.mpf(1), *visited[:-1]]
        variances, rows = [], []
        for now, previous in zip(visited, before, strict=True):
            variances.append((1 - now / previous) * (1 - previous) / (1 - now))
        clipped = [mpmath.log(v) for v in [variances[1], *variances[1:]]]
        for i, (now, previous) in enumerate(zip(visited, before, strict=True)):
            beta, alpha = 1 - now / previous, now / previous
            c1 = beta * mpmath.sqrt(previous) / (1 - now)
            c2 = (1 - previous) * mpmath.sqrt(alpha) / (1 - now)
            away = mpmath.sqrt((1 - previous - eta**2 * variances[i]) / (1 - now))
            rows.append(
                {
                    "x0_from_xt": 1 / mpmath.sqrt(now),
                    "x0_from_out": -mpmath.sqrt(1 / now - 1),
                    "mean_x0": c1,
                    "mean_xt": c2,
                    "ddim_mean_x0": mpmath.sqrt(previous) - away * mpmath.sqrt(now),
                    "ddim_mean_xt": away,
                    "log_variance_bias": (mpmath.log(beta) + clipped[i]) / 2,
                    "log_variance_scale": (mpmath.log(beta) - clipped[i]) / 2,
                    "posterior_log_variance": clipped[i],
                    "sqrt_alpha_bar": mpmath.sqrt(now),
                    "sqrt_one_minus_alpha_bar": mpmath.sqrt(1 - now),
                    "log_alpha_bar": mpmath.log(now),
                }
            )
        return rows


@pytest.mark.parametrize("name", ["cosine-4000", "cosine-4000-50", "linear-1000-ddim25"])
def test_table_is_within_1e_15_of_fifty_digit_arithmetic(name):
    schedule, steps, _ = CHAINS[name]
    diffusion, eta = chain(name), 0.25
    table = diffusion.table(dtype=torch.float64)
    ddim = diffusion.table(sampler="ddim", eta=eta, dtype=torch.float64)
    betas = Diffusion(schedule, steps).betas.tolist()
    worst = {}
    for i, row in enumerate(exact_columns(betas, diffusion.timesteps.tolist(), mpmath.mpf(eta))):
        for column, expected in row.items():
            source, base = (ddim, column[5:]) if column.startswith("ddim") else (table, column)
            if column == "log_alpha_bar":
                hi, lo = table[i, COLUMN["log_alpha_bar_hi"]], table[i, COLUMN["log_alpha_bar_lo"]]
                actual = mpmath.mpf(hi.item()) + mpmath.mpf(lo.item())
            else:
                actual = mpmath.mpf(source[i, COLUMN[base]].item())
            # Relative to 1 for logarithms, in which an absolute error is a factor's.
            scale = max(abs(expected), 1) if "log" in column else abs(expected)
            error = abs(actual - expected) / scale if scale else abs(actual - expected)
            worst[column] = max(worst.get(column, 0), float(error))
    assert max(worst.values()) < 1e-15, worst


def test_table_rows_are_rounded_once_from_float64():
    diffusion = chain("cosine-4000-50")
    table, double = diffusion.table(), diffusion.table(dtype=torch.float64)
    assert table.shape == (50, 16) and table.dtype == torch.float32 and table.is_contiguous()
    assert len(COLUMNS) == 16
    assert torch.equal(table, double.float())


def test_log_alpha_bar_pair_keeps_more_digits_than_one_float():
    table = Diffusion().table().double()
    pair = table[:, COLUMN["log_alpha_bar_hi"]] + table[:, COLUMN["log_alpha_bar_lo"]]
    torch.testing.assert_close(pair, Diffusion().alphas_cumprod.log(), rtol=1e-11, atol=1e-15)


def test_ddim_with_eta_1_has_the_posterior_mean_and_small_variance():
    small = Diffusion(variance="fixed_small").table(dtype=torch.float64)
    ddim = Diffusion().table(sampler="ddim", eta=1.0, dtype=torch.float64)
    keep = [COLUMN[c] for c in ("mean_x0", "mean_xt", "noise_scale")]
    torch.testing.assert_close(ddim[:, keep], small[:, keep], rtol=1e-15, atol=0)
    bias = COLUMN["log_variance_bias"]
    torch.testing.assert_close(ddim[1:, bias], small[1:, bias], rtol=1e-15, atol=0)


def test_ddim_without_noise_has_no_variance_columns():
    table = Diffusion().table(sampler="ddim")
    for column in ("log_variance_bias", "log_variance_scale", "noise_scale"):
        assert not table[:, COLUMN[column]].any()


def test_tables_are_kept_and_usable_for_training_after_inference():
    diffusion = Diffusion(num_timesteps=100)
    with torch.inference_mode():
        table = diffusion.table()
    assert diffusion.table("cpu") is table
    assert not table.is_inference()


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
    assert torch.equal(diffusion.q_sample(x, t, key), diffusion.q_sample(x, t, z))
    drawn, given = (diffusion.reverse_step(out, x, t, noise) for noise in (key, z))
    assert torch.equal(drawn.x_prev, given.x_prev)


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
        (lambda d, x: d.q_sample(x, torch.tensor([0, 100]), x), "t must be from 0 to 99, got 100"),
        (lambda d, x: d.q_sample(x, torch.tensor([-1, 0]), x), "t must be from 0 to 99, got -1"),
        (lambda d, x: d.q_sample(x, torch.tensor([0]), x), r"t must be int64 \[2\], got .*\(1,\)"),
        (
            lambda d, x: d.q_sample(x, torch.tensor([0.0, 1]), x),
            r"t must be int64 \[2\], got torch.float32",
        ),
        (
            lambda d, x: d.q_sample(x, torch.tensor([0, 1]), x[:1]),
            r"noise must be \(2, 1, 2, 2\), got \(1,",
        ),
        (
            lambda d, x: d.p_mean_variance(x, x, torch.tensor([0, 1])),
            r"model_output must be \(2, 2, 2, 2\)",
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
    with pytest.raises(ValueError, match=message):
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


def test_normal_kl_is_zero_for_equal_gaussians_and_matches_torch_otherwise():
    a, b, c, d = (torch.randn(7, dtype=torch.float64) for _ in range(4))
    assert not normal_kl(a, b, a, b).any()
    p, q = (torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in ((a, b), (c, d)))
    torch.testing.assert_close(normal_kl(a, b, c, d), torch.distributions.kl_divergence(p, q))


def test_tanh_cdf_is_within_3e_4_of_the_normal_distribution_function():
    x = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    assert (approx_standard_normal_cdf(x) - torch.special.ndtr(x)).abs().max() < 3e-4


@pytest.mark.parametrize("log_scale", [-4.0, -2.0, 0.5])
@pytest.mark.parametrize("exact", [False, True])
def test_probabilities_of_all_256_levels_sum_to_one(log_scale, exact):
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    scale = torch.full_like(x, log_scale)
    log_p = discretized_gaussian_log_likelihood(x, scale * 0 + 0.3, scale, exact=exact)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("log_scale", [-6.0, -5.0, -4.0, -3.0])
def test_tanh_likelihood_is_within_5e_4_nats_of_the_exact_one_near_the_mean(log_scale):
    x = torch.arange(1, 255, dtype=torch.float64) / 127.5 - 1
    scale = torch.full_like(x, log_scale)
    close, exact = (
        discretized_gaussian_log_likelihood(x, x + 0.003, scale, exact=e) for e in (False, True)
    )
    assert (close - exact).abs().max() < 5e-4


@pytest.mark.parametrize("level", [0, 1, 127, 254, 255])
@pytest.mark.parametrize("mean", [-1.3, 0.0, 0.9])
@pytest.mark.parametrize("log_scale", [-7.0, -3.0, 2.0])
def test_exact_likelihood_agrees_with_fifty_digits_far_into_the_tails(level, mean, log_scale):
    x = torch.tensor(level / 127.5 - 1, dtype=torch.float64)
    actual = discretized_gaussian_log_likelihood(
        x, torch.tensor(mean).double(), torch.tensor(log_scale).double(), exact=True
    )
    with mpmath.workdps(50):
        centred, scale = mpmath.mpf(x.item()) - float(torch.tensor(mean)), mpmath.exp(log_scale)
        lower = -mpmath.inf if level == 0 else (centred - 1 / mpmath.mpf(255)) / scale
        upper = mpmath.inf if level == 255 else (centred + 1 / mpmath.mpf(255)) / scale
        root = mpmath.sqrt(2)
        expected = mpmath.log((mpmath.erfc(lower / root) - mpmath.erfc(upper / root)) / 2)
        if not mpmath.isfinite(expected):
            expected = mpmath.log((mpmath.erfc(-upper / root) - mpmath.erfc(-lower / root)) / 2)
    assert actual.item() == pytest.approx(float(expected), rel=1e-10)


def test_tanh_likelihood_is_floored_at_1e_12_without_gradient():
    mean = torch.tensor([0.9], requires_grad=True)
    log_p = discretized_gaussian_log_likelihood(torch.tensor([-0.5]), mean, torch.full((1,), -6.0))
    assert log_p.item() == pytest.approx(math.log(1e-12), abs=1e-5)
    assert torch.autograd.grad(log_p, mean)[0] == 0

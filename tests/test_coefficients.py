"""Schedules are the original's, and every coefficient made from them is right to the last digits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mpmath
import pytest
import torch

from iddpm_ext.diffusion import (
    Diffusion,
    betas_for_alpha_bar,
    cosine_beta_schedule,
    linear_beta_schedule,
)
from iddpm_ext.ops.columns import Column

GOLDEN = json.loads((Path(__file__).parent / "golden" / "diffusion.json").read_text())
LOGARITHMS = (
    Column.LOG_VARIANCE_BIAS,
    Column.LOG_VARIANCE_SCALE,
    Column.POSTERIOR_LOG_VARIANCE,
)


@pytest.mark.parametrize("name", GOLDEN["schedules"])
def test_named_schedules_have_the_original_betas(name):
    schedule, steps = name.split()
    expected = GOLDEN["schedules"][name]
    diffusion = Diffusion(schedule, int(steps))
    t = torch.tensor(expected["t"])
    assert diffusion.betas[t].tolist() == pytest.approx(expected["betas"], rel=1e-12)
    assert diffusion.alphas_cumprod[t].tolist() == pytest.approx(
        expected["alphas_cumprod"], rel=1e-12
    )


def test_cosine_4000_has_the_published_extremes():
    diffusion = Diffusion()
    assert diffusion.betas[0].item() == pytest.approx(9.866e-6, rel=1e-4)
    assert int((diffusion.betas > 0.998999).sum()) == 1
    assert diffusion.alphas_cumprod[-1].item() == pytest.approx(1.518e-10, rel=1e-3)
    assert diffusion.alphas_cumprod[-1].rsqrt().item() == pytest.approx(81165, abs=1)
    row = diffusion.table()[0]
    ends = row[Column.LOG_VARIANCE_BIAS] + row[Column.LOG_VARIANCE_SCALE] * torch.tensor(
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
            "prediction must be x_0, x_prev or velocity for a chain that ends in pure noise",
        ),
        (lambda: Diffusion("cosine", 1), "at least 2, got 1"),
        (lambda: Diffusion("cosine", 0), "at least 1, got 0"),
        (lambda: Diffusion("cosine", 10.0), "must be an int, got 10.0"),
        (
            lambda: Diffusion("quadratic"),
            "schedule must be one of cosine, linear, sigmoid, karras, got 'quadratic'",
        ),
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
                    Column.X0_FROM_XT: 1 / mpmath.sqrt(now),
                    Column.X0_FROM_OUT: -mpmath.sqrt(1 / now - 1),
                    Column.MEAN_X0: c1,
                    Column.MEAN_XT: c2,
                    "ddim mean_x0": mpmath.sqrt(previous) - away * mpmath.sqrt(now),
                    "ddim mean_xt": away,
                    Column.LOG_VARIANCE_BIAS: (mpmath.log(beta) + clipped[i]) / 2,
                    Column.LOG_VARIANCE_SCALE: (mpmath.log(beta) - clipped[i]) / 2,
                    Column.POSTERIOR_LOG_VARIANCE: clipped[i],
                    Column.SQRT_ALPHA_BAR: mpmath.sqrt(now),
                    Column.SQRT_ONE_MINUS_ALPHA_BAR: mpmath.sqrt(1 - now),
                    "log_alpha_bar": mpmath.log(now),
                }
            )
        return rows


@pytest.mark.parametrize(
    ("whole", "spec"),
    [(Diffusion(), 4000), (Diffusion(), 50), (Diffusion("linear", 1000), "ddim25")],
    ids=["cosine-4000", "cosine-50", "linear-ddim25"],
)
def test_table_is_within_1e_15_of_fifty_digit_arithmetic(whole, spec):
    diffusion, eta = whole.respace(spec), 0.25
    table = diffusion.table(dtype=torch.float64)
    ddim = diffusion.table(sampler="ddim", eta=eta, dtype=torch.float64)
    exact = exact_columns(whole.betas.tolist(), diffusion.timesteps.tolist(), mpmath.mpf(eta))
    worst = {}
    for i, row in enumerate(exact):
        actual = {column: table[i, column].item() for column in Column}
        actual["ddim mean_x0"] = ddim[i, Column.MEAN_X0].item()
        actual["ddim mean_xt"] = ddim[i, Column.MEAN_XT].item()
        actual["log_alpha_bar"] = mpmath.mpf(actual[Column.LOG_ALPHA_BAR_HIGH])
        actual["log_alpha_bar"] += mpmath.mpf(actual[Column.LOG_ALPHA_BAR_LOW])
        for column, expected in row.items():
            # Relative to 1 for small logarithms, of which an absolute error is a factor's.
            logarithm = column == "log_alpha_bar" or column in LOGARITHMS
            scale = max(abs(expected), 1) if logarithm else abs(expected) or 1
            error = abs(mpmath.mpf(actual[column]) - expected) / scale
            worst[column] = max(worst.get(column, 0), float(error))
    assert len(worst) == 12 and max(worst.values()) < 1e-15, worst


def test_table_rows_are_rounded_once_from_float64():
    diffusion = Diffusion().respace(50)
    table, double = diffusion.table(), diffusion.table(dtype=torch.float64)
    assert table.shape == (50, 16) and table.dtype == torch.float32 and table.is_contiguous()
    assert torch.equal(table, double.float())


def test_log_alpha_bar_pair_keeps_more_digits_than_one_float():
    table = Diffusion().table().double()
    pair = table[:, Column.LOG_ALPHA_BAR_HIGH] + table[:, Column.LOG_ALPHA_BAR_LOW]
    torch.testing.assert_close(pair, Diffusion().alphas_cumprod.log(), rtol=1e-11, atol=1e-15)


def test_ddim_with_eta_1_has_the_posterior_mean_and_small_variance():
    small = Diffusion(variance="fixed_small").table(dtype=torch.float64)
    ddim = Diffusion().table(sampler="ddim", eta=1.0, dtype=torch.float64)
    # Each is made of the same numbers in another order, with at most eight roundings.
    close = {"rtol": 8 * torch.finfo(torch.float64).eps, "atol": 0}
    keep = [Column.MEAN_X0, Column.MEAN_XT, Column.NOISE_SCALE]
    torch.testing.assert_close(ddim[:, keep], small[:, keep], **close)
    bias = Column.LOG_VARIANCE_BIAS
    torch.testing.assert_close(ddim[1:, bias], small[1:, bias], **close)


def test_ddim_without_noise_has_no_variance_columns():
    table = Diffusion().table(sampler="ddim")
    for column in (Column.LOG_VARIANCE_BIAS, Column.LOG_VARIANCE_SCALE, Column.NOISE_SCALE):
        assert not table[:, column].any()


def test_tables_are_kept_and_usable_for_training_after_inference():
    diffusion = Diffusion(num_timesteps=100)
    with torch.inference_mode():
        table = diffusion.table()
    assert diffusion.table("cpu") is table
    assert not table.is_inference()

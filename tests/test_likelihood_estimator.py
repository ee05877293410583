"""The estimator of the bound: unbiased, with intervals that cover, within its budget."""

from __future__ import annotations

import math

import pytest
import torch
from likelihood_model import STEPS, images, trained

from iddpm_ext import nll
from iddpm_ext.likelihood.design import (
    full_design,
    learn_proposal,
    make_plan,
    sampled_design,
)
from iddpm_ext.likelihood.estimate import estimate, student_quantile

PROPOSALS = {
    "uniform": torch.full((50,), 1 / 50, dtype=torch.float64),
    "falling": learn_proposal(torch.empty(0, dtype=torch.int64), torch.empty(0), 50),
    "wrong": torch.softmax(torch.linspace(0, 4, 50, dtype=torch.float64), 0),
}


@pytest.mark.parametrize("columns", [1, 2, 6, 24])
@pytest.mark.parametrize("name", PROPOSALS)
def test_every_step_counts_once_in_expectation_whatever_the_proposal(name, columns):
    many = 20_000
    design = sampled_design(many, columns, PROPOSALS[name], seed=1)
    shares = torch.zeros(many, 50, dtype=torch.float64).scatter_add_(1, design.t, design.scale)
    error = shares.std(0) / math.sqrt(many)
    assert ((shares.mean(0) - 1).abs() <= 4.5 * error + 1e-12).all()


@pytest.mark.parametrize("columns", [2, 6, 24])
def test_the_variance_of_the_pairs_is_that_of_the_estimates(columns):
    many = 20_000
    design = sampled_design(many, columns, PROPOSALS["falling"], seed=2)
    mean = 3.0 / (1 + torch.arange(50)) ** 1.3
    noise = torch.randn(design.t.shape, generator=torch.Generator().manual_seed(0))
    terms = mean[design.t] * (1 + 0.2 * noise.double())
    result = estimate(design, terms, torch.zeros(many))
    low, high = result.ci95
    claimed = ((high - low) / (2 * 1.95996)) ** 2 * many
    true = float(result.per_image.var())
    assert claimed == pytest.approx(true, rel=0.06)
    assert low < float(mean.double().sum()) < high


def test_replicates_of_one_image_and_step_count_up():
    design = sampled_design(40, 24, PROPOSALS["falling"], seed=3)
    for t, draw in zip(design.t, design.draw, strict=True):
        for step in t.unique():
            assert draw[t == step].tolist() == list(range(int((t == step).sum())))


@pytest.mark.parametrize("steps", [4000, 200, 25, 7, 2])
def test_the_full_sum_gives_every_step_the_weight_one(steps):
    design = full_design(3, torch.linspace(0, 3999, steps).round().long())
    shares = torch.zeros(3, steps, dtype=torch.float64).scatter_add_(1, design.t, design.scale)
    assert torch.equal(shares, torch.ones_like(shares)) and design.t.shape[1] % 2 == 0
    assert len({*zip(design.t[0].tolist(), design.draw[0].tolist(), strict=True)}) == len(
        design.t[0]
    )


@pytest.mark.parametrize("count", [1, 3, 100, 1000])
@pytest.mark.parametrize("budget", [1, 2, 3, 4.5, 10, 64, 300])
def test_pilot_and_estimate_stay_within_the_budget_and_use_most_of_it(count, budget):
    plan = make_plan(count, torch.arange(4000), budget)
    assert plan.columns is not None and plan.columns >= 1
    assert plan.columns == 1 or plan.columns % 2 == 0
    used = len(plan.pilot_images) * len(plan.pilot_steps) + plan.columns * count
    assert used <= budget * count
    assert used > budget * count * 0.5


def test_the_proposal_follows_the_pilot_and_never_vanishes():
    steps = torch.tensor([0, 1, 3, 7, 31, 99])
    terms = (10.0 / (1 + steps.double())).expand(4, -1)
    proposal = learn_proposal(steps, terms, 100)
    wanted = 1 / (1 + torch.arange(100, dtype=torch.float64))
    torch.testing.assert_close(proposal, 0.95 * wanted / wanted.sum() + 0.05 / 100)
    flat = learn_proposal(steps, torch.zeros(4, 6), 100)
    assert (flat > 0).all() and float(flat.sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    "freedom, quantile",
    [(1, 12.7062), (2, 4.3027), (5, 2.5706), (30, 2.0423), (1000, 1.9623), (1e9, 1.95996)],
)
def test_student_quantiles_are_those_of_the_tables(freedom, quantile):
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, abs=2e-4)


def test_the_interval_covers_the_full_sum_in_at_least_44_of_50_runs():
    model, x_0 = trained(), images(12, 10_000)
    # What is estimated is the expectation over the noise: of the full sum, eight draws are averaged.
    full = sum(nll(model, x_0, seed=1000 + seed).bpd for seed in range(8)) / 8
    runs = [nll(model, x_0, budget=24, seed=seed) for seed in range(50)]
    covered = sum(run.ci95[0] <= full <= run.ci95[1] for run in runs)
    assert covered >= 44
    # The intervals are no wider than they have to be, and their centre is not off.
    means = torch.tensor([run.bpd for run in runs], dtype=torch.float64)
    half = sum(run.ci95[1] - run.ci95[0] for run in runs) / 100
    assert half < 2.6 * float(means.std())
    assert abs(float(means.mean()) - full) < 3.5 * float(means.std()) / math.sqrt(50)


def test_the_interval_of_the_full_sum_covers_its_expectation():
    model, x_0 = trained(), images(12, 10_001)
    runs = [nll(model, x_0, seed=seed) for seed in range(10)]
    mean = sum(run.bpd for run in runs) / len(runs)
    assert sum(run.ci95[0] <= mean <= run.ci95[1] for run in runs) >= 8
    # Neighbours that pair up must not differ so much that the interval says nothing.
    spread = float(torch.tensor([run.bpd for run in runs]).std())
    assert sum(run.ci95[1] - run.ci95[0] for run in runs) / 20 < 2.8 * spread


def test_the_population_interval_is_that_of_the_images():
    result = nll(trained(), images(40, 3), budget=24)
    per_image = result.per_image_bpd
    error = float(per_image.std()) / math.sqrt(40) * 2.0227
    assert result.population_ci95 == pytest.approx(
        (result.bpd - error, result.bpd + error), abs=1e-4
    )
    assert result.bpd == pytest.approx(float(per_image.mean()))
    alone = nll(trained(), images(1, 3), budget=24)
    assert math.isnan(alone.population_ci95[0]) and alone.ci95[0] < alone.bpd < alone.ci95[1]


def test_one_evaluation_an_image_is_enough_for_an_interval_over_the_images():
    result = nll(trained(), images(50, 4), budget=1)
    full = nll(trained(), images(50, 4))
    assert result.evaluations == 50 and result.ci95 == result.population_ci95
    assert result.ci95[0] < full.bpd < result.ci95[1]


def test_a_budget_of_every_step_is_the_full_sum():
    x_0 = images(2, 5)
    assert nll(trained(), x_0, budget=STEPS + 64).bpd == nll(trained(), x_0).bpd

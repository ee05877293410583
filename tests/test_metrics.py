"""Metrics on features, against closed forms, scipy, prdc and torch-fidelity."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from iddpm_ext import metrics
from iddpm_ext.metrics import (
    Moments,
    Neighbourhoods,
    feature_statistics,
    frechet_distance,
    half_sample_interval,
    inception_score,
    kernel_distance,
    precision_recall,
)


def draw(seed: int, n: int, d: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Correlated features whose columns differ in size, as those of networks do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return scale * x @ mix / d**0.5 + shift + torch.linspace(0, 3, d, dtype=torch.float64)


def scipy_frechet(a: np.ndarray, b: np.ndarray) -> float:
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(ca @ cb).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root))


# ---- Fréchet distance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frechet_distance_is_scipys_closed_form(dtype):
    a, b = draw(0, 500, 48).to(dtype), draw(1, 300, 48, 1.3, 0.2).to(dtype)
    expected = scipy_frechet(a.double().numpy(), b.double().numpy())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a.numpy(), feature_statistics(b)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_commuting_covariances_is_the_textbook_sum():
    """Diagonal covariances: sum (sqrt a - sqrt b)^2 + |shift|^2."""
    x = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    a, b = x * torch.tensor([3.0, 0.5]), x * torch.tensor([1.0, 2.0]) + 0.25
    spread = (4 / 3) ** 0.5  # of the four corners
    expected = ((3 - 1) * spread) ** 2 + ((0.5 - 2) * spread) ** 2 + 2 * 0.25**2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_a_set_to_itself_is_zero_and_it_is_symmetric():
    a, b = draw(0, 100, 16), draw(1, 90, 16, 2.0)
    assert frechet_distance(a, a) < 1e-8
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_fewer_samples_than_features_are_exact_and_warned_about():
    a, b = draw(0, 20, 48), draw(1, 30, 48, 1.5)
    with pytest.warns(UserWarning, match="a has 20 samples of 48 features"):
        few = frechet_distance(a, b)
    with pytest.warns(UserWarning):
        whole = frechet_distance(feature_statistics(a), feature_statistics(b))
    assert few == pytest.approx(whole, rel=1e-6)
    with pytest.warns(UserWarning, match="b has 48 samples of 48 features"):
        frechet_distance(draw(0, 49, 48), draw(1, 48, 48))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(draw(0, 49, 48), draw(1, 49, 48))


def test_moments_of_batches_are_those_of_the_whole_far_from_the_origin():
    """Where E[x^2] - E[x]^2 would have lost ten digits."""
    x = draw(0, 257, 12) + 1e6
    moments = Moments()
    for part in x.split([1, 100, 3, 153]):
        moments.update(part)
    got = moments.statistics()
    assert got.count == 257
    torch.testing.assert_close(got.mean, x.mean(0), rtol=1e-14, atol=0)
    expected = torch.from_numpy(np.cov((x - 1e6).numpy(), rowvar=False))
    torch.testing.assert_close(got.covariance, expected, rtol=1e-7, atol=1e-7)


# ---- kernel distance


def test_kernel_distance_is_the_double_loop_of_its_definition():
    a, b = draw(0, 7, 5), draw(1, 6, 5, 1.2)

    def kernel(x: Tensor, y: Tensor) -> float:
        return float(x @ y / 5 + 1) ** 3

    within_a = [kernel(a[i], a[j]) for i in range(7) for j in range(7) if i != j]
    within_b = [kernel(b[i], b[j]) for i in range(6) for j in range(6) if i != j]
    between = [kernel(x, y) for x in a for y in b]
    expected = np.mean(within_a) + np.mean(within_b) - 2 * np.mean(between)
    from iddpm_ext.metrics.kernel import squared_mmd

    assert squared_mmd(a, b) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_is_zero_on_average_between_sets_of_one_distribution():
    values = [
        kernel_distance(draw(2 * s, 60, 8), draw(2 * s + 1, 60, 8), subsets=1).value
        for s in range(200)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / 200**0.5
    assert min(values) < 0 < kernel_distance(draw(0, 60, 8), draw(1, 60, 8, 1.0, 1.0)).value


def test_kernel_distance_of_a_seed_repeats_itself():
    a, b = draw(0, 40, 8), draw(1, 50, 8)
    once, again = (kernel_distance(a, b, subsets=5, subset_size=20, seed=3) for _ in range(2))
    assert once == again != kernel_distance(a, b, subsets=5, subset_size=20, seed=4)
    assert once.deviation > 0


def test_kernel_distance_is_the_mean_and_deviation_over_its_subsets():
    from iddpm_ext.metrics.kernel import squared_mmd

    a, b = draw(0, 40, 8), draw(1, 50, 8)
    generator = torch.Generator().manual_seed(3)
    values = [
        squared_mmd(*(x[torch.randperm(len(x), generator=generator)[:20]] for x in (a, b)))
        for _ in range(3)
    ]
    got = kernel_distance(a, b, subsets=3, subset_size=20, seed=3)
    assert got == pytest.approx((np.mean(values), np.std(values)), rel=1e-12)


def test_kernel_distance_takes_a_thousand_samples_at_once_and_no_more():
    a, b = draw(0, 1001, 2), draw(1, 1001, 2)
    assert kernel_distance(a, b, subsets=2) == kernel_distance(a, b, subsets=2, subset_size=1000)


# ---- inception score


def test_inception_score_is_k_for_k_certain_even_classes_and_one_for_no_knowledge():
    certain = torch.eye(10).repeat(30, 1)
    assert inception_score(certain, splits=1).value == pytest.approx(10)
    assert inception_score(torch.full((50, 10), 0.1)).value == pytest.approx(1)


def test_inception_score_is_its_formula_over_the_splits():
    p = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)).double().softmax(1)
    got = inception_score(p, splits=3)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    scores = [
        float((q * (q.log() - q.mean(0).log())).sum(1).mean().exp()) for q in p[order].split(10)
    ]
    assert got == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


# ---- precision and recall


@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall_are_those_of_prdc(k):
    prdc = pytest.importorskip("prdc")
    real, generated = draw(0, 300, 6), draw(1, 250, 6, 0.8, 0.3)
    expected = prdc.compute_prdc(real.numpy(), generated.numpy(), nearest_k=k)
    got = precision_recall(real, generated, k)
    assert 0.1 < got.recall < got.precision < 1
    assert got == pytest.approx((expected["precision"], expected["recall"]), abs=1e-12)


def test_precision_is_of_the_generated_and_recall_of_the_real():
    """Two real clusters of which one is generated, with a stray generated one far from both."""
    real = torch.cat([draw(0, 50, 2), draw(1, 50, 2) + 100])
    generated = torch.cat([draw(2, 90, 2), draw(3, 10, 2) - 100])
    got = precision_recall(real, generated, k=10)
    assert 0.8 < got.precision <= 0.9 and 0.4 < got.recall <= 0.5


def test_a_copy_is_within_a_neighbourhood_of_radius_zero_and_nothing_else_is():
    generator = torch.Generator().manual_seed(0)
    copies = torch.rand(20, 700, generator=generator).repeat_interleave(4, dim=0)
    rows = copies[::4]
    neighbourhoods = Neighbourhoods(copies, 3)
    for row in rows.split(1):  # alone, so that its products are summed in another order
        assert neighbourhoods.contain(row).tolist() == [True]
        assert neighbourhoods.contain(row + 1e-3).tolist() == [False]


def test_blocks_of_rows_do_not_change_neighbourhoods(monkeypatch):
    real, generated = draw(0, 60, 4), draw(1, 50, 4, 0.8)
    whole = precision_recall(real, generated)
    monkeypatch.setattr("iddpm_ext.metrics.neighbours._ROWS", 7)
    assert precision_recall(real, generated) == whole


# ---- intervals


def test_half_samples_give_the_deviation_of_a_mean():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)).double()
    got = half_sample_interval(
        float(x.mean()), len(x), lambda half: float(x[half].mean()), resamples=400
    )
    assert (got.high - got.low) / 2 == pytest.approx(1.96 * float(x.std()) / 4000**0.5, rel=0.12)


def test_two_half_samples_deviate_by_their_difference_over_the_root_of_two():
    x = torch.randn(40, generator=torch.Generator().manual_seed(0)).double()
    means: list[float] = []

    def metric(half: Tensor) -> float:
        means.append(float(x[half].mean()))
        return means[-1]

    got = half_sample_interval(1.0, len(x), metric, resamples=2)
    reach = 1.96 * abs(means[0] - means[1]) / 2**0.5
    assert got == pytest.approx((1 - reach, 1 + reach), rel=1e-12)


# ---- the library that others use


def test_metrics_are_those_of_torch_fidelity():
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, generated = draw(0, 400, 32).float(), draw(1, 400, 32, 0.9, 0.2).float()
    options: dict[str, Any] = {"verbose": False}
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(generated), fid_features_to_statistics(real), False
    )["frechet_inception_distance"]
    assert frechet_distance(generated, real) == pytest.approx(theirs, rel=1e-4)
    theirs = kid_features_to_metric(generated, real, kid_subsets=1, kid_subset_size=400, **options)[
        "kernel_inception_distance_mean"
    ]
    assert kernel_distance(generated, real, subsets=1).value == pytest.approx(theirs, rel=1e-3)
    logits = 2 * generated
    theirs = isc_features_to_metric(logits, splits=1)["inception_score_mean"]
    got = inception_score(logits.double().softmax(1), splits=1).value
    assert got == pytest.approx(theirs, rel=1e-9)
    theirs = prc_features_to_metric(generated, real, prc_neighborhood=3, **options)
    assert precision_recall(real, generated) == pytest.approx(
        (theirs["precision"], theirs["recall"]), abs=1e-3
    )


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: frechet_distance(draw(0, 9, 3), draw(0, 9, 4)), ValueError,
         "frechet_distance: a and b must have equally many features, got 3 and 4"),
        (lambda: frechet_distance(draw(0, 1, 3), draw(0, 9, 3)), ValueError,
         "frechet_distance: a must have at least 2 rows, got 1"),
        (lambda: frechet_distance(draw(0, 9, 3), draw(0, 9, 3) / 0), ValueError,
         "frechet_distance: b must be finite"),
        (lambda: frechet_distance([[1.0]], draw(0, 9, 3)), TypeError,
         r"frechet_distance: a must be an array \[N, D\], got list"),
        (lambda: kernel_distance(draw(0, 9, 3), draw(0, 9, 3), subset_size=10), ValueError,
         "kernel_distance: subset_size must be at most 9, got 10"),
        (lambda: kernel_distance(draw(0, 9, 3), draw(0, 9, 3), subsets=0), ValueError,
         "kernel_distance: subsets must be an int of at least 1, got 0"),
        (lambda: inception_score(torch.ones(20, 4)), ValueError,
         "inception_score: probabilities must be rows of sum 1"),
        (lambda: inception_score(torch.full((3, 4), 0.25)), ValueError,
         "inception_score: probabilities must have at least 10 rows, got 3"),
        (lambda: precision_recall(draw(0, 3, 2), draw(0, 9, 2)), ValueError,
         "precision_recall: real must have at least 4 rows, got 3"),
        (lambda: precision_recall(draw(0, 9, 2), draw(0, 9, 2), k=0), ValueError,
         "precision_recall: k must be an int of at least 1, got 0"),
        (lambda: Moments().statistics(), ValueError, "features must be at least 2 vectors, got 0"),
        (lambda: half_sample_interval(0.0, 3, lambda half: 0.0), ValueError,
         "half_sample_interval: count must be an int of at least 4, got 3"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_module_is_public():
    import iddpm_ext

    assert iddpm_ext.metrics is metrics

"""`vlb_to_all` against the chains that `Diffusion.respace` makes: each pair's term, and their sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from iddpm_ext import Diffusion, _native, ops
from iddpm_ext.ops import synthetic
from iddpm_ext.ops.vlb_to_all.jumps import jump_rows

BACKENDS = ["reference", *([] if _native.cpu_absence() else ["cpu"])]
VARIANCES = ["learned_range", "learned", "fixed_large", "fixed_small"]
PREDICTIONS = ["epsilon", "x_0", "x_prev"]
T = 4000


def _images(
    diffusion: Diffusion, t: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """(model_output, x_0, x_t) of 8-bit images, for a network that is nearly right whatever it predicts."""
    draw = synthetic.Tensors(3, "cpu", dtype)
    shape = (len(t), 2, 5, 4)
    x_0 = (draw.normal(shape) * 60 + 128).clamp(0, 255).round() / 127.5 - 1
    noise = draw.normal(shape)
    x_t = diffusion.q_sample(x_0, t, noise)
    truth = {"epsilon": noise, "x_0": x_0, "x_prev": x_t}[diffusion.prediction]
    out = truth + 0.05 * draw.normal(shape)
    if diffusion.variance == "learned_range":
        out = torch.cat([out, draw.normal(shape)], 1)
    if diffusion.variance == "learned":
        out = torch.cat([out, draw.normal(shape) - 4], 1)
    return out, x_0, x_t


def _of_respaced_chain(
    diffusion: Diffusion, steps: list[int], at: int, images: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """`vlb_terms` of the images at step `at`, by the table of the chain that visits `steps`."""
    chain = diffusion.respace(steps)
    out, x_0, x_t = images
    t = torch.full((len(x_t),), steps.index(at))
    table = chain.table(dtype=x_t.dtype)
    return ops.vlb_terms(out, x_0, x_t, t, table, backend="reference")


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_every_pair_is_the_term_of_the_respaced_chain(schedule, variance, prediction):
    diffusion = Diffusion(schedule, T, variance, prediction)
    pairs = [(1, 0), (2, 0), (700, 699), (700, 3), (3999, 3998), (3999, 1200), (3999, 0)]
    for t, s in pairs:
        images = _images(diffusion, torch.tensor([t, t]))
        found = ops.vlb_to_all(
            *images, torch.tensor([t, t]), diffusion.table(dtype=torch.float64), torch.tensor([s])
        )
        expected = _of_respaced_chain(diffusion, [s, t], t, images)
        torch.testing.assert_close(found[:, 0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_decoders_term_is_that_of_a_chain_whose_second_step_was_named(variance):
    diffusion = Diffusion(num_timesteps=T, variance=variance)
    table = diffusion.table(dtype=torch.float64)
    for t, r in [(0, 1), (0, 3999), (30, 31), (30, 500), (3998, 3999)]:
        images = _images(diffusion, torch.tensor([t, t]))
        targets = torch.tensor([-1 - r, -1])
        found = ops.vlb_to_all(*images, torch.tensor([t, t]), table, targets)
        expected = _of_respaced_chain(diffusion, [t, r], t, images)
        torch.testing.assert_close(found[:, 0], expected, rtol=1e-9, atol=1e-12)
        if r == t + 1 or variance == "learned":
            torch.testing.assert_close(found[:, 1], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [[0, 1, 2, 3999], [0, 40, 41, 3000, 3999], [7, 3999]])
def test_a_schedules_pairs_add_up_to_the_respaced_chains_bound(steps, backend):
    diffusion = Diffusion(num_timesteps=T)
    chain = diffusion.respace(steps)
    out, x_0, x_t = _images(diffusion, torch.tensor(steps), torch.float32)
    whole = ops.vlb_terms(
        out, x_0, x_t, torch.arange(len(steps)), chain.table(), backend=backend
    ).sum()
    targets = torch.tensor([-1 - steps[1], *steps[:-1]])
    terms = ops.vlb_to_all(
        out, x_0, x_t, torch.tensor(steps), diffusion.table(), targets, backend=backend
    )
    torch.testing.assert_close(terms.diagonal().sum(), whole, rtol=2e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_step_before_t_gives_the_tables_own_term(backend):
    diffusion = Diffusion(num_timesteps=T)
    t = torch.tensor([0, 1, 2, 1000, 3999])
    images = _images(diffusion, t, torch.float32)
    whole = ops.vlb_terms(*images, t, diffusion.table(), backend=backend)
    terms = ops.vlb_to_all(*images, t, diffusion.table(), t - 1, backend=backend)
    torch.testing.assert_close(terms.diagonal(), whole, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_there_is_no_jump_forward_or_to_the_step_itself(backend):
    diffusion = Diffusion(num_timesteps=50)
    t = torch.tensor([0, 10, 49])
    targets = torch.tensor([0, 10, 49, -1, -2, -12, -50])
    images = _images(diffusion, t, torch.float32)
    found = ops.vlb_to_all(*images, t, diffusion.table(), targets, backend=backend)
    nan = found.isnan().tolist()
    assert nan == [
        [True, True, True, False, False, False, False],
        [False, True, True, False, True, False, False],
        [False, False, True, False, True, True, True],
    ]


def test_from_the_last_step_straight_to_the_data_the_variance_is_that_of_the_noise():
    diffusion = Diffusion(num_timesteps=T)
    row = jump_rows(diffusion.table(), torch.tensor([T - 1]), torch.tensor([-1]))[0, 0]
    assert row[4] == row[7] and row[5] == 0  # log_variance = log beta = log(1 - alpha_bar_T)
    assert row[2] == 1 and row[3] == 0


def test_coefficients_of_a_jump_keep_their_digits_in_a_float32_table():
    diffusion = Diffusion(num_timesteps=T)
    for t, s in [(1, 0), (2000, 1999), (3999, 3998), (3999, 0)]:
        row = jump_rows(diffusion.table(), torch.tensor([t]), torch.tensor([s]))[0, 0]
        expected = diffusion.respace([s, t]).table(dtype=torch.float64)[1]
        torch.testing.assert_close(row[2:6], expected[2:6], rtol=3e-9, atol=0)
        torch.testing.assert_close(row[7], expected[7], rtol=3e-9, atol=0)


def test_steps_outside_of_the_table_give_nan_where_values_cannot_be_looked_at():
    table = Diffusion(num_timesteps=50).table()
    rows = jump_rows(table, torch.tensor([-1, 50, 2**40]), torch.tensor([0, -1, 2**40, -(2**40)]))
    assert bool(rows.isnan().all())

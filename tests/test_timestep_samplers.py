"""Timestep samplers are unbiased, reproducible, and the same on every process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._subclasses.fake_tensor import FakeTensorMode

from iddpm_ext.diffusion import (
    LossSecondMomentSampler,
    UniformTimestepSampler,
    make_timestep_sampler,
)


def warmed(num_timesteps=6, history=3, **options):
    sampler = LossSecondMomentSampler(num_timesteps, history=history, **options)
    t = torch.arange(num_timesteps).repeat(history)
    sampler.update(t, (t + 1).float())
    return sampler


@pytest.mark.parametrize("name", ["uniform", "loss-second-moment"])
def test_steps_of_an_example_depend_on_its_global_position_alone(name):
    sampler = make_timestep_sampler(name, 1000, seed=3)
    whole = sampler.sample(torch.arange(64))
    parts = [sampler.sample(torch.arange(i, 64, 2)) for i in range(2)]
    for i, part in enumerate(parts):
        assert torch.equal(part.t, whole.t[i::2])
        assert torch.equal(part.weights, whole.weights[i::2])
    assert not torch.equal(
        whole.t, make_timestep_sampler(name, 1000, seed=4).sample(torch.arange(64)).t
    )


@pytest.mark.parametrize("name", ["uniform", "loss-second-moment"])
def test_host_never_waits_for_a_value(name):
    with FakeTensorMode():  # tensors without values: reading one raises
        sampler = make_timestep_sampler(name, 100)
        t, weights = sampler.sample(torch.arange(8))
        sampler.update(t, weights)
        assert sampler.sample(torch.arange(8)).t.shape == (8,)


def test_uniform_sampler_covers_every_step_with_weight_one():
    t, weights = UniformTimestepSampler(10).sample(torch.arange(20000))
    assert t.dtype == torch.int64 and (weights == 1).all()
    share = torch.bincount(t, minlength=10) / 20000
    assert (share - 0.1).abs().max() < 0.01


def test_sampler_is_uniform_until_every_step_has_a_full_history():
    sampler = LossSecondMomentSampler(4, history=2)
    sampler.update(torch.tensor([0, 0, 0, 1, 1, 2, 2, 3]), torch.full((8,), 9.0))
    assert torch.equal(sampler.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))
    assert (sampler.sample(torch.arange(8)).weights == 1).all()
    sampler.update(torch.tensor([3]), torch.tensor([1.0]))
    assert sampler.probabilities()[3] < 0.25


def test_probabilities_follow_the_root_mean_square_with_a_uniform_share():
    p = warmed(uniform_prob=0.01).probabilities()
    root = torch.arange(1, 7, dtype=torch.float64)
    torch.testing.assert_close(p, 0.99 * root / root.sum() + 0.01 / 6)


def test_weighted_losses_are_unbiased():
    sampler = warmed(seed=1)
    t, weights = sampler.sample(torch.arange(200_000))
    share = torch.bincount(t, minlength=6) / 200_000
    assert (share - sampler.probabilities()).abs().max() < 0.005
    of_t = torch.tensor([5.0, -1.0, 2.0, 0.5, 3.0, 7.0])
    assert (weights * of_t[t]).mean().item() == pytest.approx(of_t.mean().item(), abs=0.05)


def sequential_history(batches, num_timesteps, history):
    """The original's update: one loss after another, the oldest shifted out."""
    kept = [[] for _ in range(num_timesteps)]
    for t, losses in batches:
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            kept[step] = [*kept[step], loss][-history:]
    return kept


def test_batched_update_keeps_the_same_losses_as_one_after_another():
    generator = torch.Generator().manual_seed(0)
    sampler, batches = LossSecondMomentSampler(5, history=4), []
    for size in (3, 40, 1, 0, 17, 64):  # some batches hold more of a step than the history does
        t = torch.randint(0, 5, (size,), generator=generator)
        batches.append((t, torch.rand(size, generator=generator)))
        sampler.update(*batches[-1])
        kept = sequential_history(batches, 5, 4)
        state = sampler.state_dict()
        for step in range(5):
            length = min(int(state["counts"][step]), 4)
            assert sorted(state["losses"][step, :length].tolist()) == sorted(kept[step])
    root = np.array([np.sqrt(np.mean(np.square(losses))) for losses in kept])
    expected = 0.999 * root / root.sum() + 0.001 / 5
    np.testing.assert_allclose(sampler.probabilities().numpy(), expected, rtol=1e-12)


def test_losses_that_are_not_finite_are_left_out():
    sampler = warmed()
    before = sampler.probabilities()
    sampler.update(torch.tensor([0, 1, 2]), torch.tensor([torch.nan, torch.inf, -torch.inf]))
    assert torch.equal(sampler.probabilities(), before)


def test_losses_that_are_all_zero_leave_it_uniform():
    sampler = LossSecondMomentSampler(3, history=1)
    sampler.update(torch.arange(3), torch.zeros(3))
    assert torch.equal(sampler.probabilities(), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_step_of_probability_zero_is_never_chosen():
    sampler = LossSecondMomentSampler(3, history=1, uniform_prob=0.0)
    sampler.update(torch.arange(3), torch.tensor([0.0, 1.0, 0.0]))
    t, weights = sampler.sample(torch.arange(10_000))
    assert (t == 1).all() and torch.allclose(weights, torch.tensor(1 / 3))


def test_state_restores_the_sampler_exactly():
    sampler = warmed(seed=2)
    restored = LossSecondMomentSampler(6, history=3, seed=2)
    restored.load_state_dict(sampler.state_dict())
    for each in (sampler, restored):
        each.update(torch.tensor([0, 5, 5]), torch.tensor([3.0, 1.0, 2.0]))
    expected, actual = sampler.sample(torch.arange(100)), restored.sample(torch.arange(100))
    assert torch.equal(actual.t, expected.t) and torch.equal(actual.weights, expected.weights)


def test_state_of_another_shape_or_sampler_is_refused():
    with pytest.raises(ValueError, match=r"state must be .*losses.*3.* got .*losses.*2"):
        LossSecondMomentSampler(6, history=3).load_state_dict(
            LossSecondMomentSampler(6, history=2).state_dict()
        )
    with pytest.raises(ValueError, match=r"state must be \{\}, got"):
        UniformTimestepSampler(6).load_state_dict(warmed().state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformTimestepSampler(0), "num_timesteps must be an int of at least 1, got 0"),
        (lambda: LossSecondMomentSampler(5, history=0), "history must be .* got 0"),
        (lambda: LossSecondMomentSampler(5, uniform_prob=1.5), "uniform_prob must be .* got 1.5"),
        (lambda: make_timestep_sampler("antithetic", 5), "name must be one of .* got 'antithetic'"),
        (lambda: warmed().update(torch.arange(2), torch.zeros(3)), r"got torch.int64 \(2,\)"),
    ],
)
def test_bad_arguments_are_refused_with_the_rule_and_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def rank_losses(rank):
    """Uneven batches: two of five steps' losses on rank 0, seven on rank 1."""
    generator = torch.Generator().manual_seed(rank)
    size = (2, 7)[rank]
    return torch.randint(0, 5, (size,), generator=generator), torch.rand(size, generator=generator)


def update_on_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for capacity in (None, 8):
        sampler = LossSecondMomentSampler(5, history=2)
        for _ in range(3):
            sampler.update(*rank_losses(rank), capacity=capacity)
        torch.save(sampler.state_dict(), f"{folder}/{rank}-{capacity}.pt")
    dist.destroy_process_group()


def test_two_processes_with_uneven_batches_learn_what_one_process_learns(tmp_path):
    mp.spawn(update_on_rank, (str(tmp_path),), nprocs=2)
    alone = LossSecondMomentSampler(5, history=2)
    for _ in range(3):
        alone.update(
            *(torch.cat(both) for both in zip(rank_losses(0), rank_losses(1), strict=True))
        )
    for rank in (0, 1):
        for capacity in (None, 8):
            state = torch.load(tmp_path / f"{rank}-{capacity}.pt")
            for name, tensor in alone.state_dict().items():
                assert torch.equal(state[name], tensor)

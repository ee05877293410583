"""Shortened chains keep the steps that the original keeps, and the process at those steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from iddpm_ext.diffusion import Diffusion, space_timesteps
from iddpm_ext.ops.columns import Column

GOLDEN = json.loads((Path(__file__).parent / "golden" / "diffusion.json").read_text())


@pytest.mark.parametrize(("steps", "spec", "expected"), GOLDEN["space_timesteps"])
def test_spec_keeps_the_steps_that_the_original_keeps(steps, spec, expected):
    assert space_timesteps(steps, spec) == expected
    if spec.isdigit():
        assert space_timesteps(steps, int(spec)) == expected


def test_known_ends_of_respaced_chains():
    assert space_timesteps(4000, "ddim50")[-1] == 3920
    assert space_timesteps(4000, "ddim30")[-1] == 3886
    assert space_timesteps(1000, "ddim2")[-1] == 500
    assert space_timesteps(4000, 50)[::49] == [0, 3999]


def test_halves_round_to_even():
    assert space_timesteps(6, 3) == [0, 2, 5]
    assert space_timesteps(8, 3) == [0, 4, 7]


def test_remainder_goes_to_the_first_sections():
    assert space_timesteps(11, "1,1,1") == [0, 4, 8]


def test_list_keeps_exactly_its_indices():
    assert space_timesteps(10, [7, 0, 3]) == [0, 3, 7]
    assert space_timesteps(10, torch.tensor([0, 9]).tolist()) == [0, 9]


@pytest.mark.parametrize(
    ("steps", "count"),
    [(4000, n) for n in (150, 300, 750, 1333)] + [(1000, n) for n in (75, 150, 300, 400, 750)],
)
def test_impossible_ddim_count_names_the_nearest_possible_ones(steps, count):
    with pytest.raises(ValueError, match=f"got N={count}; the nearest N possible: ") as error:
        space_timesteps(steps, f"ddim{count}")
    near = str(error.value).split(": ")[-1].split(", ")
    assert int(near[0]) < count < int(near[1])
    for n in near:
        assert len(space_timesteps(steps, f"ddim{n}")) == int(n)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (1, "must leave at least 2 steps, got 1"),
        (0, "must leave at least 2 steps, got 0"),
        ([5], r"must leave at least 2 steps, got \[5\]"),
        (101, "section 1 of 1 has 100 steps, .* from 0 to 100, got 101"),
        ("60,40", "section 1 of 2 has 50 steps, .* from 0 to 50, got 60"),
        (-3, "from 0 to 100, got -3"),
        ("ddim0", "got N=0; the nearest N possible: 1$"),
        ("ddim101", "got N=101; the nearest N possible: 100$"),
        ("ddim", "must look like .* got 'ddim'"),
        ("fast", "must look like .* got 'fast'"),
        ("", "must look like .* got ''"),
        ([0, 100], "every index must be from 0 to 99, got 100"),
        ([-1, 3], "every index must be from 0 to 99, got -1"),
        ([3, 3], r"indices must be distinct, got \[3, 3\]"),
        ([0.5, 3], "must be an int, a string or indices"),
        (2.5, "must be an int, a string or indices, got 2.5"),
        (True, "must be an int, a string or indices, got True"),
        (None, "must be an int, a string or indices, got None"),
    ],
)
def test_impossible_respacings_are_refused_with_the_rule_and_the_value(spec, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Diffusion(num_timesteps=100).respace(spec)


@pytest.mark.parametrize("spec", [50, "ddim50", "10,15,20", [0, 1, 2, 3999]])
def test_respaced_chain_keeps_alpha_bar_exactly(spec):
    whole = Diffusion()
    short = whole.respace(spec)
    assert torch.equal(short.alphas_cumprod, whole.alphas_cumprod[short.timesteps])
    columns = [Column.X0_FROM_XT, Column.X0_FROM_OUT, Column.SQRT_ALPHA_BAR]
    assert torch.equal(short.table()[:, columns], whole.table()[short.timesteps][:, columns])
    torch.testing.assert_close(
        (1 - short.betas).cumprod(0), short.alphas_cumprod, rtol=1e-6, atol=0
    )


def test_respacing_again_indexes_the_shorter_chain_and_reports_the_training_chain():
    short = Diffusion().respace(250)
    again = short.respace([0, 100, 249])
    assert again.timesteps.tolist() == short.timesteps[[0, 100, 249]].tolist()
    assert again == Diffusion().respace(again.timesteps.tolist())
    assert again.num_train_timesteps == 4000 and again.num_timesteps == 3
    assert again.table()[:, Column.STEP].tolist() == again.timesteps.tolist()


def test_respacing_to_every_step_changes_nothing():
    diffusion = Diffusion(num_timesteps=100)
    assert diffusion.respace(100) == diffusion
    assert torch.equal(diffusion.respace("ddim100").table(), diffusion.table())


def test_respacing_leaves_the_longer_chain_and_its_tables_alone():
    diffusion = Diffusion(num_timesteps=100)
    table = diffusion.table()
    diffusion.respace(10).table()
    assert diffusion.num_timesteps == 100 and diffusion.table() is table

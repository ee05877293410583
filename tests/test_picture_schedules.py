"""Schedules for pictures: errors are those of DDIM's own jumps, the choice is the best of all."""

from __future__ import annotations

import itertools

import pytest
import torch
from likelihood_model import trained, untrained

import iddpm_ext
from iddpm_ext import Diffusion, sample
from iddpm_ext.cli import main
from iddpm_ext.sampling import find_picture_schedules
from iddpm_ext.sampling.pictures import _as_terms, jump_errors


def test_an_error_is_that_of_a_jump_of_ddim():
    chain = Diffusion(variance="fixed_small").respace([3, 60, 900, 2000, 3999])
    generator = torch.Generator().manual_seed(0)
    x = list(torch.randn(6, 4, 1, 3, 3, generator=generator).double())
    x_0 = list(torch.randn(5, 4, 1, 3, 3, generator=generator).double())
    errors = jump_errors(chain, x, x_0)
    spread = float((x[0] - x[0].mean(0)).square().mean().sqrt())
    for i, j in [(4, 3), (4, 0), (2, 1), (3, 0)]:
        # The same jump by the op of a chain of two steps, whose prediction is x_0[i].
        pair = Diffusion(variance="fixed_small", prediction="x_0").respace(
            chain.timesteps[[j, i]].tolist()
        )
        landed = pair.reverse_step(
            x_0[i], x[i + 1], torch.ones(4, dtype=torch.int64), sampler="ddim", clip=False
        ).x_prev
        ab = pair.alphas_cumprod[0]
        left = (landed - x[j + 1]) / ab.sqrt()
        arrives = spread / (spread**2 + (1 - ab) / ab).sqrt()
        expected = left.square().flatten(1).mean(1).sqrt().mean() * arrives
        assert float(errors[i, j + 1]) == pytest.approx(float(expected), rel=1e-9)
    last = (x_0[2] - x[0]).square().flatten(1).mean(1).sqrt().mean()
    assert float(errors[2, 0]) == pytest.approx(float(last), rel=1e-9)


def test_no_schedule_of_candidates_has_a_smaller_sum():
    generator = torch.Generator().manual_seed(1)
    errors = torch.rand(7, 8, generator=generator).double()
    errors = torch.cat([errors[:, :1], errors[:, 1:].tril(-1)], 1)
    terms = _as_terms(errors)
    from iddpm_ext.diffusion.shortest import shortest_paths

    def total(path: list[int]) -> float:
        jumps = sum(float(errors[b, a + 1]) for a, b in itertools.pairwise(path))
        return float(errors[path[0], 0]) + jumps

    for count, path in shortest_paths(terms, 5).items():
        assert path[-1] == 6
        every = [[*c, 6] for c in itertools.combinations(range(6), count - 1)]
        assert total(path) == pytest.approx(min(map(total, every)))


def test_images_of_few_steps_are_nearer_to_the_fine_ones():
    model = trained()
    found = find_picture_schedules(model, n=16, candidates=40, most=10, first=199, progress=False)
    assert sorted(found.steps) == list(range(2, 11))
    assert all(
        steps[-1] == found.first == 199 and len(steps) == count
        for count, steps in found.steps.items()
    )
    settings = {"sampler": "ddim", "n": 24, "seed": 9, "progress": False}
    fine = sample(model, None, **settings)
    for count in (4, 8):
        chosen, even = (
            sample(model, found.steps[count], **settings),
            sample(model, count, **settings),
        )
        assert (chosen - fine).square().mean() < 0.8 * (even - fine).square().mean()


def noisy_prediction(chain: Diffusion, worst: float):
    """A network that knows the best prediction of normal data, up to an error of its eps."""
    std = 0.5

    def model(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        ab = chain.alphas_cumprod[(timesteps * 4000 / 1000).round().long()].float()
        ab = ab[:, None, None, None]
        eps = x * (1 - ab).sqrt() / (ab * std**2 + 1 - ab)
        return eps + worst * torch.sin(50 * x)

    return model


@pytest.mark.parametrize("worst", [0.003, 0.03])
def test_schedules_begin_where_the_networks_error_is_no_larger_than_what_it_knows(worst):
    chain = Diffusion(variance="fixed_small")
    model = noisy_prediction(chain, worst)
    settings = {"diffusion": chain, "image_shape": (1, 4, 4), "progress": False}
    found = find_picture_schedules(model, n=32, most=6, **settings)
    assert found.first < 3999
    assert all(steps[-1] == found.first for steps in found.steps.values())
    # x_0 is m x plus the error over sqrt(alpha_bar) times sqrt(1 - alpha_bar), for x of two draws.
    ab = chain.alphas_cumprod
    m = ab.sqrt() * 0.25 / (ab * 0.25 + 1 - ab)
    apart = 2 * m.square() + worst**2 * (1 - ab) / ab
    ratio = apart / apart[ab < 0.5].min()
    assert 1.2 < float(ratio[found.first]) < 2.3
    given = find_picture_schedules(model, n=4, most=4, first=3000, **settings)
    assert given.first == 3000 and given.steps[4][-1] == 3000


@pytest.mark.parametrize("first", [0, 200, -1, 1.5, True, "199"])
def test_a_first_step_that_is_none_is_refused(first):
    with pytest.raises(ValueError, match="first must be None or a step of the training chain"):
        find_picture_schedules(trained(), n=4, first=first)


def test_the_command_stores_them_and_sample_takes_them(tmp_path, capsys):
    model = untrained()
    model.load_state_dict(trained().state_dict())
    path = tmp_path / "m.safetensors"
    iddpm_ext.save(model, path)
    options = ["--for", "pictures", "-n", "8", "--candidates", "20", "--most", "6"]
    assert main(["steps", str(path), *options]) == 0
    assert "pictures-5" in capsys.readouterr().out
    loaded = iddpm_ext.load(path)
    chosen = loaded.extra["picture_schedules"]["5"]
    got = sample(loaded, "pictures-5", n=2, sampler="unipc", progress=False)
    assert torch.equal(got, sample(loaded, chosen, n=2, sampler="unipc", progress=False))
    assert main(["steps", str(path)]) != 0
    assert "data must be given" in capsys.readouterr().err
    assert main(["steps", str(path), "--data", str(path), "--first", "9"]) != 0
    assert "first must go with --for pictures" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [{"n": 0}, {"candidates": 3}, {"most": 1}, {"most": True}])
def test_counts_that_are_too_small_are_refused(arguments):
    with pytest.raises(ValueError, match="must be an int of at least"):
        find_picture_schedules(trained(), **arguments)

"""Optimal step schedules: exact over the candidates, stored in checkpoints, taken by sample and nll."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from likelihood_model import STEPS, images, trained, untrained

import iddpm_ext
from iddpm_ext import nll, sample
from iddpm_ext.cli import main
from iddpm_ext.diffusion.shortest import JumpTerms, shortest_paths
from iddpm_ext.likelihood import find_schedules
from iddpm_ext.likelihood.request import make_likelihood_request
from iddpm_ext.likelihood.schedules import candidate_steps, jump_terms
from iddpm_ext.random import STREAM_FORWARD, NoiseKey
from iddpm_ext.sampling.distributed import Processes


@pytest.mark.parametrize("seed", range(5))
def test_no_schedule_of_any_length_has_a_lower_bound(seed):
    generator = torch.Generator().manual_seed(seed)
    size = 7
    jumps, decoders = torch.rand(2, size, size, generator=generator).double()
    terms = JumpTerms(
        jumps.tril(-1), decoders.triu(1), torch.rand(size, generator=generator).double()
    )
    paths = shortest_paths(terms, 10)
    assert sorted(paths) == list(range(2, size + 1))
    for count, path in paths.items():
        assert len(path) == count and path == sorted(set(path))
        every = itertools.combinations(range(size), count)
        assert terms.bound(path) == pytest.approx(min(terms.bound(list(p)) for p in every))


def request_of(x_0, **changes):
    arguments = {
        "labels": None, "low_res": None, "budget": None, "steps": None, "clip": True,
        "exact": False, "batch_size": 4, "seed": 2, "split": "test", "limit": None,
        "diffusion": None, "dtype": None, "engine": True, "backend": "auto", "progress": False,
        **changes,
    }  # fmt: skip
    return make_likelihood_request(trained(), x_0, **arguments)


@pytest.mark.parametrize("path", [[0, 3, 5, 8], [2, 3], [1, 7, 8], [4, 6, 7]])
def test_a_schedules_terms_add_up_to_the_bound_of_its_chain(path):
    model, x_0 = trained(), images(6, 0)
    steps = torch.tensor([0, 1, 2, 5, 11, 30, 70, 150, 199])
    terms, _ = jump_terms(request_of(x_0), steps, None, Processes())
    chain = model.diffusion.respace(steps[path].tolist())
    index, total = torch.arange(6), chain.prior_bpd(x_0)
    for i, step in enumerate(chain.timesteps.tolist()):
        at = torch.full_like(index, i)
        x_t = chain.q_sample(x_0, at, NoiseKey(2, STREAM_FORWARD, index, step))
        out = model(x_t, chain.model_timesteps(at))
        total = total + chain.vlb_terms_bpd(out, x_0, x_t, at)
    assert terms.bound(path) == pytest.approx(float(total.mean()), rel=1e-4)


def test_optimal_schedules_are_better_than_even_spacing_on_other_images():
    found = find_schedules(trained(), images(24, 1), limit=None)
    assert found.timesteps == list(range(STEPS)) and sorted(found.steps) == list(range(2, 201))
    model = untrained()
    model.load_state_dict(trained().state_dict())
    model.extra["step_schedules"] = found.to_extra()
    x_0 = images(12, 2)
    for count in (3, 5, 10, 25):
        optimal, even = nll(model, x_0, steps=f"optimal-{count}"), nll(model, x_0, steps=count)
        assert optimal.bpd < even.bpd
        assert optimal.bpd == pytest.approx(found.bpd[count], rel=0.1)
    x = sample(model, "optimal-5", n=2, progress=False)
    wanted = sample(model, found.steps[5], n=2, progress=False)
    assert torch.equal(x, wanted)


def test_more_steps_are_never_worse_by_the_search():
    found = find_schedules(trained(), images(8, 3), limit=4, candidates=40, most=30)
    bounds = [found.bpd[count] for count in sorted(found.bpd)]
    assert len(bounds) == 29 and all(b <= a + 1e-9 for a, b in itertools.pairwise(bounds[:10]))


@pytest.mark.parametrize(
    "total, count", [(4000, 500), (4000, 20), (300, 299), (50, 500), (1000, 4)]
)
def test_candidates_are_distinct_and_have_both_ends(total, count):
    steps = candidate_steps(total, count)
    assert steps[0] == 0 and steps[-1] == total - 1
    assert (steps.diff() > 0).all() and 0.5 * min(total, count) <= len(steps) <= count


def test_the_search_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    from iddpm_ext.likelihood import schedules

    arguments = {"limit": None, "candidates": 20, "most": 6, "batch_size": 4}
    x_0 = images(8, 4)
    whole = find_schedules(trained(), x_0, **arguments)
    seen = []
    from_step = schedules._from_step

    def stopping(request, evaluator, steps, i):
        if len(seen) == 7:
            raise KeyboardInterrupt
        seen.append(i)
        return from_step(request, evaluator, steps, i)

    with monkeypatch.context() as patch:
        patch.setattr(schedules, "_from_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            find_schedules(trained(), x_0, **arguments, state=tmp_path)
    first = list(seen)
    seen.clear()
    monkeypatch.setattr(schedules, "_from_step", lambda *a: seen.append(a[3]) or from_step(*a))
    resumed = find_schedules(trained(), x_0, **arguments, state=tmp_path)
    assert not set(first) & set(seen) and len(first) + len(seen) == len(whole.timesteps)
    assert resumed.steps == whole.steps and resumed.bpd == whole.bpd


def test_the_command_stores_the_schedules_in_the_checkpoint(tmp_path, capsys, monkeypatch):
    path, data = tmp_path / "model.safetensors", tmp_path / "x.npy"
    model = trained()
    iddpm_ext.save(model, path, extra={"note": "kept"})
    np.save(data, ((images(8, 5) + 1) * 127.5).round().byte()[:, 0].numpy())
    clock = SimpleNamespace(perf_counter=iter([0.0, 3900.0]).__next__)
    monkeypatch.setattr("iddpm_ext.cli.steps.time", clock)
    assert (
        main(
            [
                "steps",
                str(path),
                "--data",
                str(data),
                "--n",
                "6",
                "--candidates",
                "30",
                "--most",
                "12",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "optimal-5" in said and "6 images, 1 h 05 min\n" in said
    stored = iddpm_ext.load(path)
    assert stored.extra["note"] == "kept"
    schedules = stored.extra["step_schedules"]
    assert sorted(map(int, schedules)) == list(range(2, 13))
    assert all(len(steps) == int(count) for count, steps in schedules.items())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in stored.state_dict().items())
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"model.safetensors", "x.npy"}
    out = tmp_path / "nll"
    assert (
        main(["nll", str(path), "--data", str(data), "--steps", "optimal-5", "--out", str(out)])
        == 0
    )
    assert "bits/dim" in capsys.readouterr().out and (out / "per_step.csv").exists()


@pytest.mark.parametrize(
    "arguments, match",
    [
        (
            ["fashion-mnist", "--data", "x.npy", "--out", "y.safetensors", "--candidates", "3"],
            "at least 4",
        ),
        (["fashion-mnist", "--data", "x.npy"], "out must be given"),
        (
            ["fashion-mnist", "--data", "x.npy", "--out", "y.safetensors", "--most", "1"],
            "most must be",
        ),
        (["fashion-mnist", "--data", "/no.npy", "--out", "y.safetensors"], "path must exist"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, match, capsys):
    assert main(["steps", *arguments]) == 1
    assert match in capsys.readouterr().err


def test_dense_chains_visit_every_early_step_and_the_even_ones():
    chain = iddpm_ext.Diffusion("cosine", 4000).respace("dense-50")
    even = iddpm_ext.Diffusion("cosine", 4000).respace(50)
    assert chain.timesteps.tolist() == sorted({*range(81), *even.timesteps.tolist()})
    with pytest.raises(ValueError, match="dense-50"):
        chain.respace("dense-x")
    dense, plain = (nll(trained(), images(8, 6), steps=s) for s in ("dense-5", 5))
    assert dense.bpd < plain.bpd

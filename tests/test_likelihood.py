"""Bits per dimension: the terms, what they depend on, interruptions and files."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from likelihood_model import STEPS, images, trained, untrained

import iddpm_ext
from iddpm_ext import Diffusion, nll
from iddpm_ext.likelihood import journal as journals
from iddpm_ext.likelihood.evaluate import Evaluator, Rows
from iddpm_ext.random import STREAM_FORWARD, NoiseKey, normal


def by_hand(model, chain, x_0, t, draw=0, seed=0, clip=True, exact=False):
    """(bpd, x_0 mse, eps mse, share of v outside) of one step, in plain PyTorch."""
    index = torch.arange(len(x_0))
    key = NoiseKey(seed, STREAM_FORWARD, index, int(chain.timesteps[t]), draw)
    noise = normal(key, x_0.shape)
    at = torch.full_like(index, t)
    x_t = chain.q_sample(x_0, at, noise)
    out = model(x_t, chain.model_timesteps(at))
    bpd = chain.vlb_terms_bpd(out, x_0, x_t, at, clip=clip, exact=exact)
    predicted = chain.p_mean_variance(out, x_t, at, clip=clip).x_0
    alpha_bar = chain.alphas_cumprod[t].float()
    eps = (x_t - alpha_bar.sqrt() * predicted) / (1 - alpha_bar).sqrt()
    errors = [(predicted - x_0).square(), (eps - noise).square(), (out[:, 1:].abs() > 1).float()]
    return torch.stack([bpd, *(e.flatten(1).mean(1) for e in errors)], dim=1)


@pytest.mark.parametrize("clip, exact", [(True, False), (False, False), (True, True)])
def test_the_full_sum_is_the_sum_of_the_steps(clip, exact):
    model, x_0 = trained(), images(3, 0)
    chain = model.diffusion.respace(10)
    result = nll(model, x_0, steps=10, clip=clip, exact=exact, seed=4)
    with torch.no_grad():
        terms = torch.stack([
            sum(by_hand(model, chain, x_0, t, d, 4, clip, exact) for d in (0, 1)) / 2
            for t in range(10)
        ]).double()  # fmt: skip
    per_image = terms[:, :, 0].sum(0) + chain.prior_bpd(x_0)
    torch.testing.assert_close(result.per_image_bpd, per_image, rtol=1e-5, atol=1e-6)
    assert result.prior_bpd == pytest.approx(float(chain.prior_bpd(x_0).mean()))
    steps = result.per_step
    got = torch.stack([steps.bpd, steps.x_0_mse, steps.eps_mse, steps.v_outside], dim=1)
    torch.testing.assert_close(got, terms.mean(1), rtol=2e-4, atol=1e-5)
    assert steps.count.tolist() == [6] * 10
    assert steps.timesteps.tolist() == chain.timesteps.tolist()


def test_without_the_engine_the_figure_is_the_same():
    x_0 = images(4, 1)
    engine = nll(trained(), x_0, budget=16)
    plain = nll(trained(), x_0, budget=16, engine=False, backend="reference")
    assert engine.facts["network"] == "cpu engine" and plain.facts["network"] == "plain"
    assert engine.bpd == pytest.approx(plain.bpd, rel=1e-4)


def test_the_result_does_not_depend_on_the_batch_size():
    x_0 = images(7, 2)
    one, other = (nll(trained(), x_0, budget=24, batch_size=size) for size in (3, 64))
    assert torch.equal(one.per_step_count, other.per_step_count), "the same steps were drawn"
    torch.testing.assert_close(one.per_image_bpd, other.per_image_bpd, rtol=1e-4, atol=1e-5)


def test_the_noise_is_that_of_the_image_and_the_step_in_the_training_chain():
    x_0 = images(5, 3)
    request = iddpm_ext.likelihood.request.make_likelihood_request(
        trained(), x_0, labels=None, low_res=None, budget=None, steps=10, clip=True, exact=False,
        batch_size=8, seed=9, split="test", limit=None, diffusion=None, dtype=None, engine=True,
        backend="auto", progress=False,
    )  # fmt: skip
    evaluator = Evaluator(request, 8)
    rows = Rows(torch.tensor([4, 0, 4]), torch.tensor([3, 9, 3]), torch.tensor([0, 0, 2]))
    measured = evaluator.measure(rows)
    chain = request.spec.diffusion
    with torch.no_grad():
        wanted = torch.stack([
            by_hand(trained(), chain, x_0, int(t), int(d), 9)[i]
            for i, t, d in zip(*rows, strict=True)
        ])  # fmt: skip
    torch.testing.assert_close(measured, wanted, rtol=2e-4, atol=1e-5)


class Interrupted(Exception):
    pass


def stop_after(monkeypatch, batches):
    """Evaluations raise after so many batches; returns the list of batches done."""
    done = []
    measure = Evaluator.measure

    def measured(self, rows):
        if len(done) == batches:
            raise Interrupted
        done.append(len(rows.t))
        return measure(self, rows)

    monkeypatch.setattr(Evaluator, "measure", measured)
    return done


@pytest.mark.parametrize("budget", [None, 40])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch, budget):
    x_0 = images(3, 4)
    arguments = {"budget": budget, "batch_size": 8}
    whole = nll(trained(), x_0, **arguments)
    with monkeypatch.context() as patch:
        done = stop_after(patch, 9)
        with pytest.raises(Interrupted):
            nll(trained(), x_0, **arguments, state=tmp_path)
    with monkeypatch.context() as patch:
        rest = stop_after(patch, -1)
        resumed = nll(trained(), x_0, **arguments, state=tmp_path)
    assert sum(done) + sum(rest) == whole.evaluations, "no batch was evaluated twice"
    assert torch.equal(resumed.per_image_bpd, whole.per_image_bpd)
    assert not tmp_path.exists()


@pytest.mark.parametrize("damage", ["torn", "flipped", "garbage"])
def test_damaged_state_costs_evaluations_but_changes_nothing(tmp_path, monkeypatch, damage):
    x_0 = images(3, 4)
    whole = nll(trained(), x_0, batch_size=8)
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(Interrupted):
            nll(trained(), x_0, batch_size=8, state=tmp_path)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "torn":
        del data[-5:]
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
    else:
        data += b"rows" + bytes(range(256))
    path.write_bytes(data)
    with monkeypatch.context() as patch:
        rest = stop_after(patch, -1)
        resumed = nll(trained(), x_0, batch_size=8, state=tmp_path)
    lost = {"torn": 1, "flipped": 5, "garbage": 0}[damage]
    assert sum(rest) == whole.evaluations - 8 * (9 - lost)
    assert torch.equal(resumed.per_image_bpd, whole.per_image_bpd)


def test_what_is_evaluated_after_damage_is_kept(tmp_path, monkeypatch):
    x_0 = images(3, 4)
    for batches, torn in ((9, 5), (6, 0)):
        with monkeypatch.context() as patch:
            stop_after(patch, batches)
            with pytest.raises(Interrupted):
                nll(trained(), x_0, batch_size=8, state=tmp_path)
        (path,) = tmp_path.iterdir()
        path.write_bytes(path.read_bytes()[: -torn or None])
    with monkeypatch.context() as patch:
        rest = stop_after(patch, -1)
        whole = nll(trained(), x_0, batch_size=8, state=tmp_path)
    assert sum(rest) == whole.evaluations - 8 * (9 - 1 + 6)


def test_other_settings_do_not_take_up_a_run_that_was_interrupted(tmp_path, monkeypatch):
    x_0 = images(3, 4)
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(Interrupted):
            nll(trained(), x_0, state=tmp_path)
    weights = {k: v.clone() for k, v in trained().state_dict().items()}
    other = untrained().requires_grad_(False)
    other.load_state_dict(weights)
    other.out[2].bias[0] += 1e-3
    for model, arguments in ((trained(), {"seed": 1}), (trained(), {"clip": False}), (other, {})):
        with monkeypatch.context() as patch:
            done = stop_after(patch, -1)
            assert sum(done) < nll(model, x_0, state=tmp_path, **arguments).evaluations + 1
            assert sum(done) == 3 * (STEPS + 64)


def test_a_journal_of_nothing_keeps_nothing(tmp_path):
    with journals.Journal(None, "", 0, 2) as journal:
        journal.append(torch.tensor([0]), torch.zeros(1, 2))
    assert len(journal.ids) == 0


def test_files_hold_what_the_result_says(tmp_path):
    result = nll(trained(), images(3, 5), budget=12)
    assert result.per_step_bpd.isnan().any(), "this budget leaves steps out"
    result.write(tmp_path)
    said = json.loads((tmp_path / "nll.json").read_text())
    assert said["bpd"] == result.bpd and said["ci95"] == list(result.ci95)
    assert said["per_image_bpd"] == result.per_image_bpd.tolist()
    with open(tmp_path / "per_step.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == STEPS
    for t, row in enumerate(rows):
        value = float(result.per_step_bpd[t])
        assert int(row["count"]) == int(result.per_step_count[t])
        assert said["per_step"]["bpd"][t] == (None if math.isnan(value) else value)
        assert row["bpd"] == ("" if math.isnan(value) else repr(value))
    assert {path.name for path in tmp_path.iterdir()} == {
        "nll.json", "per_step.csv", "per_image.csv",
    }  # fmt: skip


def test_the_plot_is_a_picture(tmp_path):
    from PIL import Image

    from iddpm_ext.likelihood.plot import plot_steps

    path = plot_steps(nll(trained(), images(2, 6), budget=20).per_step, tmp_path / "plot.png")
    with Image.open(path) as picture:
        assert picture.width > 500 and len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_a_foreign_model_with_a_fixed_variance_is_measured():
    chain = Diffusion("cosine", 30, variance="fixed_small")
    result = nll(lambda x, t: 0.9 * x, images(4, 7), diffusion=chain)
    assert result.per_step.v_outside.isnan().all() and math.isfinite(result.bpd)


def test_files_are_read_with_their_labels_and_rounded_to_levels(tmp_path):
    model = untrained(num_classes=3)
    x_0, labels = images(6, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    levels = ((x_0 + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "x.npz", levels, labels.numpy())
    from_file = nll(model, tmp_path / "x.npz", budget=8, limit=5)
    given = nll(model, x_0[:5], labels=labels[:5], budget=8)
    torch.testing.assert_close(from_file.per_image_bpd, given.per_image_bpd, rtol=1e-4, atol=1e-4)
    other = nll(model, x_0[:5], labels=[0] * 5, budget=8)
    assert not torch.allclose(other.per_image_bpd, given.per_image_bpd, rtol=1e-4)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"data": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, "data must be floating"),
        ({"data": images(2, 0) * 2}, r"data must lie in \[-1, 1\], got"),
        ({"data": images(2, 0) / 2 + 0.5}, "data must hold the 256 levels"),
        ({"data": torch.full((2, 1, 8, 8), torch.nan)}, "data must lie in"),
        ({"data": images(2, 0)[..., :4]}, r"data must be \[N, 1, 8, 8\]"),
        ({"data": images(2, 0)[0]}, r"data must be \[N, C, H, W\]"),
        ({"data": images(2, 0)[:0]}, r"data must be \[N, C, H, W\]"),
        ({"data": 3}, "data must be a tensor, a path or image data"),
        ({"data": "/nowhere.npz"}, "path must exist"),
        ({"labels": None}, "labels must be given"),
        ({"labels": [0]}, "must agree in length"),
        ({"labels": [0, 7]}, "labels must be from 0 to 2"),
        ({"budget": 0.5}, "budget must be at least 1"),
        ({"budget": 0}, "budget must be at least 1"),
        ({"budget": math.nan}, "budget must be at least 1"),
        ({"budget": True}, "budget must be at least 1"),
        (
            {"budget": 1, "data": images(1, 0), "labels": [0]},
            "budget must be at least 2 for a single image",
        ),
        ({"steps": "optimal-5"}, "steps must be a schedule of the checkpoint"),
        ({"steps": 4000}, "steps must be from 2 to 200"),
        ({"seed": -1}, "seed must be an int from 0"),
        ({"batch_size": 0}, "batch_size must be an int above 0"),
        ({"limit": 0}, "limit must be an int above 0"),
        ({"exact": 1}, "exact must be True or False"),
    ],
)
def test_bad_input_is_an_error_that_says_what_is_wrong(change, match):
    arguments = {"data": images(2, 0), "labels": [0, 1], **change}
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=match) as caught:
        nll(untrained(num_classes=3), **arguments)
    assert str(caught.value).startswith(("nll: ", "open_data: "))


def test_errors_of_the_network_name_the_function_that_was_called():
    chain = trained().diffusion
    with pytest.raises(TypeError, match=r"^nll: model must return a tensor, got tuple"):
        nll(lambda x, t: (x,), images(2, 0), steps=5, diffusion=chain, progress=False)
    with pytest.raises(TypeError, match=r"^invert: model must return a tensor, got tuple"):
        iddpm_ext.invert(lambda x, t: (x,), images(2, 0), 5, diffusion=chain, progress=False)


def test_the_fingerprint_knows_what_matters():
    def request(**changes):
        arguments = {
            "labels": None, "low_res": None, "budget": 8, "steps": None, "clip": True,
            "exact": False, "batch_size": 4, "seed": 0, "split": "test", "limit": None,
            "diffusion": None, "dtype": None, "engine": True, "backend": "auto",
            "progress": False, **changes,
        }  # fmt: skip
        make = iddpm_ext.likelihood.request.make_likelihood_request
        return make(trained(), images(2, 0), **arguments)

    own = request().fingerprint()
    assert request(batch_size=9, progress=True).fingerprint() == own
    changes = ({"budget": 9}, {"steps": 50}, {"clip": False}, {"exact": True}, {"seed": 1})
    prints = {own, *(request(**change).fingerprint() for change in changes)}
    assert len(prints) == 1 + len(changes)
    shifted = replace(request(), x_0=images(2, 1))
    assert shifted.fingerprint() != own

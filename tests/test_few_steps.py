"""benchmarks.few_steps at toy size: it computes only what its file lacks, and its table marks the best."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from likelihood_model import images, trained

import iddpm_ext

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import few_steps


def row(method: str, steps: int, distance: float, half: float, **more: float) -> dict[str, object]:
    ci95 = [distance - half, distance + half]
    return {"method": method, "steps": steps, "n": 9, "distance": distance, "ci95": ci95, **more}


def test_the_table_names_the_best_and_whether_it_is_beyond_the_intervals():
    found = [row("ddim", 5, 30, 2), row("unipc-pictures", 5, 20, 2), row("ddpm", 5, 90, 2, bpd=4.5),
             row("dpm++", 10, 12, 2), row("ddpm-best-analytic", 10, 11, 2)]  # fmt: skip
    text = few_steps.table({str(i): one for i, one in enumerate(found)}, 9)
    assert "| method | 5 | 10 |" in text and "| ddpm | 90.0 ± 2.0; 4.500 |  |" in text
    assert "| unipc-pictures | **20.0 ± 2.0** |  |" in text
    assert "5 steps: unipc-pictures 20.0 against ddim 30.0, beyond the intervals." in text
    assert "10 steps: ddpm-best-analytic 11.0 against dpm++ 12.0, not beyond the intervals." in text


def test_a_run_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    model = trained()
    iddpm_ext.save(model, tmp_path / "m.safetensors")
    levels = ((images(60, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "x.npz", arr_0=levels)
    output = tmp_path / "out.json"
    monkeypatch.setattr(
        few_steps, "find_picture_schedules",
        lambda model: iddpm_ext.sampling.find_picture_schedules(model, n=4, candidates=20, most=5),
    )  # fmt: skip
    options = ["few_steps", "--model", str(tmp_path / "m.safetensors"), "--data", str(tmp_path / "x.npz"),
               "--extractor", "pixels", "--n", "20", "--images", "4", "--budget", "4", "--steps", "5",
               "--output", str(output)]  # fmt: skip
    monkeypatch.setattr(few_steps, "context", lambda program: {"program": program})
    for methods in ("ddpm-analytic,ddim-pictures,ddpm-optimal", "ddim-pictures,unipc"):
        monkeypatch.setattr(sys, "argv", [*options, "--methods", methods])
        few_steps.main()
    said = capsys.readouterr().out
    assert "ddpm-optimal 5: the model has no optimal schedules" in said
    assert said.count("ddim-pictures 5:") == 1
    rows = json.loads(output.read_text())["rows"].values()
    assert {one["method"] for one in rows} == {"ddpm-analytic", "ddim-pictures", "unipc"}
    assert [one["method"] for one in rows if "bpd" in one] == ["ddpm-analytic"]
    monkeypatch.setattr(
        sys, "argv", [*options, "--picture", str(tmp_path / "p.png"), "--methods", "unipc"]
    )
    few_steps.main()
    assert (tmp_path / "p.png").exists()
    before = len(rows)
    more = ["--errors", "4", "--methods", "ddpm,ddim,ddim-analytic,unipc", "--steps", "5,40"]
    monkeypatch.setattr(sys, "argv", [*options, *more])
    few_steps.main()
    record = json.loads(output.read_text())
    errors = {key.split(maxsplit=1)[1]: value for key, value in record["errors"].items()}
    assert (
        set(errors) == {"ddim 5", "ddim 40", "unipc 5", "unipc 40"}
        and len(record["rows"]) == before
    )
    assert errors["unipc 40"] < errors["unipc 5"] and errors["unipc 40"] < errors["ddim 40"]


def test_an_unknown_method_is_refused():
    with pytest.raises(Exception, match="must be of ddpm"):
        few_steps._methods("euler")

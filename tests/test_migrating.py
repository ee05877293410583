"""docs/migrating.md names only what there is: flags, fields, functions, and the originals' flags."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

import iddpm_ext
from iddpm_ext import Diffusion, UNetConfig
from iddpm_ext.checkpoint.flags import read_flags
from iddpm_ext.checkpoint.released import CHANNEL_MULT, RELEASED, RELEASED_CLASSIFIERS
from iddpm_ext.cli import sample as sample_verb
from iddpm_ext.training import TrainConfig

PAGE = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text()
TRAIN = {field.name for field in fields(TrainConfig)}
SAMPLE = set(inspect.signature(sample_verb.run).parameters)


def section(title: str) -> str:
    """From a heading to the next one."""
    begin = PAGE.index(title)
    end = PAGE.find("\n#", begin)
    return PAGE[begin : end if end > 0 else None]


def rows(title: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def flags_in(cell: str) -> set[str]:
    return {name.replace("-", "_") for name in re.findall(r"--([a-z][a-z-]*)", cell)}


def missing(names: set[str], known: set[str]) -> set[str]:
    return {name for name in names if name not in known and name.removeprefix("no_") not in known}


@pytest.mark.parametrize(
    "title", ["### Networks", "### Training", "## diffusers", "## denoising-diffusion-pytorch"]
)
def test_every_flag_of_ours_in_a_training_table_is_a_setting(title):
    table = rows(title)
    assert len(table) > 10
    for _, ours, *_ in table:
        # torchrun's own flag stands beside ours in one row.
        assert not missing(flags_in(ours) - {"nproc_per_node"}, TRAIN | {"resume"}), ours


def test_every_flag_of_ours_in_the_sampling_table_is_one_of_the_verb():
    for _, ours in rows("### Sampling"):
        assert not missing(flags_in(ours), SAMPLE), ours


def test_every_flag_of_the_original_networks_is_read_by_load():
    given = {"attention_resolutions": "16,8", "channel_mult": "1,2", "noise_schedule": "linear",
             "small_size": 64, "dropout": 0.1}  # fmt: skip
    seen = set()
    for original, _, ours in rows("### Networks"):
        for name in re.findall(r"`([a-z_]+)", original):
            seen.add(name)
            value = given.get(name, 8)
            try:
                read_flags({name: value})
            except ValueError:
                read_flags({name: True})
        named = set(re.findall(r"`([a-z_]+)", ours)) - {"model"}
        known = {f.name for f in fields(UNetConfig)} | set(inspect.signature(Diffusion).parameters)
        assert named <= known, named - known
    assert len(seen) > 20


def test_every_name_in_the_python_columns_is_one_of_ours():
    for title in ("## diffusers", "## denoising-diffusion-pytorch"):
        for _, ours, *_ in rows(title):
            for name in re.findall(r"`(?:iddpm_ext\.)?([a-z_]+)\(", ours):
                assert hasattr(iddpm_ext, name), name
            for name in re.findall(r"UNetConfig\(([a-z_]+)=", ours):
                assert name in {f.name for f in fields(UNetConfig)}
            for name in re.findall(r"Diffusion\(([a-z_]+)=", ours):
                assert name in inspect.signature(Diffusion).parameters


def test_channel_multipliers_and_the_number_of_released_files_are_those_of_the_code():
    text = section("### Networks")
    for size, mult in CHANNEL_MULT.items():
        assert f"{size}: {','.join(map(str, mult))}" in " ".join(text.split())
    assert "eight files of improved-diffusion and the fifteen of guided-diffusion, four" in PAGE
    assert len(RELEASED) + len(RELEASED_CLASSIFIERS) == 8 + 15
    assert len(RELEASED_CLASSIFIERS) == 4


def test_defaults_that_the_page_tells_are_the_defaults():
    config = TrainConfig()
    assert config.objective == "hybrid" and config.vlb_weight == 1e-3
    assert config.variance == "learned_range" and config.diffusion_steps == 4000
    assert config.grad_clip is None and not config.flip and config.ema_warmup
    assert config.lr_warmup == 0 and not config.lr_decay and config.weight_decay == 0


def test_no_cell_is_empty():
    for line in PAGE.splitlines():
        if line.startswith("|"):
            assert all(cell.strip() for cell in line.strip("|").split("|")), line

"""Every public function against everything that may be done to a network, and every setting of the process.

What it gives is what PyTorch's own modules give in a fresh process (`matrix.py`), to rounding.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import matrix
import pytest
import torch
from matrix import CHANGES, COPIES, ENTRIES, FOLLOWED, OTHERS, SETTINGS, Case
from torch import Tensor

#: Of the largest number. Rounding is a hundred times finer, and every change moves images by more.
TOLERANCE = 1e-4
LEAST_EFFECT = 10 * TOLERANCE
WITHOUT_ENGINE = ("training",)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[tuple[str, str], Tensor]:
    """What a fresh process computes with the modules, by (change, entry)."""
    path = tmp_path_factory.mktemp("matrix") / "expected.pt"
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, matrix.__file__, str(path)]
    subprocess.run(command, env=environment, check=True)
    return torch.load(path)


def distance(a: Tensor, b: Tensor) -> float:
    """max over max."""
    assert a.shape == b.shape and a.dtype == b.dtype
    return float((a - b).abs().max() / b.abs().max())


def call(entry: str, case: Case) -> Tensor:
    return (ENTRIES | OTHERS)[entry](case).detach().clone()


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_network_gives_what_its_module_gives(change, entry, expected):
    case = Case()
    before = call(entry, case)
    assert distance(before, expected["nothing", entry]) < TOLERANCE
    undo: Callable[[], None] | None = CHANGES[change](case.network)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            after = call(entry, case)
    finally:
        if undo is not None:
            undo()
    assert distance(after, expected[change, entry]) < TOLERANCE
    aside = [str(w.message) for w in said if "the module itself runs" in str(w.message)]
    assert bool(aside) == (change not in FOLLOWED and entry not in WITHOUT_ENGINE)


@pytest.mark.parametrize("change", [change for change in CHANGES if change != "nothing"])
def test_every_change_shows_in_the_images(change, expected):
    assert distance(expected[change, "sample"], expected["nothing", "sample"]) > LEAST_EFFECT


@pytest.mark.parametrize("entry", [*ENTRIES, *OTHERS])
@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_of_the_process_enters_a_result(setting, entry, expected):
    if entry in ("training", "accelerate") and setting in ("autocast", "inference mode", "no grad"):
        pytest.skip("the setting is how a training step is asked to compute")
    case = Case()
    with SETTINGS[setting]():
        result = call(entry, case)
    assert distance(result, expected["nothing", entry]) < TOLERANCE
    assert distance(call(entry, case), expected["nothing", entry]) < TOLERANCE


@pytest.mark.parametrize("entry", [*ENTRIES, *OTHERS])
@pytest.mark.parametrize("elsewhere", [matrix.in_a_thread, matrix.in_a_fork])
def test_threads_and_forked_processes_give_the_same(elsewhere, entry, expected):
    case = Case()
    here = call(entry, case)
    assert torch.equal(elsewhere(lambda: call(entry, case)), here)
    assert distance(here, expected["nothing", entry]) < TOLERANCE


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("way", COPIES)
def test_copies_of_a_network_in_use_are_networks_of_their_own(way, entry, expected):
    case = Case()
    call(entry, case)
    original = case.network
    case.network = COPIES[way](original)
    CHANGES["averaged"](case.network)
    assert distance(call(entry, case), expected["averaged", entry]) < TOLERANCE
    case.network = original
    assert distance(call(entry, case), expected["nothing", entry]) < TOLERANCE

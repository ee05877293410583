"""Every public function with every change of a network and every setting of the process.

Results must be those of PyTorch's own modules in a fresh process (`matrix.py`), up to rounding.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import matrix
import pytest
import torch
from matrix import CHANGES, COPIES, ENTRIES, EVERYWHERE, FOLLOWED, OTHERS, SETTINGS, Case
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

#: Tested with all changes and settings in `make test`; the others with one of each kind, and in `make soak`.
WHOLE = ("sample",)
SETTINGS_EVERYWHERE = ("bfloat16 by default", "meta by default", "autocast", "inference mode")
#: Of the largest number. Rounding is a hundred times finer, and every change moves images by more.
TOLERANCE = 1e-4
LEAST_EFFECT = 10 * TOLERANCE
WITHOUT_ENGINE = ("training",)
#: Call PyTorch's modules themselves.
DIRECT = ("training", *OTHERS)
WRAPPERS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "in parallel": torch.nn.DataParallel,
    "average": AveragedModel,
}


def pairs(first: Iterable[str], everywhere: Collection[str], entries: Iterable[str]) -> list[Any]:
    """All pairs; marked as slow where neither is met whole."""
    return [
        pytest.param(a, b, marks=[] if a in everywhere or b in WHOLE else pytest.mark.slow)
        for a in first
        for b in entries
    ]


@pytest.fixture(scope="module")
def expected(request, tmp_path_factory) -> dict[tuple[str, str], Tensor]:
    """What a fresh process computes with the modules, by (change, entry)."""
    path = tmp_path_factory.mktemp("matrix") / "expected.pt"
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    soak = any(item.get_closest_marker("slow") for item in request.session.items)
    command = [sys.executable, matrix.__file__, str(path), *(ENTRIES if soak else WHOLE)]
    subprocess.run(command, env=environment, check=True)
    return torch.load(path)


def distance(a: Tensor, b: Tensor) -> float:
    """max over max."""
    assert a.shape == b.shape and a.dtype == b.dtype
    return float((a - b).abs().max() / b.abs().max())


def call(entry: str, case: Case) -> Tensor:
    return (ENTRIES | OTHERS)[entry](case).detach().clone()


@pytest.mark.parametrize(("change", "entry"), pairs(CHANGES, EVERYWHERE, ENTRIES))
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


@pytest.mark.parametrize(
    ("setting", "entry"), pairs(SETTINGS, SETTINGS_EVERYWHERE, [*ENTRIES, *OTHERS])
)
def test_no_setting_of_the_process_enters_a_result(setting, entry, expected):
    if entry in ("training", "accelerate") and setting in ("autocast", "inference mode", "no grad"):
        pytest.skip("the setting is how a training step is asked to compute")
    case = Case()
    with SETTINGS[setting]():
        result = call(entry, case)
    assert distance(result, expected["nothing", entry]) < TOLERANCE
    assert distance(call(entry, case), expected["nothing", entry]) < TOLERANCE


@pytest.mark.parametrize("entry", [*ENTRIES, *OTHERS])
def test_threads_give_the_same(entry, expected):
    case = Case()
    here = call(entry, case)
    assert torch.equal(matrix.in_a_thread(lambda: call(entry, case)), here)
    assert distance(here, expected["nothing", entry]) < TOLERANCE


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry not in DIRECT])
def test_forked_processes_give_the_same(entry, expected):
    case = Case()
    assert distance(call(entry, case), expected["nothing", entry]) < TOLERANCE
    forked = matrix.in_a_fork(lambda: call(entry, case))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a forked process has, and PyTorch's own modules round by it
    try:
        assert torch.equal(forked, call(entry, case))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("entry", DIRECT)
def test_what_calls_pytorch_goes_on_in_a_fork_with_one_thread(entry, expected, tmp_path):
    path = tmp_path / "found.pt"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, matrix.__file__, str(path), "--forked", entry]
    subprocess.run(command, env=environment, check=True, timeout=600)
    here, forked = torch.load(path)
    assert distance(here, expected["nothing", entry]) < TOLERANCE
    assert distance(forked, expected["nothing", entry]) < TOLERANCE


@pytest.mark.parametrize(("way", "entry"), pairs(COPIES, (), ENTRIES))
def test_copies_of_a_network_in_use_are_networks_of_their_own(way, entry, expected):
    case = Case()
    call(entry, case)
    original = case.network
    case.network = COPIES[way](original)
    CHANGES["averaged"](case.network)
    assert distance(call(entry, case), expected["averaged", entry]) < TOLERANCE
    case.network = original
    assert distance(call(entry, case), expected["nothing", entry]) < TOLERANCE


def test_a_shallow_copy_has_a_forward_of_its_own_and_shares_the_rest(expected):
    case = Case()
    case.sample()
    original, changed = case.network, copy.copy(case.network)
    changed.forward = lambda *args, **kwargs: 0.5 * original(*args, **kwargs)
    halved = case.sample(changed, engine=False)
    assert distance(halved, expected["nothing", "sample"]) > LEAST_EFFECT
    with pytest.warns(RuntimeWarning, match="the network has a forward of its own"):
        assert distance(case.sample(changed), halved) < TOLERANCE
    assert distance(case.sample(), expected["nothing", "sample"]) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_another_dtype_are_evaluated_in_it(dtype):
    case = Case()
    before = case.sample()
    case.network.to(dtype)
    after = case.sample()
    assert torch.equal(after, case.sample(engine=False)) and not torch.equal(after, before)


@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_of_training_alone(training, expected):
    case = Case()
    case.sample()
    case.network.train(training)
    for module in case.network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert distance(case.sample(), expected["nothing", "sample"]) < TOLERANCE


@pytest.mark.parametrize("entry", ["sample", "nll", "invert", "evaluate"])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_network_goes_on_being_followed(wrap, entry, expected):
    case = Case()
    call(entry, case)
    case.network = WRAPPERS[wrap](case.network)
    with pytest.warns(RuntimeWarning, match="the module itself runs, without the engine"):
        assert distance(call(entry, case), expected["nothing", entry]) < TOLERANCE
    CHANGES["averaged"](case.network)
    assert distance(call(entry, case), expected["averaged", entry]) < TOLERANCE

"""Networks that change between calls, from threads and forks: a few changes by default, thousands in a soak.

IDDPM_SOAK=1 makes 10,000 changes, other ones each time: some fifteen minutes of one core.
"""

from __future__ import annotations

import copy
import os
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from matrix import CHANGES, COPIES, ENTRIES, FOLLOWED, Case, in_a_fork, in_a_thread
from torch import Tensor

from iddpm_ext import sample

SOAK = bool(os.environ.get("IDDPM_SOAK"))
CHANGES_MADE = 10_000 if SOAK else 40
THREADS_SECONDS = 120 if SOAK else 5
#: Of the largest number, as in test_matrix; a network that has been changed often may magnify rounding more.
TOLERANCE = 1e-3
#: Changes to one network, at most, before a fresh one: `averaged` and its like shrink it every time.
LONGEST_LIFE = 40
#: What a call after a change may be, by how often.
CALLS = ["sample"] * 12 + ["guidance", "progressive", "invert", "nll"]


def _noise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Some parameter, written through `.data`, to values of its own order."""
    parameters = list(model.parameters())
    chosen = parameters[int(torch.randint(len(parameters), (1,), generator=generator))]
    noise = torch.randn(chosen.shape, generator=generator)
    chosen.data.lerp_(noise * chosen.data.std(correction=0), 0.3)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


class Life:
    """One network, which is changed and called again and again, and what its calls gave."""

    def __init__(self) -> None:
        self.case, self.modules = Case(), Case(engine=False)
        self._given: dict[str, Tensor] = {}
        self.call("sample")

    def call(self, entry: str) -> bool:
        """Whether the result moved since the last such call; asserts that it is the module's."""
        self.modules.network = self.case.network
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours, modules = ENTRIES[entry](self.case), ENTRIES[entry](self.modules)
        assert _distance(ours, modules) < TOLERANCE
        before = self._given.get(entry)
        self._given[entry] = modules
        return before is not None and _distance(modules, before) > TOLERANCE

    def change(self, what: str, choose: random.Random, generator: torch.Generator) -> bool:
        """Makes a change and a call after it, whose result may have moved."""
        undo: Callable[[], None] | None = None
        followed = what in FOLLOWED | {"noise", "copy"}
        goes_on = self.case.network if followed else copy.deepcopy(self.case.network)
        if what == "noise":
            _noise(self.case.network, generator)
        elif what == "copy":
            self.case.network = COPIES[choose.choice(sorted(COPIES))](self.case.network)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                undo = CHANGES[what](self.case.network)
        try:
            moved = self.call(choose.choice(CALLS))
        finally:
            if undo is not None:
                undo()
        if not followed and undo is None:
            self.case.network = goes_on
            self.case.sample()  # after which a change can go unnoticed
        return moved


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As a forked process has, where results are compared with its bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(7200 if SOAK else 120)
@pytest.mark.parametrize("seed", [int(time.time())] if SOAK else [0])
def test_a_network_that_changes_between_calls_is_followed(seed, one_thread):
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    kinds = [*sorted(CHANGES), "noise", "noise", "noise", "copy"]
    life, left, moved = Life(), LONGEST_LIFE, 0
    for i in range(CHANGES_MADE):
        if not left:
            life, left = Life(), choose.randint(1, LONGEST_LIFE)
        left -= 1
        what = choose.choice(kinds)
        try:
            moved += life.change(what, choose, generator)
            if i % 50 == 49:
                elsewhere = choose.choice([in_a_thread, in_a_fork])(life.case.sample)
                assert torch.equal(elsewhere, life.case.sample())
        except BaseException as error:
            error.add_note(f"seed {seed}, change {i}: {what}")
            raise
    # A result that a change leaves where it was tells nothing.
    assert moved > CHANGES_MADE / 2


@pytest.mark.slow
def test_many_threads_go_on_for_long_while_other_networks_are_changed():
    shared, names = Case(), [name for name in ENTRIES if name != "training"]
    alone = {name: ENTRIES[name](shared) for name in names}
    end, wrong = time.monotonic() + THREADS_SECONDS, []

    def use(number: int) -> None:
        choose = random.Random(number)
        while time.monotonic() < end and not wrong:
            name = choose.choice(names)
            if not torch.equal(ENTRIES[name](shared), alone[name]):
                wrong.append(name)

    def change(number: int) -> None:
        own, generator = Case().network, torch.Generator().manual_seed(number)
        while time.monotonic() < end and not wrong:
            _noise(own, generator)
            options = {"labels": [number % 3], "seed": number, "progress": False}
            ours, modules = (sample(own, 2, engine=engine, **options) for engine in (True, False))
            if _distance(ours, modules) > TOLERANCE:
                wrong.append("changed network")

    threads = [threading.Thread(target=use, args=(i,)) for i in range(6)]
    threads += [threading.Thread(target=change, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

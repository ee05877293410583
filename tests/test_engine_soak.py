"""Networks that change between calls, from threads and forks: a few changes by default, thousands in a soak.

IDDPM_SOAK=1 makes 10,000 changes, or as many as fit in IDDPM_SOAK_SECONDS (1200).
"""

from __future__ import annotations

import copy
import os
import random
import threading
import time
import warnings

import pytest
import torch
from matrix import CHANGES, COPIES, ENTRIES, FOLLOWED, Case, in_a_fork, in_a_thread

from iddpm_ext import sample

SOAK = bool(os.environ.get("IDDPM_SOAK"))
SECONDS = float(os.environ.get("IDDPM_SOAK_SECONDS", 1200))
CHANGES_MADE = 10_000 if SOAK else 20
#: As in test_matrix; a network that has been changed often may magnify rounding more.
TOLERANCE = 1e-3
#: Changes that keep weights of order one, however often they are repeated.
REPEATABLE = sorted(FOLLOWED - {"averaged", "parameter", "one number", "assigned"})


def _noise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Some parameter, written through `.data`, to values of its own order."""
    parameters = list(model.parameters())
    chosen = parameters[int(torch.randint(len(parameters), (1,), generator=generator))]
    noise = torch.randn(chosen.shape, generator=generator)
    chosen.data.lerp_(noise * chosen.data.std(correction=0), 0.3)


def _agree(case: Case) -> bool:
    ours = case.sample()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = case.sample(engine=False)
    return float((ours - modules).abs().max()) < TOLERANCE


@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.parametrize("seed", [int(time.time())] if SOAK else [0])
def test_a_network_that_changes_between_calls_is_followed(seed):
    print(f"seed {seed}")
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    case, end = Case(), time.monotonic() + SECONDS
    for i in range(CHANGES_MADE):
        if time.monotonic() > end:
            print(f"{i} changes")
            break
        what = choose.choice([*REPEATABLE, "noise", "copy", "other"])
        if what == "noise":
            _noise(case.network, generator)
        elif what == "copy":
            case.network = COPIES[choose.choice(sorted(COPIES))](case.network)
        elif what == "other":  # of what is run as a module: on a copy, which ends with it
            changed = Case()
            changed.network = copy.deepcopy(case.network)
            name = choose.choice(sorted(set(CHANGES) - FOLLOWED))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                undo = CHANGES[name](changed.network)
                try:
                    assert _agree(changed), f"seed {seed}, change {i}: {name}"
                finally:
                    if undo is not None:
                        undo()
        else:
            CHANGES[what](case.network)
        assert _agree(case), f"seed {seed}, change {i}: {what}"
        if i % 100 == 99:
            ways = [in_a_thread] if torch.get_num_threads() > 1 else [in_a_thread, in_a_fork]
            assert torch.equal(choose.choice(ways)(case.sample), case.sample())


@pytest.mark.slow
def test_many_threads_go_on_for_long_while_other_networks_are_changed():
    shared, names = Case(), [name for name in ENTRIES if name != "training"]
    alone = {name: ENTRIES[name](shared) for name in names}
    end, wrong = time.monotonic() + (min(SECONDS, 120) if SOAK else 5), []

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
            if float((ours - modules).abs().max()) > TOLERANCE:
                wrong.append("changed network")

    threads = [threading.Thread(target=use, args=(i,)) for i in range(6)]
    threads += [threading.Thread(target=change, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

"""Calls in many threads on one network have the results of single calls, to the bit."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from matrix import ENTRIES, Case, in_a_fork
from torch import Tensor

from iddpm_ext import sample
from iddpm_ext.engines.choosing import PlainNetwork
from iddpm_ext.engines.cpu.engine import CPUEngine
from iddpm_ext.engines.kept import kept_of
from iddpm_ext.sampling.loop import network_of
from iddpm_ext.sampling.request import make_request


def at_once(calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """The results of calls that begin together, each in a thread of its own."""
    results: list[Tensor | BaseException] = [RuntimeError("not run")] * len(calls)
    ready = threading.Barrier(len(calls))

    def work(i: int) -> None:
        ready.wait()
        try:
            results[i] = calls[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if isinstance(result, Tensor)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"engine": False}, {"engine": False, "backend": "reference"}]
)
def test_threads_that_sample_from_one_network_get_their_own_images(options, training):
    model = Case().network.train(training)

    def draw(seed: int) -> Tensor:
        options_of = {**options, "labels": [seed % 3], "seed": seed, "progress": False}
        return sample(model, 5, **options_of)

    alone = [draw(seed) for seed in range(8)]
    together = at_once([lambda seed=seed: draw(seed) for seed in range(8)])
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert all(module.training == training for module in model.modules())


def test_threads_may_run_different_functions_on_one_network():
    case = Case()
    names = [name for name in ENTRIES if name != "training"]
    alone = [ENTRIES[name](case) for name in names]
    together = at_once([lambda name=name: ENTRIES[name](case) for name in names])
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_two_chains_may_be_walked_in_turn_with_weights_changed_between():
    """A call uses the weights that the network had when the call began."""
    model = Case().network
    request = make_request("sample", model, 4, labels=[0, 1], progress=False)
    first = network_of(request)
    changed = copy.deepcopy(model)
    for p in (*model.parameters(), *changed.parameters()):
        p.data.mul_(0.5)
    second = network_of(request)
    fresh = network_of(make_request("sample", changed, 4, labels=[0, 1], progress=False))
    x, t = Case().given["noise"], torch.tensor([7.0, 20.0])
    labels = torch.tensor([0, 1])
    old = network_of(make_request("sample", Case().network, 4, labels=[0, 1], progress=False))
    for network in (first, second):
        assert isinstance(network, CPUEngine)
    assert torch.equal(first.at(x, t, labels), old.at(x, t, labels))
    assert torch.equal(second.at(x, t, labels), fresh.at(x, t, labels))


def test_memory_is_given_back_when_a_call_ends_or_is_left():
    model = Case().network
    request = make_request("sample", model, 4, labels=[0, 1], progress=False)
    network = network_of(request)
    assert isinstance(network, CPUEngine)
    program, memory = network.program, network._memory
    another = network_of(request)
    assert isinstance(another, CPUEngine)
    assert another.program is program and another._memory is not memory
    del network, another
    gc.collect()
    assert any(idle is memory for idle in program._idle)


def test_a_network_that_is_let_go_takes_its_programs_along():
    model = Case().network
    sample(model, 2, labels=[0], progress=False)
    program = weakref.ref(next(iter(kept_of(model)._programs.values())))
    del model
    gc.collect()
    assert program() is None


def test_few_programs_are_kept_and_those_in_use_again_are_found():
    model = Case().network
    weight = model.out[2].weight
    found = []
    for factor in (1.0, 2.0, 0.5, 1.5):
        weight.data.mul_(factor)
        sample(model, 2, labels=[0], progress=False)
        found.append(next(reversed(kept_of(model)._programs.values())))
        assert len(kept_of(model)._programs) <= 2
    assert found[0] is found[2] and found[1] is not found[0]


def test_a_program_that_was_built_amid_a_change_is_not_kept(monkeypatch):
    from iddpm_ext.engines.cpu import program

    wanted = Case().sample()
    case, build = Case(), program.Projections

    def written_to(model: torch.nn.Module) -> object:
        case.network.out[2].weight.data.mul_(-1)
        return build(model)

    monkeypatch.setattr(program, "Projections", written_to)
    case.sample()
    monkeypatch.undo()
    case.network.out[2].weight.data.mul_(-1)
    assert torch.equal(case.sample(), wanted)


def test_evaluation_mode_ends_when_the_last_of_two_evaluations_ends():
    """The first one to end must not put the other one's network back into training mode."""
    model = Case().network.train()
    entered, leave, seen = threading.Event(), threading.Event(), []
    spec = make_request("sample", model, 4, labels=[0], engine=False).spec

    def wait(module: torch.nn.Module, args: object) -> None:
        if threading.current_thread().name == "slow":
            entered.set()
            leave.wait(60)
            seen.append([m.training for m in module.modules()])

    model.register_forward_pre_hook(wait)
    x, t, y = Case().given["noise"][:1], torch.tensor([3.0]), torch.tensor([0])
    slow = threading.Thread(target=lambda: PlainNetwork(spec).at(x, t, y), name="slow")
    slow.start()
    entered.wait(60)
    PlainNetwork(spec).at(x, t, y)
    leave.set()
    slow.join()
    assert not any(seen[0])
    assert all(module.training for module in model.modules())


def test_a_process_forked_after_a_team_was_at_work_goes_on_with_one_thread():
    case = Case()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        here = case.sample()

        def child() -> Tensor:
            with pytest.warns(RuntimeWarning, match="sample: this process was forked"):
                return case.sample()

        assert torch.equal(in_a_fork(child), here)
    finally:
        torch.set_num_threads(before)


def test_a_lock_that_another_thread_held_is_free_in_a_forked_process():
    case = Case()
    here = case.sample()
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with kept_of(case.network)._lock:
            held.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    try:
        assert torch.equal(in_a_fork(case.sample), here)
    finally:
        leave.set()
        thread.join()

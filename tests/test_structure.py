"""What tells that a network is still what its configuration says: dictionaries compared by identity."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest

from iddpm_ext import _native
from iddpm_ext.engines.structure import Entries

Tables = list[dict[str, Any]]


def tables() -> Tables:
    class Own:
        def __init__(self) -> None:  # whose dictionary shares its keys with others of the class
            self.a, self.b = [1.5], [2.5]

    return [Own().__dict__, {}, OrderedDict(), {"a": None, "b": [0]}, OrderedDict(a=[1])]


def replace(t: Tables) -> None:
    t[0]["a"] = [1.5]  # equal, and another object


def exchange(t: Tables) -> None:
    t[0]["a"], t[0]["b"] = t[0]["b"], t[0]["a"]


def rename(t: Tables) -> None:
    t[3]["c"] = t[3].pop("b")


CHANGES: dict[str, Callable[[Tables], Any]] = {
    "replaced": replace,
    "exchanged": exchange,
    "renamed": rename,
    "reordered": lambda t: t[3].update(a=t[3].pop("a")),
    "an entry more": lambda t: t[0].update(forward=[]),
    "an entry of an empty one": lambda t: t[1].update(a=t[0]["a"]),
    "an entry of an empty ordered one": lambda t: t[2].update(a=1),
    "an entry more at the end": lambda t: t[4].update(b=1),
    "an entry fewer": lambda t: t[0].pop("b"),
    "all entries fewer": lambda t: t[3].clear(),
    "an entry fewer at the end": lambda t: t[4].clear(),
    "None replaced": lambda t: t[3].update(a=0),
}


@pytest.fixture(params=["native", "python"])
def way(request, monkeypatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(_native, "cpu_absence", lambda: "not here")
    elif _native.cpu_absence() is not None:
        pytest.skip("needs iddpm_ext._C")


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_dictionary_is_seen(change, way):
    given = tables()
    entries = Entries(given)
    assert entries.hold()
    CHANGES[change](given)
    assert not entries.hold()


def test_what_is_put_back_is_as_it_was(way):
    given = tables()
    entries = Entries(given)
    last = given[4].pop("a")
    given[4]["a"] = last
    given[1]["a"] = 1
    del given[1]["a"]
    assert entries.hold()
    assert Entries([]).hold()

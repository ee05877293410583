"""The calls of the CUDA runtime in a capture, in order, recorded by a fake runtime."""

from __future__ import annotations

import contextlib

import pytest
import torch

from iddpm_ext.engines.cuda.graphs import CaptureFailed, Graphs


class Runtime:
    """A substitute for `torch.cuda` that records calls and has a current stream."""

    def __init__(self, monkeypatch):
        self.calls: list[str] = []
        self.main = self.current = Stream(self, "main")
        self.capturing, self.failure = False, None
        self.streams = 0
        for name, value in {
            "device": lambda device: contextlib.nullcontext(),
            "current_stream": lambda device=None: self.current,
            "Stream": self.new_stream,
            "stream": self.on_stream,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "CUDAGraph": lambda: Graph(self),
            "graph_pool_handle": lambda: "pool",
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def new_stream(self):
        self.streams += 1
        return Stream(self, f"side{self.streams}")

    @contextlib.contextmanager
    def on_stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        self.calls.append(f"begin {pool} {capture_error_mode}")
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.calls.append("end")
            if self.failure:  # as PyTorch does, without giving the stream back
                raise RuntimeError("capture invalidated")
            self.current = before

    def work(self):
        self.calls.append(f"work on {self.current.name}")
        if self.failure and self.calls.count(self.calls[-1]) == 3:
            raise RuntimeError(f"{self.failure}\nmore words")


class Stream:
    def __init__(self, runtime, name):
        self.runtime, self.name = runtime, name

    def wait_stream(self, other):
        self.runtime.calls.append(f"{self.name} waits for {other.name}")


class Graph:
    def __init__(self, runtime):
        self.runtime = runtime

    def replay(self):
        self.runtime.calls.append(f"replay on {self.runtime.current.name}")


@pytest.fixture
def runtime(monkeypatch) -> Runtime:
    return Runtime(monkeypatch)


def test_work_is_tried_out_on_a_side_stream_and_captured_there(runtime):
    replay = Graphs(torch.device("cuda")).capture(runtime.work)
    assert runtime.calls == [
        "side1 waits for main",
        "work on side1",
        "work on side1",
        "main waits for side1",
        "begin pool thread_local",
        "work on side1",
        "end",
    ]
    assert runtime.current is runtime.main
    replay()
    with runtime.on_stream(runtime.new_stream()):
        replay()
    assert runtime.calls[-2:] == ["replay on main", "replay on side2"]


def test_a_failed_capture_gives_its_first_reason_and_the_stream_back(runtime):
    runtime.failure = "operation not permitted"
    with pytest.raises(CaptureFailed) as failed:
        Graphs(torch.device("cuda")).capture(runtime.work)
    assert str(failed.value) == "operation not permitted"
    assert runtime.current is runtime.main


def test_an_error_before_the_capture_is_passed_on(runtime):
    def work():
        raise RuntimeError("the kernel's own")

    with pytest.raises(RuntimeError, match="the kernel's own") as failed:
        Graphs(torch.device("cuda")).capture(work)
    assert not isinstance(failed.value, CaptureFailed)


def test_a_use_on_another_stream_waits_for_the_one_before(runtime):
    graphs = Graphs(torch.device("cuda"))
    graphs.follow()
    graphs.follow()
    assert runtime.calls == []
    runtime.current = Stream(runtime, "other")
    graphs.follow()
    graphs.follow()
    assert runtime.calls == ["other waits for main"]

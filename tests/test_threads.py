"""Kernels give the same bits with any number of threads, in forked children and with flush-to-zero."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from iddpm_ext import Diffusion, UNet, UNetConfig, _native, sample
from iddpm_ext.engines.cpu.engine import CPUEngine
from iddpm_ext.ops import adamw_ema, conv3x3, group_norm_silu, q_sample, qkv_attention

pytestmark = pytest.mark.skipif(_native.cpu_absence() is not None, reason="no compiled module")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def flush() -> Iterator[None]:
    """Subnormal numbers are zero on this thread; the team's other threads are there before."""
    x = torch.ones(1, 32, 64, 64)
    group_norm_silu(x, 32, torch.ones(32), torch.ones(32), backend="cpu")
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush")
    yield
    torch.set_flush_denormal(False)


def model() -> UNet:
    torch.manual_seed(0)
    config = UNetConfig(
        image_size=16,
        in_channels=3,
        out_channels=6,
        model_channels=32,
        num_res_blocks=1,
        channel_mult=(1, 2),
        attention_resolutions=(8,),
        num_heads=2,
        dropout=0.0,
    )
    network = UNet(config).eval().requires_grad_(False)
    network.diffusion = Diffusion("cosine", 100)
    return network


class Work:
    """The engine, and ops that are large enough for a team."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = model()
        self.engine = self.engine_of(2)
        self.images = torch.randn(3, 3, 16, 16)
        self.x = torch.randn(2, 32, 64, 48)
        self.last = self.x.contiguous(memory_format=torch.channels_last)
        self.filters, self.qkv = torch.randn(32, 32, 3, 3), torch.randn(2, 3 * 64, 256)
        self.ones, self.zeros = torch.ones(32), torch.zeros(32)

    def engine_of(self, threads: int) -> CPUEngine:
        engine = CPUEngine(self.model, 3, num_threads=threads)
        engine.begin(torch.tensor([50.0]))
        return engine

    def compute(self) -> list[Tensor]:
        return [
            self.engine(self.images, 0).clone(),
            group_norm_silu(self.x, 32, self.ones, self.zeros, backend="cpu"),
            group_norm_silu(self.last, 32, self.ones, self.zeros, backend="cpu"),
            conv3x3(self.last, self.filters, self.zeros, backend="cpu"),
            qkv_attention(self.qkv, 2, backend="cpu"),
        ]

    def sample(self) -> Tensor:
        return sample(self.model, 2, n=3, progress=False)


def _send(connection: multiprocessing.connection.Connection, work: Work) -> None:
    results = work.compute()
    torch.set_num_threads(1)  # as PyTorch wants of forked children for its own ops
    connection.send([t.numpy() for t in (*results, work.sample())])


def test_a_forked_child_of_a_process_that_used_threads_computes_the_same():
    work = Work()
    expected = [*work.compute(), work.sample()]
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(theirs, work))
    child.start()
    theirs.close()
    try:
        # A child that waited for its parent's threads would wait forever.
        assert ours.poll(20), "the child hangs"
        got = ours.recv()
    finally:
        child.kill()
        child.join()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(torch.from_numpy(a), b)


def test_the_number_of_threads_changes_no_bit():
    work = Work()
    several = [*work.compute(), work.sample()]
    torch.set_num_threads(1)
    work.engine = work.engine_of(1)
    for a, b in zip([*work.compute(), work.sample()], several, strict=True):
        assert torch.equal(a, b)


def test_every_thread_flushes_as_the_caller_does(flush):
    x_0 = torch.full((2, 3, 128, 128), 1.2e-38)  # times sqrt(alpha_bar): subnormal
    table, t = Diffusion("cosine", 100).table("cpu"), torch.full((2,), 60)
    x_t = q_sample(x_0, t, table, torch.zeros_like(x_0), backend="cpu")
    assert x_t.eq(0).all()
    torch.set_flush_denormal(False)
    assert q_sample(x_0, t, table, torch.zeros_like(x_0), backend="cpu").gt(0).all()


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_subnormal_half_precision_is_read_alike_with_flushing(isa, flush):
    native = _native.native()
    if isa not in native.build_info()["isa_available"]:
        pytest.skip(f"this CPU has no {isa}")
    grad = torch.arange(-1030, 1031, dtype=torch.int16).abs().view(torch.float16)
    first = torch.zeros(grad.numel())
    state = [torch.zeros(grad.numel()) for _ in range(3)]
    previous = native.set_isa(isa)
    try:
        adamw_ema(
            [state[0]], [grad], [first], [state[1]], [[state[2]]],
            step=1, lr=1e-3, betas=(0.0, 0.999), eps=1e-8, weight_decay=0.0, decays=[0.9],
            backend="cpu",
        )  # fmt: skip
    finally:
        native.set_isa(previous)
    torch.testing.assert_close(first, grad.float(), rtol=0, atol=0)

"""The checksum of a model's weights, and what a program that is kept is told apart by."""

from __future__ import annotations

import pytest
import torch

from iddpm_ext import _native
from iddpm_ext.engines.weights import checksum, checksum_reference, content_of

needs_native = pytest.mark.skipif(_native.cpu_absence() is not None, reason="needs iddpm_ext._C")


def tensors() -> list[torch.Tensor]:
    """Of every size of the end of a range, aligned and not, and one that several threads share."""
    generator = torch.Generator().manual_seed(0)
    sizes = (0, 1, 2, 3, 31, 32, 33, 1000, 300_001)
    found = [torch.randn(size, generator=generator) for size in sizes]
    found += [
        torch.randn(77, generator=generator)[3:70],
        torch.randn(9, generator=generator).half(),
    ]
    return [
        *found,
        torch.randn(5, generator=generator).double(),
        torch.arange(21, dtype=torch.uint8),
    ]


@needs_native
@pytest.mark.parametrize(
    "isa", _native.native().build_info()["isa_available"] if _native.cpu_absence() is None else []
)
@pytest.mark.parametrize("threads", [1, 2])
def test_every_instruction_set_and_team_computes_the_definition(isa, threads):
    if isa not in _native.native().build_info()["isa_available"]:
        pytest.skip(f"this CPU has no {isa}")
    given, before = tensors(), torch.get_num_threads()
    previous = _native.native().set_isa(isa)
    torch.set_num_threads(threads)
    try:
        assert checksum(given) == checksum_reference(given)
    finally:
        torch.set_num_threads(before)
        _native.native().set_isa(previous)


@needs_native
def test_the_cuda_kernel_computes_the_definition():
    from cuda_emu import toolchain

    if toolchain.absence() is not None:
        pytest.skip(f"no emulator: {toolchain.absence()}")
    from array import array

    from cuda_emu import emulator

    given, total = tensors(), torch.zeros(1, dtype=torch.int64)
    given += [torch.full((i,), float(i)) for i in range(1, 130)]  # more than one launch takes
    table = array("q", [n for t in given for n in (t.data_ptr(), t.numel() * t.element_size())])
    with emulator.emulated_cuda():
        address = table.buffer_info()[0]
        assert not _native.native().checksum_cuda(len(given), address, total.data_ptr(), 0)
    assert int(total) % (1 << 64) == checksum_reference(given)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.data.mul_(0.999),
        lambda w: w.data.neg_(),
        lambda w: w.data.view(torch.int32)[7, 5].add_(1),
        lambda w: w.data.copy_(w.data.flip(0)),
        lambda w: setattr(w, "data", w.data.t()),
        lambda w: setattr(w, "data", w.data.half()),
        lambda w: w.data.copy_(w.data.roll(1, 1)),
    ],
)
def test_every_way_to_write_to_a_parameter_is_seen(change):
    weight = torch.nn.Parameter(torch.randn(16, 16))
    other = torch.nn.Parameter(torch.randn(4))
    before = content_of([weight, other])
    assert content_of([weight, other]) == before
    change(weight)
    assert content_of([weight, other]) != before


def test_exchanged_tensors_and_words_are_seen():
    a, b = torch.randn(64), torch.randn(64)
    assert checksum([a, b]) != checksum([b, a])
    swapped = a.clone()
    swapped[[2, 10]] = swapped[[10, 2]]
    assert checksum([a]) != checksum([swapped])
    zeros = [torch.zeros(4), torch.zeros(4)]
    assert checksum(zeros) != checksum([torch.zeros(8)])


def test_memory_with_gaps_is_read_as_the_numbers_that_it_holds():
    wide = torch.randn(8, 8)
    part = wide[:, ::2]
    before = content_of([part])
    wide[:, 1].zero_()
    assert content_of([part]) == before
    wide[3, 2] += 1
    assert content_of([part]) != before

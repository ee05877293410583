"""The AMX kernels against float64 of the rounded operands: natively where they are, and emulated.

Memory that must not be read is NaN, so that a missing halo or a row too many is noticed.
"""

from __future__ import annotations

import copy
import math
import os
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm_ext import UNet, UNetConfig, _native
from iddpm_ext.engines.cpu import operands, pack
from iddpm_ext.engines.cpu import rows as ops
from iddpm_ext.engines.cpu.algorithms import Chooser, ConvShape, load_chooser
from iddpm_ext.engines.cpu.engine import CPUEngine
from iddpm_ext.ops import conv3x3, group_norm_silu, qkv_attention

pytestmark = [
    pytest.mark.skipif(_native.cpu_absence() is not None, reason="needs iddpm_ext._C"),
    pytest.mark.skipif(
        platform.machine() != "x86_64" or _native.native().build_info()["isa"] == "base",
        reason="needs AVX2",
    ),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["native", "emulated"])
def tiles(request):
    native = _native.native()
    if request.param == "native":
        if native.build_info()["isa"] != "amx":
            pytest.skip(native.build_info()["amx"] or "another instruction set is in use")
        yield
        return
    assert native.emulate_amx(True)
    yield
    native.emulate_amx(False)


def run(rows: list[ops.Row], n: int, threads: int = 1, table: Tensor | None = None) -> int:
    plan = torch.tensor(rows, dtype=torch.int64)
    shared, scratch = torch.full((1 << 18,), math.nan), torch.full((threads, 1 << 18), math.nan)
    starts = torch.arange(n) * (0 if table is None else table.shape[1])
    return _native.native().unet_engine(
        plan.data_ptr(),
        len(rows),
        n,
        threads,
        0,
        0,
        0 if table is None else table.data_ptr(),
        starts.data_ptr(),
        shared.data_ptr(),
        shared.numel(),
        scratch.data_ptr(),
        1 << 18,
    )


def buffer(t: Tensor) -> ops.Buffer:
    """t [..., pixels, C], possibly the first channels of a wider tensor."""
    return ops.Buffer(t.data_ptr(), t.stride(-2))


def wide(*shape: int) -> Tensor:
    """NaN-filled [*shape], a slice of a tensor with more channels."""
    return torch.full((*shape[:-1], shape[-1] + 32), math.nan)[..., : shape[-1]]


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)


def rounded(x: Tensor) -> Tensor:
    """As bfloat16, in float64."""
    return x.bfloat16().double()


def error(ours: Tensor, truth: Tensor) -> float:
    """max over max; NaN counts as infinite."""
    gap = ((ours.double() - truth).abs().max() / truth.abs().max()).item()
    return math.inf if math.isnan(gap) else gap


class Memory:
    """NaN-filled memory of an operand image."""

    def __init__(self, layout: operands.Layout):
        self.layout = layout
        self.halves = torch.full((2 * layout.floats,), math.nan, dtype=torch.bfloat16)
        self._maps: list[Tensor] = []

    def operand(self, taps=((0, 0, 0),), out=None) -> ops.Operand:
        self._maps.append(self.layout.map(taps, out))
        return ops.Operand(self.halves[self.layout.first :].data_ptr(), self._maps[-1])


SIZES = [(1, 32, 32), (2, 28, 28), (3, 14, 10), (2, 7, 7), (3, 8, 8), (5, 4, 4), (1, 1, 2)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("n", "height", "width"), SIZES)
@pytest.mark.parametrize(("channels", "columns"), [(32, 32), (160, 48), (128, 64)])
def test_a_convolution_rounds_its_operands_and_nothing_else(
    tiles, threads, n, height, width, channels, columns
):
    x, w = torch.randn(n, channels, height, width), torch.randn(columns, channels, 3, 3)
    b, residual = torch.randn(columns), torch.randn(n, columns, height, width)
    image = Memory(operands.Layout((height, width), channels, n))
    source, add, out = nhwc(x), nhwc(residual), wide(n * height * width, columns)
    weight, bias = pack.pack_tiles(w.flatten(2)), pack.pack_vector(b)
    into, of = image.operand(), image.operand(operands.CONVOLUTION)
    rows = [ops.round_row((height, width), buffer(source), channels, into)]
    for extra in (None, buffer(add)):
        rows = rows[:1]
        rows.append(
            ops.tile_product_row(
                of,
                -(-channels // 32),
                columns,
                weight,
                bias,
                buffer(out),
                extra,
            )
        )
        assert run(rows, n, threads) == 0
        truth = F.conv2d(rounded(x), rounded(w), b.double(), padding=1)
        truth = nhwc(truth + residual if extra else truth).reshape(out.shape)
        assert error(out, truth) < 1e-6


@pytest.mark.parametrize(("n", "height", "width"), [(1, 32, 32), (2, 14, 10), (3, 7, 7), (2, 8, 3)])
def test_stride_2_reads_even_and_odd_pixels(tiles, n, height, width):
    channels, columns = 64, 32
    x, w, b = (
        torch.randn(n, channels, height, width),
        torch.randn(columns, channels, 3, 3),
        torch.randn(columns),
    )
    size = (-(-height // 2), -(-width // 2))
    image = Memory(operands.Layout(size, channels, n, phases=4))
    source, out = nhwc(x), wide(n * size[0] * size[1], columns)
    weight, bias = pack.pack_tiles(w.flatten(2)), pack.pack_vector(b)
    rows = [
        ops.round_row(
            *((height, width), buffer(source), channels, image.operand()), phase=image.layout.image
        ),
        ops.tile_product_row(
            image.operand(operands.STRIDED),
            channels // 32,
            columns,
            weight,
            bias,
            buffer(out),
        ),
    ]
    assert run(rows, n) == 0
    truth = F.conv2d(rounded(x), rounded(w), b.double(), stride=2, padding=1)
    assert error(out, nhwc(truth).reshape(out.shape)) < 1e-6


@pytest.mark.parametrize(("n", "height", "width"), [(1, 16, 16), (3, 7, 5), (2, 4, 4)])
def test_a_doubled_image_is_convolved_in_four_phases(tiles, n, height, width):
    channels, columns = 32, 64
    x, w, b = (
        torch.randn(n, channels, height, width),
        torch.randn(columns, channels, 3, 3),
        torch.randn(columns),
    )
    image = Memory(operands.Layout((height, width), channels, n))
    source, out = nhwc(x), wide(n * 4 * height * width, columns)
    bias = pack.pack_vector(b)
    weights = [pack.pack_tiles(operands.doubled_filter(w, phase)) for phase in range(4)]
    rows = [ops.round_row((height, width), buffer(source), channels, image.operand())]
    for phase, weight in enumerate(weights):
        first = out[phase // 2 * 2 * width + phase % 2 :]
        of = image.operand(operands.doubled_taps(phase), (2, 4 * width, 4 * height * width))
        rows.append(ops.tile_product_row(of, 1, columns, weight, bias, buffer(first)))
    assert run(rows, n) == 0
    doubled = F.interpolate(rounded(x), scale_factor=2, mode="nearest")
    truth = F.conv2d(doubled, w.double(), b.double(), padding=1)
    assert error(out, nhwc(truth).reshape(out.shape)) < 4e-3  # sums of taps are rounded
    # Each phase alone, exactly.
    for phase in range(4):
        down, right = phase // 2, phase % 2
        padded = F.pad(rounded(x), (1 - right, right, 1 - down, down))
        kernel = rounded(operands.doubled_filter(w, phase)).unflatten(2, (2, 2))
        part = nhwc(F.conv2d(padded, kernel, b.double()))
        ours = out.reshape(n, 2 * height, 2 * width, columns)[:, down::2, right::2]
        assert error(ours, part) < 1e-6


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("n", "size", "depth", "columns"), [(3, (7, 7), 96, 48), (1, (3, 5), 32, 32)]
)
def test_a_linear_layer_of_split_operands_keeps_16_bits(tiles, threads, n, size, depth, columns):
    pixels = size[0] * size[1]
    a, w, b = torch.randn(n * pixels, depth), torch.randn(columns, depth), torch.randn(columns)
    out, bias = wide(n * pixels, columns), pack.pack_vector(b)
    for split, limit in ((False, 1e-6), (True, 2e-5)):
        image = Memory(operands.Layout(size, depth, n, halo=False, phases=1 + split))
        taps = ((0, 0, 0), (0, 0, 1), (0, 0, 0)) if split else ((0, 0, 0),)
        weight = pack.pack_tiles(pack.split_products(w) if split else w[..., None])
        rest = image.layout.image if split else 0
        rows = [
            ops.round_row(size, buffer(a), depth, image.operand(), rest=rest),
            ops.tile_product_row(
                image.operand(taps), depth // 32, columns, weight, bias, buffer(out)
            ),
        ]
        assert run(rows, n, threads) == 0
        truth = a.double() @ w.double().T if split else rounded(a) @ rounded(w).T
        assert error(out, truth + b) < limit


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mode", [None, 0, 1])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (10, 12)])
def test_normalisation_writes_the_operand_of_a_convolution(tiles, threads, mode, height, width):
    n, channels, columns = 2, 64, 32
    x = 3 + torch.randn(n, channels, height, width)
    weight, bias = torch.randn(channels), torch.randn(channels)
    table = torch.randn(n, channels * (1 + (mode or 0)))
    w = torch.zeros(columns, channels, 3, 3)
    w[torch.arange(columns), torch.arange(columns), 1, 1] = 1  # picks the first channels
    image = Memory(operands.Layout((height, width), channels, n))
    source, out = nhwc(x), wide(n * height * width, columns)
    packed = pack.pack_tiles(w.flatten(2))
    rows = [
        ops.group_norm_row(
            height * width, buffer(source), channels, 32, weight, bias, image.operand(),
            eps=1e-5, silu=mode is not None, embedding=-1 if mode is None else 0,
            scale_shift=mode == 1,
        ),
        ops.tile_product_row(
            image.operand(operands.CONVOLUTION), channels // 32, columns, packed, None, buffer(out)
        ),
    ]  # fmt: skip
    assert run(rows, n, threads, table) == 0
    e = table.double()[..., None, None]
    y = x.double() + e if mode == 0 else x.double()
    y = F.group_norm(y, 32, weight.double(), bias.double())
    if mode == 1:
        y = y * (1 + e[:, :channels]) + e[:, channels:]
    y = y if mode is None else F.silu(y)
    gap = (out - nhwc(y)[..., :columns].reshape(out.shape)).abs()
    assert (gap <= 2**-8 * nhwc(y)[..., :columns].reshape(out.shape).abs() + 1e-6).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("size", "heads", "width"),
    [((16, 16), 4, 16), ((7, 7), 2, 24), ((4, 4), 3, 8), ((8, 8), 1, 96)],
)
def test_attention_is_softmax_of_the_legacy_order(tiles, threads, size, heads, width):
    n, tokens = 2, size[0] * size[1]
    qkv = torch.randn(n, tokens, heads, 3, width)
    image = Memory(operands.Layout(size, heads * width, n, halo=False))
    out = image.operand()
    row = ops.attention_row(tokens, heads, width, buffer(qkv.flatten(2)), out)
    assert run([row], n, threads) == 0
    q, k, v = qkv.double().unbind(3)
    scores = torch.einsum("bthc,bshc->bhts", q, k) / math.sqrt(width)
    truth = torch.einsum("bhts,bshc->bthc", scores.softmax(-1), v).flatten(2)
    ours = image.halves.unflatten(0, (-1, image.layout.pitch))[: n * tokens, : heads * width]
    assert error(ours.reshape(truth.shape), truth) < 1.5e-2


def test_a_tap_too_far_or_a_pair_in_the_wrong_order_would_show(tiles):
    """The references above detect such errors: these wrong products are far from the right one."""
    n, channels, columns, size = 1, 32, 32, (6, 16)
    x, w = torch.randn(n, channels, *size), torch.randn(columns, channels, 3, 3)
    truth = nhwc(F.conv2d(rounded(x), rounded(w), padding=1)).reshape(-1, columns)
    weight = pack.pack_tiles(w.flatten(2))
    swapped = weight.flip(-1).contiguous()
    shifted = (*operands.CONVOLUTION[1:], operands.CONVOLUTION[0])
    for taps, packed in ((shifted, weight), (operands.CONVOLUTION, swapped)):
        image, source, out = Memory(operands.Layout(size, channels, n)), nhwc(x), wide(96, columns)
        rows = [
            ops.round_row(size, buffer(source), channels, image.operand()),
            ops.tile_product_row(image.operand(taps), 1, columns, packed, None, buffer(out)),
        ]
        assert run(rows, n) == 0
        assert error(out, truth) > 0.1


def half_an_ulp(ours: Tensor, truth: Tensor) -> bool:
    """Whether `ours` is bfloat16 of what float32 sums give for `truth`."""
    gap = (ours.double() - truth).abs()
    return bool((gap <= 2**-8 * truth.abs() + 1e-6 * truth.abs().max()).all())


def assert_trains_as(expected, leaves, dy, **options):
    """y and the gradients of `conv3x3` are the expected ones, to the bit the same on one thread and two."""
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        y = conv3x3(*leaves, backend="cpu", **options)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    torch.set_num_threads(threads)
    for ours, same in zip(*results, strict=True):
        assert torch.equal(ours, same)
    y, dx, dweight, dbias = results[0]
    assert half_an_ulp(y, expected[0])
    assert half_an_ulp(dx, expected[1])
    assert error(dweight, expected[2]) < 1e-6
    assert error(dbias, expected[3]) < 1e-6


@pytest.mark.parametrize("upscale", [False, True])
@pytest.mark.parametrize(
    ("n", "channels", "columns", "size"),
    [
        (2, 32, 32, (8, 8)),
        (3, 64, 48, (7, 9)),
        (1, 16, 80, (14, 14)),
        (2, 48, 16, (1, 3)),
        (17, 96, 32, (4, 4)),
    ],
)
def test_training_convolves_rounded_operands(tiles, upscale, n, channels, columns, size):
    x = torch.randn(n, channels, *size).bfloat16().contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(columns, channels, 3, 3), torch.randn(columns)
    dy = torch.randn(n, columns, *(s << upscale for s in size)).bfloat16()
    leaves = [v.requires_grad_() for v in (x, weight, bias)]
    exact = [v.detach().double().requires_grad_() for v in (x, weight.bfloat16(), bias)]
    truth = conv3x3(*exact, upscale=upscale, backend="reference")
    expected = [truth, *torch.autograd.grad(truth, exact, dy.double())]
    assert_trains_as(expected, leaves, dy, upscale=upscale)


@pytest.mark.parametrize("pitch", [0, 16])
@pytest.mark.parametrize(
    ("n", "channels", "columns", "size"),
    [
        (2, 32, 32, (8, 8)),  # read in place
        (1, 64, 48, (1, 16)),
        (3, 64, 16, (7, 5)),
        (1, 16, 80, (4, 4)),
        (40, 96, 64, (16, 16)),  # several blocks of the gradient's sum
        (1, 32, 32, (1, 1)),
    ],
)
def test_training_convolves_by_one_tap(tiles, n, channels, columns, size, pitch):
    wide = torch.full((n, *size, channels + pitch), math.nan).bfloat16()
    wide[..., :channels] = torch.randn(n, *size, channels).bfloat16()
    x = wide.permute(0, 3, 1, 2)[:, :channels]
    weight, bias = torch.randn(columns, channels, 1, 1), torch.randn(columns)
    dy = torch.randn(n, columns, *size).bfloat16()
    leaves = [v.requires_grad_() for v in (x, weight, bias)]
    exact = [v.detach().double().requires_grad_() for v in (x, weight.bfloat16(), bias)]
    truth = F.conv2d(*exact)
    expected = [truth, *torch.autograd.grad(truth, exact, dy.double())]
    assert_trains_as(expected, leaves, dy)


def test_exact_training_rounds_no_weight(tiles):
    x = torch.randn(2, 32, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(32, 32, 3, 3)
    truth = F.conv2d(x.double(), weight.double(), padding=1)
    assert half_an_ulp(conv3x3(x, weight, exact=True, backend="cpu"), truth)
    assert not half_an_ulp(conv3x3(x, weight, backend="cpu"), truth)


def test_filters_that_lie_otherwise_give_the_same(tiles):
    """Taps in a row are read sixteen filters at a time, others one by one."""
    x = torch.randn(2, 32, 5, 6).bfloat16().contiguous(memory_format=torch.channels_last)
    weight, dy = torch.randn(48, 32, 3, 3), torch.randn(2, 48, 5, 6).bfloat16()
    results = []
    for same in (
        weight,
        weight.contiguous(memory_format=torch.channels_last),
        weight.mT.clone().mT,
    ):
        leaves = [x.clone().requires_grad_(), same.requires_grad_()]
        y = conv3x3(*leaves, backend="cpu")
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize(
    ("n", "heads", "width", "tokens", "order"),
    [
        (2, 3, 16, 64, "legacy"),
        (1, 2, 64, 49, "new"),
        (2, 1, 24, 33, "legacy"),
        (1, 2, 8, 1, "legacy"),
        (1, 1, 100, 31, "legacy"),
        (1, 1, 16, 1056, "legacy"),
    ],
)
def test_training_attention_rounds_probabilities_and_slopes_alone(
    tiles, by_token, n, heads, width, tokens, order
):
    """1056 tokens are several blocks of queries in the backward pass, the last a single 32."""

    def laid_out(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT if by_token else x.contiguous()

    qkv = torch.randn(n, 3 * heads * width, tokens).bfloat16()
    dout = laid_out(torch.randn(n, heads * width, tokens).bfloat16())
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        leaf = laid_out(qkv).requires_grad_()
        out = qkv_attention(leaf, heads, order=order, backend="cpu")
        results.append([out, *torch.autograd.grad(out, leaf, dout)])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    out, dqkv = results[0]

    def heads_of(x: Tensor) -> Tensor:  # [N, parts, heads, T, d]
        sizes = (heads, -1, width) if order == "legacy" else (-1, heads, width)
        parts = x.double().unflatten(1, sizes)
        return (parts.transpose(1, 2) if order == "legacy" else parts).mT

    q, k, v = heads_of(qkv).unbind(1)
    upstream = heads_of(dout).squeeze(1)
    p = (q @ k.mT / math.sqrt(width)).softmax(-1)
    dp = upstream @ v.mT
    mean = (p * dp).sum(-1, keepdim=True)
    slope, largest = p * (dp - mean), p * (dp.abs() + mean.abs())
    factor = width**-0.5
    exact = [p @ v, factor * slope @ k, factor * slope.mT @ q, p.mT @ upstream]
    terms = [
        p @ v.abs(), factor * largest @ k.abs(), factor * largest.mT @ q.abs(), p.mT @ upstream.abs(),
    ]  # fmt: skip
    ours = [heads_of(out).squeeze(1), *heads_of(dqkv).unbind(1)]
    # Two roundings of at most 2^-9 of each term, a power of two to 1e-4, and sums in float32.
    for found, truth, term in zip(ours, exact, terms, strict=True):
        assert bool(((found - truth).abs() <= (2**-8 + 4e-4) * term + 1e-6 * term.max()).all())


@pytest.mark.parametrize("channels_last", [True, False])
def test_training_normalises_as_exactly_as_bfloat16_can_tell(tiles, channels_last):
    """Values up to 200 deviations from zero: where the sigmoid is 0 or 1, and between."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 64, 6, 5).bfloat16().contiguous(memory_format=layout).requires_grad_()
    weight, bias = torch.linspace(0.1, 60, 64), torch.linspace(-80, 80, 64)
    leaves = [x, weight.requires_grad_(), bias.requires_grad_()]
    dy = torch.randn(2, 64, 6, 5).bfloat16()
    y = group_norm_silu(x, 32, weight, bias, backend="cpu")
    ours = [y, *torch.autograd.grad(y, leaves, dy)]
    exact = [v.detach().double().requires_grad_() for v in leaves]
    truth = F.silu(F.group_norm(exact[0], 32, *exact[1:]))
    expected = [truth, *torch.autograd.grad(truth, exact, dy.double())]
    assert bool(((y - truth).abs() <= (2**-8 + 2**-12) * truth.abs() + 1e-5).all())
    for found, right in zip(ours[1:], expected[1:], strict=True):
        assert error(found, right) < 2**-8


def network(**options) -> UNet:
    torch.manual_seed(0)
    config = UNetConfig(**{"image_size": 16, "model_channels": 32, "num_res_blocks": 1, **options})
    model = UNet(config).eval().requires_grad_(False)
    for p in model.parameters():
        noise = torch.randn(p.shape)
        p.copy_(noise / p[0].numel() ** 0.5 if p.dim() > 1 else p + 0.1 * noise)
    return model


def worst(model: UNet, engine: CPUEngine, n: int) -> float:
    """Of the outputs at t = 37, 500 and 999, each sample's largest error over its largest output."""
    x, exact, errors = torch.randn(n, 3, *engine.size), copy.deepcopy(model).double(), []
    for moment in (37.0, 500.0, 999.0):
        t = torch.full((n,), moment)
        truth, ours = exact(x.double(), t.double()), engine.at(x, t)
        gaps = (ours - truth).abs().amax((1, 2, 3)) / truth.abs().amax((1, 2, 3))
        errors.append(math.inf if gaps.isnan().any() else gaps.max().item())
    return max(errors)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [(16, 16), (24, 8)])
def test_a_network_is_within_the_bound_of_bfloat16(tiles, threads, size):
    model = network()
    engine = CPUEngine(model, 3, dtype=torch.bfloat16, num_threads=threads, size=size)
    assert worst(model, engine, 3) < 1.2e-2
    assert worst(model, engine, 2) < 1.2e-2  # fewer than the plan was made for


def test_samples_that_pass_a_block_in_groups_give_the_same(tiles, monkeypatch):
    from iddpm_ext.engines.cpu import plan

    model, x, t = network(use_scale_shift_norm=False), torch.randn(3, 3, 16, 16), torch.ones(3)
    together = CPUEngine(model, 3, dtype=torch.bfloat16, num_threads=1)
    monkeypatch.setattr(plan, "_CACHED", 1)
    apart = CPUEngine(model, 3, dtype=torch.bfloat16, num_threads=1)
    assert apart.num_rows > together.num_rows
    for n in (1, 2, 3):
        assert torch.equal(apart.at(x[:n], t[:n]), together.at(x[:n], t[:n]))


def test_bfloat16_never_takes_what_is_slower_than_float32():
    shape, large = ConvShape(16, 16, 64, 64, 8), ConvShape(4, 4, 64, 64, 1)
    amx, slow, fast = Chooser({}, True, False), Chooser({}, False, False), Chooser({}, False, True)
    for s in (shape, large):
        assert amx(s, exact=False, bf16=True).name == "AMX"
        assert fast(s, exact=False, bf16=True).name == "F2 bf16"
        for chooser in (amx, slow, fast):
            assert not chooser(s, exact=False, bf16=False).bf16
            assert not chooser(s, exact=True, bf16=True).bf16
        assert slow(s, exact=False, bf16=True) == slow(s, exact=False, bf16=False)
    # Without AMX, where the time is that of reading weights, as at 8x8 of the CIFAR-10 network.
    weights = ConvShape(8, 8, 256, 256, 1)
    assert slow(weights, exact=False, bf16=True).name == "F2 bf16"
    for more in (replace(weights, batch=8), replace(weights, channels=64)):
        assert not slow(more, exact=False, bf16=True).bf16
    tuned = {"bfloat16": {shape.layer: {8: "AMX"}}, "float32": {shape.layer: {8: "F2"}}}
    assert Chooser(tuned, True, False)(shape, exact=False, bf16=True).name == "AMX"
    assert Chooser(tuned, False, False)(shape, exact=False, bf16=True).name == "F2"
    assert not load_chooser("GenuineIntel-6-143").rounding_pays
    assert load_chooser("GenuineIntel-6-143", tiles=True).rounding_pays
    assert load_chooser("AuthenticAMD-25-17").rounding_pays


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


needs_amx = pytest.mark.skipif(
    _native.cpu_absence() is None and "amx" not in _native.native().build_info()["isa_available"],
    reason="this process may not use AMX",
)


@needs_amx
def test_the_environment_forces_amx_off():
    code = (
        "import torch, iddpm_ext\n"
        "from iddpm_ext import _native\n"
        "print(_native.native().build_info()['isa'], _native.native().has_tiles())"
    )
    assert python(code, IDDPM_ISA="avx512") == "avx512 False"
    assert python(code, IDDPM_ISA="amx") == "amx True"


@needs_amx
def test_a_signal_stack_too_small_for_tiles_means_no_amx_and_says_so():
    code = (
        "import ctypes\n"
        "memory = ctypes.create_string_buffer(6000)\n"
        "class Stack(ctypes.Structure):\n"
        "    _fields_ = [('p', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]\n"
        "stack = Stack(ctypes.addressof(memory), 0, 6000)\n"
        "assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0\n"
        "from iddpm_ext import _native\n"
        "from iddpm_ext.cli import _environment as info\n"
        "print(_native.native().build_info()['isa'])\n"
        "print(info.report())"
    )
    isa, _, report = python(code).partition("\n")
    assert isa == "avx512"
    assert "a signal stack of this process is too small" in report


@needs_amx
def test_onednn_threads_and_forks_share_the_tiles(tmp_path):
    """torch's own bfloat16 products configure tiles too; they must not disturb ours, nor ours them."""
    model, x, t = network(), torch.randn(2, 3, 16, 16), torch.ones(2)
    engine = CPUEngine(model, 2, dtype=torch.bfloat16, num_threads=2)
    a, b = torch.randn(70, 96).bfloat16(), torch.randn(96, 48).bfloat16()
    ours, theirs = engine.at(x, t), a @ b
    for _ in range(3):
        assert torch.equal(a @ b, theirs)
        assert torch.equal(engine.at(x, t), ours)
    single = CPUEngine(model, 2, dtype=torch.bfloat16, num_threads=1)
    child = os.fork()
    if (
        child == 0
    ):  # one thread: OpenMP's team does not survive a fork, and PyTorch would wait for it
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(single.at(x, t), ours) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(engine.at(x, t), ours)

"""Each operation of the CPU engine alone, against float64 PyTorch."""

from __future__ import annotations

import math

import pytest
import rounding
import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm_ext import _native
from iddpm_ext.engines.cpu import pack
from iddpm_ext.engines.cpu import rows as ops

pytestmark = pytest.mark.skipif(_native.cpu_absence() is not None, reason="needs iddpm_ext._C")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["avx512", "avx2"])
def isa(request):
    native = _native.native()
    if request.param not in native.build_info()["isa_available"]:
        pytest.skip(f"this CPU has no {request.param}")
    previous = native.set_isa(request.param)
    yield request.param
    native.set_isa(previous)


def run(rows, n, threads=1, *, x=None, out=None, table=None, shared=1 << 20, scratch=1 << 19):
    plan = torch.tensor(rows, dtype=torch.int64)
    shared = torch.full((shared,), math.nan)
    private = torch.full((threads, scratch), math.nan)
    starts = torch.arange(n) * (0 if table is None else table.shape[1])
    return _native.native().unet_engine(
        plan.data_ptr(),
        len(rows),
        n,
        threads,
        *(0 if t is None else t.data_ptr() for t in (x, out, table)),
        starts.data_ptr(),
        shared.data_ptr(),
        shared.numel(),
        private.data_ptr(),
        scratch,
    )


def buffer(t: Tensor) -> ops.Buffer:
    """t [..., pixels, C], possibly the first channels of a wider tensor."""
    return ops.Buffer(t.data_ptr(), t.stride(-2))


def wide(*shape: int, extra: int = 32) -> Tensor:
    """NaN-filled [*shape], a slice of a tensor with `extra` more channels."""
    return torch.full((*shape[:-1], shape[-1] + extra), math.nan)[..., : shape[-1]]


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)


def error(ours: Tensor, truth: Tensor) -> float:
    """max over max; NaN counts as infinite."""
    gap = ((ours.double() - truth).abs().max() / truth.abs().max()).item()
    return math.inf if math.isnan(gap) else gap


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 32, 32), (49, 27, 64), (130, 96, 48)])
def test_gemm_adds_bias_and_residual(isa, threads, rows, depth, columns):
    n = 2
    a, w, b = torch.randn(n * rows, depth), torch.randn(columns, depth), torch.randn(columns)
    residual, out = torch.randn(n * rows, columns), wide(n * rows, columns)
    weight, bias = pack.pack_matrix(w), pack.pack_vector(b)
    row = ops.gemm_row(rows, buffer(a), depth, columns, weight, bias, buffer(out), buffer(residual))
    assert run([row], n, threads) == 0
    truth = a.double() @ w.double().T + b + residual
    assert error(out, truth) < rounding.of_sums(depth + 2)


needs_bf16 = pytest.mark.skipif(
    _native.cpu_absence() is None and not _native.native().build_info()["bf16"],
    reason="this CPU has no avx512_bf16",
)


def rounded(x: Tensor) -> Tensor:
    """As bfloat16, in float64."""
    return x.bfloat16().double()


@needs_bf16
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 32, 32), (49, 96, 48), (700, 512, 64)])
def test_bfloat16_gemm_rounds_its_operands_and_nothing_else(threads, rows, depth, columns):
    n = 2
    a, w, b = torch.randn(n * rows, depth), torch.randn(columns, depth), torch.randn(columns)
    residual, out = torch.randn(n * rows, columns), wide(n * rows, columns)
    weight, bias = pack.pack_pairs(pack.pack_matrix(w)), pack.pack_vector(b)
    row = ops.gemm_row(rows, buffer(a), depth, columns, weight, bias, buffer(out), buffer(residual))
    assert run([row], n, threads) == 0
    truth = rounded(a) @ rounded(w).T + b + residual
    assert error(out, truth) < rounding.of_sums(depth + 2)


def winograd_of_rounded(x: Tensor, w: Tensor) -> Tensor:
    """F(2x2, 3x3) in float64 but for the transformed operands, which are bfloat16: NCHW."""
    g = pack.filter_transform(2)
    u = rounded(torch.einsum("ia,jb,kcab->ijkc", g, g, w.double()).float())
    b = torch.tensor([[1.0, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]])
    a = torch.tensor([[1.0, 1, 1, 0], [0, 1, -1, 1]]).double()
    height, width = x.shape[2:]
    tiles = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2)).unfold(2, 4, 2).unfold(3, 4, 2)
    v = rounded(torch.einsum("ia,nctuab,jb->ijctun", b, tiles, b))
    m = torch.einsum("ijkc,ijctun->ijktun", u, v)
    y = torch.einsum("pi,qj,ijktun->nktpuq", a, a, m).flatten(4, 5).flatten(2, 3)
    return y[:, :, :height, :width]


@needs_bf16
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("upscale", [0, 1])
@pytest.mark.parametrize(
    ("n", "height", "width", "channels", "columns"),
    [(1, 8, 8, 32, 64), (3, 14, 10, 64, 96), (2, 2, 4, 32, 16), (5, 26, 32, 96, 32)],
)
def test_bfloat16_winograd_rounds_what_it_multiplies_and_nothing_else(
    threads, upscale, n, height, width, channels, columns
):
    x = torch.randn(n, channels, height >> upscale, width >> upscale)
    w, b = torch.randn(columns, channels, 3, 3), torch.randn(columns)
    residual = torch.randn(n, columns, height, width)
    source, add, out = nhwc(x), nhwc(residual), wide(n * height * width, columns)
    weight, bias = pack.pack_pairs(pack.pack_winograd(w, 2)), pack.pack_vector(b)
    row = ops.winograd_row(
        (height, width),
        buffer(source),
        channels,
        columns,
        weight,
        bias,
        buffer(out),
        buffer(add.view(-1, columns)),
        tile=2,
        upscale=upscale,
    )
    assert run([row], n, threads) == 0
    wide_x = F.interpolate(x, scale_factor=1 << upscale, mode="nearest")
    truth = nhwc(winograd_of_rounded(wide_x, w) + b[:, None, None] + residual)
    # Half a unit of bfloat16 where the float32 transform rounds to the other side: rare and small.
    assert error(out.reshape(truth.shape), truth) < 2e-4
    assert (out.reshape(truth.shape) - truth).pow(2).mean().sqrt() < 5e-6 * truth.abs().max()


@needs_bf16
def test_bfloat16_winograd_covers_odd_sizes():
    for size in [(7, 7), (5, 9), (1, 1), (1, 13)]:
        x, w = torch.randn(2, 32, *size), torch.randn(32, 32, 3, 3)
        source, out = nhwc(x), wide(2 * size[0] * size[1], 32)
        weight = pack.pack_pairs(pack.pack_winograd(w, 2))
        row = ops.winograd_row(size, buffer(source), 32, 32, weight, None, buffer(out), tile=2)
        assert run([row], 2) == 0
        truth = nhwc(F.conv2d(x.double(), w.double(), padding=1))
        assert error(out.reshape(truth.shape), truth) < 1e-2


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("upscale", [0, 1])
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize(
    ("n", "height", "width", "channels", "columns"),
    [(1, 8, 8, 32, 64), (3, 14, 10, 64, 96), (2, 2, 4, 32, 16), (8, 16, 16, 32, 32)],
)
def test_winograd_is_the_convolution(
    isa, threads, upscale, tile, n, height, width, channels, columns
):
    x = torch.randn(n, channels, height >> upscale, width >> upscale)
    w, b = torch.randn(columns, channels, 3, 3), torch.randn(columns)
    residual = torch.randn(n, columns, height, width)
    source, add, out = nhwc(x), nhwc(residual), wide(n * height * width, columns)
    weight, bias = pack.pack_winograd(w, tile), pack.pack_vector(b)
    row = ops.winograd_row(
        (height, width),
        buffer(source),
        channels,
        columns,
        weight,
        bias,
        buffer(out),
        buffer(add.view(-1, columns)),
        tile=tile,
        upscale=upscale,
    )
    assert run([row], n, threads) == 0
    wide_x = F.interpolate(x.double(), scale_factor=1 << upscale, mode="nearest")
    truth = nhwc(F.conv2d(wide_x, w.double(), b.double(), padding=1) + residual)
    assert error(out.reshape(truth.shape), truth) < rounding.of_winograd(tile, channels)


@pytest.mark.parametrize("tile", [2, 4])
def test_how_many_tiles_are_transformed_at_a_time_changes_no_result(isa, tile):
    x, w = nhwc(torch.randn(2, 32, 18, 18)), torch.randn(32, 32, 3, 3)
    weight, results = pack.pack_winograd(w, tile), []
    for block in (12, 17, 200):
        out = wide(2 * 18 * 18, 32)
        row = ops.winograd_row(
            (18, 18), buffer(x), 32, 32, weight, None, buffer(out), tile=tile, block=block
        )
        assert run([row], 2) == 0
        results.append(out)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_tiles_fill_the_cache_only_where_weights_do_not_fit_it():
    native = _native.native()
    if native.second_level_bytes() < 2 << 20:
        pytest.skip("needs a second cache level of 2 MiB")
    assert native.winograd_block(2, 64, 64, False) == 48  # as on any other core
    assert native.winograd_block(4, 256, 256, False) >= 36


def test_winograd_covers_odd_sizes(isa):
    for size in [(7, 7), (5, 9), (1, 1), (1, 13)]:
        for tile in (2, 4):
            x, w = torch.randn(2, 32, *size), torch.randn(32, 32, 3, 3)
            source, out = nhwc(x), wide(2 * size[0] * size[1], 32)
            weight = pack.pack_winograd(w, tile)
            row = ops.winograd_row(
                size, buffer(source), 32, 32, weight, None, buffer(out), tile=tile
            )
            assert run([row], 2) == 0
            truth = nhwc(F.conv2d(x.double(), w.double(), padding=1))
            assert error(out.reshape(truth.shape), truth) < rounding.of_winograd(tile, 32)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("channels", "columns", "stride", "upscale", "size"),
    [(3, 32, 1, 0, (9, 6)), (1, 16, 1, 0, (28, 28)), (32, 64, 2, 0, (8, 6)), (32, 32, 1, 1, (3, 5))]
    + [(32, 32, 2, 0, (7, 7))],
)
def test_conv_gathers_stride_and_upsampling(isa, threads, channels, columns, stride, upscale, size):
    n = 2
    x, w = torch.randn(n, channels, *size), torch.randn(columns, channels, 3, 3)
    b = torch.randn(columns)
    wide_x = F.interpolate(x.double(), scale_factor=1 << upscale, mode="nearest")
    truth = nhwc(F.conv2d(wide_x, w.double(), b.double(), stride=stride, padding=1))
    source, out = nhwc(x), wide(truth.shape[:-1].numel(), columns)
    weight, bias = pack.pack_taps(w), pack.pack_vector(b)
    row = ops.conv_row(
        size,
        buffer(source),
        channels,
        columns,
        weight,
        bias,
        buffer(out),
        stride=stride,
        upscale=upscale,
    )
    assert run([row], n, threads) == 0
    assert error(out.reshape(truth.shape), truth) < rounding.of_sums(9 * channels + 1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mode", ["plain", "shift only", "scale and shift"])
@pytest.mark.parametrize(("channels", "pixels"), [(32, 49), (96, 16), (160, 300), (384, 1024)])
def test_group_norm_takes_the_embedding_and_silu(isa, threads, mode, channels, pixels):
    n, silu = 2, mode != "plain"
    x = torch.randn(n, pixels, channels) + 50 * torch.randn(channels)
    weight, bias = torch.randn(channels), torch.randn(channels)
    table = torch.randn(n, 8 + 2 * channels)
    out = wide(n * pixels, channels)
    row = ops.group_norm_row(
        pixels,
        buffer(x),
        channels,
        32,
        weight,
        bias,
        buffer(out),
        eps=1e-5,
        silu=silu,
        embedding=-1 if mode == "plain" else 8,
        scale_shift=mode == "scale and shift",
    )
    assert run([row], n, threads, table=table) == 0
    h = x.double().transpose(1, 2)
    scale, shift = table.double()[:, 8:, None].chunk(2, dim=1)
    if mode == "shift only":
        h = h + scale
    h = F.group_norm(h, 32, weight.double(), bias.double(), 1e-5)
    if mode == "scale and shift":
        h = h * (1 + scale) + shift
    truth = (F.silu(h) if silu else h).transpose(1, 2)
    # Scale and offset are folded: a product of x's own size is rounded, and then the difference.
    assert error(out.reshape(truth.shape), truth) < 2 * rounding.EPS * float(x.abs().max())


def test_group_norm_of_a_far_mean_loses_no_digits(isa):
    x = torch.randn(1, 64, 32) + 1000
    ones, zeros, out = torch.ones(32), torch.zeros(32), wide(64, 32)
    row = ops.group_norm_row(64, buffer(x), 32, 32, ones, zeros, buffer(out), eps=1e-5, silu=False)
    assert run([row], 1) == 0
    truth = F.group_norm(x.double().transpose(1, 2), 32).transpose(1, 2)
    # The folded offset is about 1000, and is rounded at that size.
    assert error(out.reshape(truth.shape), truth) < rounding.EPS * 1000


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("tokens", "heads", "width"),
    [(256, 4, 16), (64, 4, 64), (49, 4, 24), (16, 1, 512), (196, 1, 8), (4, 4, 8), (1, 2, 32)],
)
def test_attention_is_softmax_of_the_legacy_order(isa, threads, tokens, heads, width):
    n = 2
    qkv = 2 * torch.randn(n, tokens, heads, 3, width)
    out = wide(n * tokens, heads * width)
    row = ops.attention_row(
        tokens, heads, width, buffer(qkv.view(-1, 3 * heads * width)), buffer(out)
    )
    assert run([row], n, threads) == 0
    q, k, v = qkv.double().permute(3, 0, 2, 1, 4)
    truth = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    scores = float((q @ k.mT).abs().max()) / width**0.5
    assert error(out.reshape(truth.shape), truth) < rounding.of_attention(scores, width, tokens)


def test_attention_survives_large_scores(isa):
    qkv = 60 * torch.randn(1, 33, 1, 3, 16)
    out = wide(33, 16)
    assert run([ops.attention_row(33, 1, 16, buffer(qkv.view(-1, 48)), buffer(out))], 1) == 0
    q, k, v = qkv.double().permute(3, 0, 2, 1, 4)
    truth = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    scores = float((q @ k.mT).abs().max()) / 16**0.5
    assert error(out.reshape(truth.shape), truth) < rounding.of_attention(scores, 16, 33)


def test_layout_goes_there_and_back(isa):
    x, middle, out = torch.randn(2, 3, 5, 7), wide(70, 3), torch.full((2, 3, 5, 7), math.nan)
    rows = [ops.input_row(3, 35, buffer(middle)), ops.output_row(3, 35, buffer(middle))]
    assert run(rows, 2, x=x, out=out) == 0
    assert torch.equal(middle.reshape(2, 5, 7, 3), nhwc(x))
    assert torch.equal(out, x)


def test_small_scratch_is_reported_with_its_operation(isa):
    x, out = torch.randn(64, 32), wide(64, 32)
    weight = pack.pack_winograd(torch.randn(32, 32, 3, 3), 4)
    rows = [
        ops.input_row(0, 0, buffer(x)),
        ops.winograd_row((8, 8), buffer(x), 32, 32, weight, None, buffer(out), tile=4),
    ]
    assert run(rows, 1, scratch=64) == 2


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("pixels", [4, 40])
def test_the_sizes_of_scratch_suffice_and_a_quarter_does_not(threads, pixels):
    native = _native.native()
    if native.build_info()["isa"] != "avx512":
        pytest.skip("smaller register tiles need less")
    n, channels = 1, 32
    size = (4, pixels)
    x, out = torch.randn(n * 4 * pixels, channels), wide(n * 4 * pixels, channels)
    w, ones = torch.randn(channels, channels, 3, 3), torch.ones(channels)
    cases = [
        (
            ops.conv_row(size, buffer(x), channels, channels, pack.pack_taps(w), None, buffer(out)),
            0,
            native.conv_scratch(n * 4 * pixels, channels),
        ),
        (
            ops.group_norm_row(
                4 * pixels, buffer(x), channels, 32, ones, ones, buffer(out), eps=1e-5, silu=True
            ),
            native.group_norm_shared(n, 4 * pixels, channels),
            0,
        ),
    ]
    for tile in (2, 4):
        tiles = n * (4 // tile) * -(-pixels // tile)
        block = native.winograd_block(tile, channels, channels, False)
        weight = pack.pack_winograd(w, tile)
        row = ops.winograd_row(
            size, buffer(x), channels, channels, weight, None, buffer(out), tile=tile, block=block
        )
        shared = native.winograd_shared(tile, tiles, channels, threads)
        scratch = native.winograd_scratch(tile, tiles, channels, block, threads)
        cases.append((row, shared, scratch))
    if native.build_info()["bf16"]:
        rows, weight = 4 * pixels * n, pack.pack_pairs(pack.pack_matrix(w[:, :, 0, 0]))
        row = ops.gemm_row(4 * pixels, buffer(x), channels, channels, weight, None, buffer(out))
        cases.append((row, 0, native.gemm_bf16_scratch(rows, channels)))
        tiles, weight = n * 2 * (pixels // 2), pack.pack_pairs(pack.pack_winograd(w, 2))
        block = native.winograd_block(2, channels, channels, True)
        row = ops.winograd_row(
            size, buffer(x), channels, channels, weight, None, buffer(out), tile=2, block=block
        )
        shared = native.winograd_bf16_shared(tiles, channels, threads)
        scratch = native.winograd_bf16_scratch(tiles, channels, block)
        cases.append((row, shared, scratch))
    for row, shared, scratch in cases:
        assert run([row], n, threads, shared=shared, scratch=scratch) == 0
    for row, shared, scratch in cases:
        needs_scratch = scratch and not (threads > 1 and shared)
        if needs_scratch:
            assert run([row], n, 1, shared=shared, scratch=scratch // 4) == 1
        if shared:
            assert run([row], n, threads, shared=shared // 4, scratch=scratch) == 1


def test_an_unknown_kind_is_reported_with_its_row():
    native = _native.native()
    x = torch.randn(4, 3)
    unknown = [max(int(kind) for kind in native.RowKind.__members__.values()) + 1]
    rows = [ops.input_row(0, 0, buffer(x)), unknown + [0] * (native.ROW_WORDS - 1)]
    assert run(rows, 1) == 2

"""Noise is the published generator's, and depends on nothing but its key."""

from __future__ import annotations

import math

import pytest
import torch

from iddpm_ext.random import (
    NoiseKey,
    _float32_uniforms,
    integers,
    normal,
    philox_4x32,
    uniform,
    words,
)

FULL = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    assert tuple(int(word) for word in philox_4x32(counter, key)) == expected


def plain_words(seed, stream, sample, step, draw, element):
    """The contract once more, in Python integers."""
    c = [element // 4, sample % 2**32, step, stream + 16 * draw]
    k = [seed % 2**32, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 % 2**32, p0 >> 32 ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize("seed", [0, 7, 2**63 + 12345, 2**64 - 1])
def test_words_follow_the_counter_layout(seed):
    samples, steps = torch.tensor([0, 3, 2**32 + 3, 2**31]), torch.tensor([0, 3999, 3999, 17])
    actual = words(NoiseKey(seed, 1, samples, steps, draw=5), (4, 3, 3))
    for n in range(4):
        for element in range(9):
            word = plain_words(seed, 1, int(samples[n]), int(steps[n]), 5, element)[element % 4]
            assert actual[n].flatten()[element] == word


def test_normals_are_box_muller_of_the_words():
    key = NoiseKey(1, 2, torch.tensor([9]), 30)
    w = words(key, (1, 4))[0].tolist()
    u = [(torch.tensor(x).float() + 0.5).item() * 2.0**-32 for x in w]
    radius = [math.sqrt(-2 * math.log(u[0])), math.sqrt(-2 * math.log(u[2]))]
    expected = [
        radius[0] * math.cos(2 * math.pi * u[1]),
        radius[0] * math.sin(2 * math.pi * u[1]),
        radius[1] * math.cos(2 * math.pi * u[3]),
        radius[1] * math.sin(2 * math.pi * u[3]),
    ]
    assert torch.equal(normal(key, (1, 4))[0], torch.tensor(expected))


def test_row_of_noise_does_not_depend_on_its_batch():
    batch = normal(NoiseKey(5, 1, torch.arange(8), 40), (8, 3, 5, 7))
    alone = normal(NoiseKey(5, 1, torch.tensor([6]), torch.tensor([40])), (1, 3, 5, 7))
    assert torch.equal(batch[6:7], alone)


def test_noise_does_not_depend_on_how_much_of_it_is_drawn():
    key = NoiseKey(5, 1, torch.arange(2), 0)
    assert torch.equal(normal(key, (2, 7)), normal(key, (2, 64))[:, :7])


def test_every_part_of_the_key_changes_the_noise():
    base = {"seed": 1, "stream": 2, "samples": torch.tensor([3]), "steps": 4, "draw": 5}
    others = {"seed": 1 + 2**32, "stream": 3, "samples": torch.tensor([4]), "steps": 5, "draw": 6}
    first = words(NoiseKey(**base), (1, 64))
    for name, value in others.items():
        assert (words(NoiseKey(**{**base, name: value}), (1, 64)) != first).all()


def test_normals_have_the_moments_and_tails_of_a_gaussian():
    z = normal(NoiseKey(0, 0, torch.arange(64), 0), (64, 8192)).double()
    n = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.square().mean() - 1) < 4 * math.sqrt(2 / n)
    assert abs(z.pow(4).mean() - 3) < 4 * math.sqrt(96 / n)
    beyond_three = (z.abs() > 3).double().mean()
    assert abs(beyond_three - 0.0026998) < 4 * math.sqrt(0.0027 / n)
    pairs = z.view(-1, 2)
    assert abs((pairs[:, 0] * pairs[:, 1]).mean()) < 4 / math.sqrt(n / 2)


def test_extreme_words_give_finite_normals():
    u = _float32_uniforms(torch.tensor([0, FULL]))
    assert 0 < u[0] and u[1] <= 1
    assert (-2 * u.double().log()).sqrt().isfinite().all()


def test_word_is_rounded_to_float32_before_the_half_is_added():
    # Halfway between two float32 numbers: the word alone rounds down, with the half it would round up.
    word = torch.tensor([2**25 + 2])
    assert _float32_uniforms(word).item() == 2.0**25 / 2**32


def test_uniforms_lie_strictly_between_0_and_1_and_are_exact():
    key = NoiseKey(0, 3, torch.arange(1000), 0)
    u = uniform(key, (1000, 3))
    assert u.dtype == torch.float64 and 0 < u.min() and u.max() < 1
    assert torch.equal(u * 2**32 - 0.5, words(key, (1000, 3)).double())


@pytest.mark.parametrize("high", [1, 10, 4000, 2**31])
def test_integers_fill_their_range_evenly(high):
    drawn = integers(NoiseKey(0, 3, torch.arange(20000), 0), high, (20000, 1))
    assert drawn.dtype == torch.int64 and drawn.min() >= 0 and drawn.max() < high
    share = torch.bincount(drawn[:, 0] * 10 // high if high >= 10 else drawn[:, 0]) / 20000
    assert (share - 1 / len(share)).abs().max() < 0.01


def test_empty_noise_is_empty():
    none = torch.zeros(0, dtype=torch.int64)
    assert normal(NoiseKey(0, 0, none, 0), (0, 3, 4)).shape == (0, 3, 4)
    assert normal(NoiseKey(0, 0, torch.arange(2), 0), (2, 0)).shape == (2, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseKey(-1, 0, torch.arange(2), 0), "seed must be .* got -1"),
        (lambda: NoiseKey(2**64, 0, torch.arange(2), 0), "seed must be an int from 0 to"),
        (lambda: NoiseKey(0, 16, torch.arange(2), 0), "stream must be .* got 16"),
        (lambda: NoiseKey(0, 0, torch.arange(2), 0, 2**28), "draw must be"),
        (lambda: NoiseKey(0, 0, torch.arange(2).float(), 0), "samples must be an int64 tensor"),
        (lambda: NoiseKey(0, 0, [0, 1], 0), r"samples must be an int64 tensor \[N\], got \[0, 1\]"),
        (lambda: NoiseKey(0, 0, torch.arange(2), torch.arange(3)), r"shape of samples \(2,\), got"),
        (lambda: NoiseKey(0, 0, torch.arange(2), 1.5), "steps must be an int or int64"),
        (lambda: normal(NoiseKey(0, 0, torch.arange(2), 0), (3, 4)), r"samples 2, got \(3, 4\)"),
        (lambda: integers(NoiseKey(0, 0, torch.arange(2), 0), 0, (2,)), "high must be .* got 0"),
    ],
)
def test_bad_keys_are_refused_with_the_rule_and_the_value(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()

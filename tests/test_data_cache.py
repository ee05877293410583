"""Images kept in memory are those that would be decoded, to the bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from iddpm_ext.data import ArrayData, CachedData, open_data
from iddpm_ext.training import TrainConfig, train

COUNT = 300


@pytest.fixture
def folder(tmp_path):
    """JPEGs in two classes, two of them damaged."""
    draw = np.random.default_rng(0)
    for number in range(COUNT):
        path = tmp_path / "data" / "ab"[number % 2] / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    for number in (4, 6):
        (tmp_path / "data" / "a" / f"{number:03}.jpg").write_bytes(b"no image")
    return tmp_path / "data"


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_images_are_the_decoded_ones(folder, workers):
    data = open_data(folder)
    cached = CachedData(data, workers)
    indices = torch.tensor([0, 1, 2, 3, 3, COUNT - 1, 150])
    for found, expected in zip(cached.images(indices), data.images(indices), strict=True):
        assert found == expected if isinstance(found, list) else torch.equal(found, expected)
    assert len(cached.images(indices)[2]) == 2 + 1 + 1
    assert torch.equal(cached.labels(indices), data.labels(indices))
    assert (len(cached), cached.image_shape, cached.class_names) == (COUNT, (3, 8, 8), ("a", "b"))
    assert cached._images.dtype == torch.uint8


def test_deeper_images_stay_exact(tmp_path):
    values = np.random.default_rng(1).integers(0, 1 << 16, (600, 4, 4), dtype=np.uint16)
    values[:300] = values[:300] // 257 * 257  # levels that 8 bits have
    data = ArrayData(values)
    cached, indices = CachedData(data), torch.arange(600)
    assert torch.equal(cached.images(indices)[0], data.images(indices)[0])
    assert cached._images.dtype == torch.float32


def test_what_does_not_fit_is_refused_before_it_is_decoded(folder, monkeypatch):
    data = open_data(folder)
    monkeypatch.setattr(data, "images", lambda _: 1 / 0)
    monkeypatch.setattr("iddpm_ext.data.memory.free_memory", lambda: 10_000)
    with pytest.raises(ValueError, match="cache of images must unpack to at most the 10000 bytes"):
        CachedData(data)


def test_a_run_with_a_cache_is_the_run_without(folder, tmp_path):
    losses = []
    for name, cache in (("plain", False), ("cached", True)):
        config = TrainConfig(
            data=str(folder), out=str(tmp_path / name), cache=cache, workers=1, steps=3, device="cpu",
            batch_size=4, model_channels=32, num_res_blocks=1, channel_mult=(1,), num_heads=1,
            attention_resolutions=(), sample_every=0, log_every=1, class_cond=True, progress=False,
        )  # fmt: skip
        train(config)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append(
            [(json.loads(line)["loss"], json.loads(line)["bad_images"]) for line in lines]
        )
    assert losses[0] == losses[1] and len(losses[0]) == 3

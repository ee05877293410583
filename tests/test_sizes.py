"""Images that are not square, and random crops: from the data to training, sampling and what measures."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import iddpm_ext
from iddpm_ext import UNetConfig, cli
from iddpm_ext.checkpoint.runs import read_tensors
from iddpm_ext.data import Order, batches, open_data
from iddpm_ext.data.image import fit, random_crop
from iddpm_ext.networks.classifier import Classifier, ClassifierConfig
from iddpm_ext.training import TrainConfig, train


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    return Image.fromarray(levels)


def original_random_crop(image: Image.Image, size: int, smaller: int, places: list[float]):
    """guided-diffusion's crop with its three random numbers given."""
    while min(*image.size) >= 2 * smaller:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = smaller / min(*image.size)
    sides = tuple(round(side * scale) for side in image.size)
    array = np.array(image.resize(sides, resample=Image.Resampling.BICUBIC))
    y, x = (int(u * (n - size + 1)) for u, n in zip(places, array.shape, strict=True))
    return array[y : y + size, x : x + size]


@pytest.mark.parametrize("sides", [(40, 70), (16, 16), (90, 33)])
def test_random_crop_of_a_square_is_that_of_the_original(sides):
    image, size = picture(*sides), 16
    seen = set()
    for numbers in torch.rand(40, 3, generator=torch.Generator().manual_seed(0)).tolist():
        smaller = 16 + int(numbers[0] * 5)  # 16 .. 20, from randrange(16, 21)
        expected = original_random_crop(image, size, smaller, numbers[1:])
        found = np.asarray(random_crop(image, (16, 16), numbers))
        assert found.shape == (16, 16) and np.array_equal(found, expected)
        seen.add(smaller)
    assert seen == {16, 17, 18, 19, 20}
    assert np.asarray(random_crop(image, (16, 16), (1.0, 1.0, 1.0))).shape == (16, 16)


def test_sizes_that_are_not_square_keep_the_shape_of_what_is_seen():
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)))
    found = np.asarray(fit(ramp, (8, 16)))
    assert found.shape == (8, 16)
    # The whole width, the middle half of the height: four columns to a pixel.
    expected = (np.arange(64).reshape(16, 4).mean(1) * 4).round()
    assert np.abs(found.astype(float) - expected)[:, 1:-1].max() <= 3
    for size in ((8, 16), (16, 8), (12, 20)):
        numbers = (0.5, 0.3, 0.9)
        assert random_crop(ramp, size, numbers).size == size[::-1]
        assert fit(picture(31, 9), size).size == size[::-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Wide images of different sizes in two classes, and an array of 12x20."""
    root = tmp_path_factory.mktemp("wide")
    for i in range(8):
        path = root / "d" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(20 + i, 30 + 2 * i, i).save(path)
    np.savez(root / "a.npz", np.random.default_rng(0).integers(0, 256, (8, 8, 16), np.uint8))
    return root


@pytest.mark.parametrize("name", ["d", "a.npz"])
def test_crops_are_a_function_of_the_position(folder, name):
    data = open_data(folder / name, image_size=(8, 16))
    assert data.image_shape == (1, 8, 16)
    order, positions = Order(len(data), 5), [[0, 1, 2], [3, 4, 5], [13, 14, 15]]

    def drawn(lists, workers=0, crop=True):
        return [b.images for b in batches(data, order, lists, workers, random_crop=crop)]

    once = drawn(positions)
    for again in (drawn(positions, workers=2), drawn([[0], [1, 2, 3, 4, 5], [13, 14, 15]])):
        assert torch.equal(torch.cat(once), torch.cat(again))
    middle = drawn(positions, crop=False)
    assert not torch.equal(torch.cat(once), torch.cat(middle))
    # The second pass sees other crops of the same images.
    first = {int(i): p for p, i in enumerate(order.at(torch.arange(8)))}
    later = int(order.at(torch.tensor([13])))
    assert not torch.equal(drawn([[first[later]]])[0], drawn([[13]])[0])


def config_of(folder, out, **changes) -> TrainConfig:
    return TrainConfig(**{
        "data": str(folder / "d"), "out": str(out), "steps": 4, "batch_size": 4, "ema": (0.9,),
        "model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 1), "attention_resolutions": (8,),
        "diffusion_steps": 20, "sample_every": 4, "sample_steps": 4, "sample_count": 2, "progress": False,
        "device": "cpu", "image_size": (8, 16), "random_crop": True, "flip": True, "class_cond": True,
        **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def run(folder):
    config = config_of(folder, folder / "run")
    return config, train(config)


def test_a_run_resumes_bit_for_bit_and_draws_its_shape(run, folder):
    config, whole = run
    again = replace(config, out=str(folder / "again"))
    train(replace(again, steps=2))
    resumed = train(again)
    for file in ("model.safetensors", "optim.safetensors"):
        ours, theirs = read_tensors(whole, file), read_tensors(resumed, file)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    model = iddpm_ext.load(whole)
    assert model.config.image_size == (8, 16) and model.config.has_attention(1)
    drawn = iddpm_ext.sample(model, 4, n=2, labels=[0, 1], progress=False)
    assert drawn.shape == (2, 1, 8, 16)
    plain = iddpm_ext.sample(model, 4, n=2, labels=[0, 1], engine=False, progress=False)
    torch.testing.assert_close(drawn, plain, rtol=0, atol=2e-4)
    for changes, says in (
        ({"image_size": (16, 8)}, r"image_size=\[16, 8\] \(was \[8, 16\]\)"),
        ({"image_size": 16}, r"image_size=16 \(was \[8, 16\]\)"),
    ):
        with pytest.raises(ValueError, match=says):
            train(replace(config, steps=5, **changes))


def test_what_measures_brings_files_to_the_networks_shape(run, folder, capsys):
    _, whole = run
    out = str(folder / "x.npz")
    assert cli.main(["sample", str(whole), "-n", "2", "--steps", "4", "--out", out]) == 0
    assert np.load(out)["arr_0"].shape == (2, 8, 16, 1)
    words = ["nll", str(whole), "--data", str(folder / "d"), "--out", str(folder / "nll")]
    assert cli.main([*words, "--budget", "10", "-n", "4"]) == 0
    capsys.readouterr()
    words = [
        "--reference",
        str(folder / "d"),
        "--extractor",
        "pixels",
        "--resamples",
        "0",
        "--json",
    ]
    assert cli.main(["evaluate", str(whole), *words, "-n", "6", "--steps", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["image_size"] == [8, 16]
    flags = ["--image-size", "6,12"]
    assert cli.main(["evaluate", str(folder / "d"), *words, *flags]) == 0
    assert json.loads(capsys.readouterr().out)["image_size"] == [6, 12]
    report = folder / "report.html"
    words = ["report", str(whole), "--data", str(folder / "d"), "--quick", "--out", str(report)]
    assert cli.main(words) == 0 and report.exists()


def test_upsamplers_and_classifiers_take_the_shape(folder):
    config = config_of(
        folder, folder / "up", steps=2, super_resolution=8, class_cond=False, sample_every=2
    )
    model = iddpm_ext.load(train(config))
    low_res = torch.zeros(1, 1, 4, 8)
    assert iddpm_ext.sample(model, 3, low_res=low_res, progress=False).shape == (1, 1, 8, 16)
    with pytest.raises(ValueError, match=r"super_resolution must be .* whole pixels"):
        train(config_of(folder, folder / "no", super_resolution=5, class_cond=False))
    with pytest.raises(ValueError, match="super_resolution must be below the side"):
        train(config_of(folder, folder / "no", super_resolution=16, class_cond=False))
    guide = config_of(folder, folder / "guide", steps=2, classifier=True, class_cond=False,
                      num_head_channels=32, sample_every=0)  # fmt: skip
    classifier = iddpm_ext.load_classifier(train(guide))
    assert classifier(torch.zeros(2, 1, 8, 16), torch.zeros(2)).shape == (2, 2)
    with pytest.raises(ValueError, match="x must be 8x16 for pool 'attention', got 16x8"):
        classifier(torch.zeros(2, 1, 16, 8), torch.zeros(2))


def test_command_line_takes_height_and_width(folder):
    out = folder / "cli"
    words = (
        f"train --data {folder / 'd'} --out {out} --steps 1 --batch-size 2 --image-size 8,16 --random-crop "
        "--model-channels 32 --num-res-blocks 1 --channel-mult 1 --attention-resolutions 4 "
        "--sample-every 0 --no-progress"
    )
    assert cli.main(words.split()) == 0
    assert TrainConfig.from_json(out / "config.json").image_size == (8, 16)
    assert iddpm_ext.load(out).config.image_size == (8, 16)
    square = replace(TrainConfig.from_json(out / "config.json"), image_size=(8, 8))
    assert square.image_size == 8


def test_networks_of_diffusers_keep_the_shape():
    pytest.importorskip("diffusers")
    config = UNetConfig(image_size=(8, 16), model_channels=32, num_res_blocks=1, channel_mult=(1, 1),
                        attention_resolutions=(8,))  # fmt: skip
    model = iddpm_ext.UNet(config).eval()
    unet = iddpm_ext.to_diffusers(model)
    assert tuple(unet.config.sample_size) == (8, 16)
    assert iddpm_ext.from_diffusers(unet).config.image_size == (8, 16)
    program = iddpm_ext.export_program(model)
    x, t = torch.randn(3, 3, 8, 16), torch.tensor([1.0, 2.0, 3.0])
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x=x, timesteps=t), model(x, t))
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert UNetConfig(image_size=(32, 32)) == UNetConfig(image_size=32)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda d: UNetConfig(image_size=(8, 9)), ValueError, "image_size must be a multiple of 8"),
        (lambda d: UNetConfig(image_size=(8, 0)), ValueError, "image_size must be at least 1, got 0"),
        (lambda d: UNetConfig(image_size=(8, 8, 8)), ValueError, "a side, or height and width"),
        (lambda d: UNetConfig(image_size=8.0), TypeError, "must be an integer, or two, got 8.0"),
        (lambda d: open_data(d / "d", image_size=(8, 0)), ValueError, "open_data: image_size must be"),
        (lambda d: config_of(d, d, image_size=None), ValueError, "random_crop must go with an image_s"),
        (lambda d: config_of(d, d, cache=True), ValueError, "and without cache, got .* cache True"),
    ],
)  # fmt: skip
def test_errors_name_the_size(folder, call, error, says):
    with pytest.raises(error, match=says):
        call(folder)


def test_a_pooling_has_a_place_for_every_position():
    config = ClassifierConfig(image_size=(8, 16), in_channels=1, model_channels=32, num_classes=3,
                              num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(8,),
                              num_head_channels=32)  # fmt: skip
    model = Classifier(config)
    assert model.out[2].positional_embedding.shape[1] == math.prod((4, 8)) + 1

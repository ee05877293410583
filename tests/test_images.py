"""Files of images: levels, layouts, recipes, and nothing half-written."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import iddpm_ext
from iddpm_ext import images
from iddpm_ext.images import check_writable, read_recipe, save_animation, save_images

RECIPE = {"checkpoint": "fashion-mnist", "seed": 3, "steps": 50, "sampler": "ddpm"}


def levels(n: int, channels: int = 1, height: int = 4, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, height, width), generator=generator)


def as_images(levels: torch.Tensor) -> torch.Tensor:
    return levels / 127.5 - 1


def leftovers(folder: Any) -> list[str]:
    return [path.name for path in folder.rglob("*") if ".tmp" in path.name]


def test_npz_gives_back_the_256_levels_and_the_labels(tmp_path):
    every = torch.arange(256).view(2, 1, 8, 16)
    save_images(as_images(every), tmp_path / "x.npz", labels=[4, 0])
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_0"].shape == (2, 8, 16, 1)
        assert (arrays["arr_0"][..., 0] == every[:, 0].numpy()).all()
        assert arrays["arr_1"].tolist() == [4, 0]
    save_images(as_images(levels(2, 5)), tmp_path / "y.npz")
    with np.load(tmp_path / "y.npz") as arrays:
        assert list(arrays) == ["arr_0"] and arrays["arr_0"].shape == (2, 4, 6, 5)


def test_a_pixel_is_rounded_to_the_nearest_level_and_clipped(tmp_path):
    x = torch.tensor([-1.5, -1.0, -1 + 0.6 / 127.5, -1 + 0.4 / 127.5, 0.999, 7.0]).view(1, 1, 1, 6)
    for dtype in (torch.float32, torch.float64):
        save_images(x.to(dtype), tmp_path / "x.npz")
        assert np.load(tmp_path / "x.npz")["arr_0"].ravel().tolist() == [0, 0, 1, 0, 255, 255]


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_a_grid_holds_every_image_row_by_row(tmp_path, channels, mode):
    x = levels(5, channels)
    save_images(as_images(x), tmp_path / "grid.png", recipe=RECIPE)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.mode == mode and grid.size == (3 * 8 + 2, 2 * 6 + 2)
        pixels = np.asarray(grid).reshape(*grid.size[::-1], channels)
    for i in range(5):
        top, left = 2 + i // 3 * 6, 2 + i % 3 * 8
        cell = pixels[top : top + 4, left : left + 6]
        assert (cell == x[i].permute(1, 2, 0).numpy()).all()
    recipe = read_recipe(tmp_path / "grid.png")
    assert recipe == {**RECIPE, "n": 5, "version": iddpm_ext.__version__}


def test_captions_stand_above_the_images_and_widen_them(tmp_path):
    x = torch.ones(2, 1, 4, 6)
    save_images(x, tmp_path / "plain.png", labels=[0, 1])
    names = ["boot", "a rather long name"]
    save_images(x, tmp_path / "named.png", labels=[0, 1], class_names=names)
    with Image.open(tmp_path / "plain.png") as plain, Image.open(tmp_path / "named.png") as named:
        assert np.asarray(plain).min() == 255
        half = named.width // 2
        for part in (np.asarray(named)[:, :half], np.asarray(named)[:, half:]):
            assert part.min() < 128 and part[-20:].min() == 255
        assert ((named.width - 2) // 2 - 2) % 6 == 0 and named.width > plain.width
    assert read_recipe(tmp_path / "named.png")["labels"] == [0, 1]


def test_a_folder_gets_one_png_an_image_with_its_own_recipe(tmp_path):
    x, folder = levels(3), tmp_path / "samples"
    for _ in range(2):  # the second time over the first
        save_images(
            as_images(x), folder, recipe=RECIPE, labels=[2, 0, -1], class_names=["a", "b", "c"]
        )
    assert sorted(p.name for p in folder.iterdir()) == ["000000.png", "000001.png", "000002.png"]
    with Image.open(folder / "000001.png") as image:
        assert (np.asarray(image) == x[1, 0].numpy()).all()
        assert json.loads(image.text["iddpm_ext"])["index"] == 1
    recipes = [read_recipe(p) for p in sorted(folder.iterdir())]
    assert [r["class_name"] for r in recipes] == ["c", "a", "unlabelled"]
    assert recipes[0] == {
        **RECIPE, "index": 0, "label": 2, "class_name": "c", "version": iddpm_ext.__version__,
    }  # fmt: skip
    save_images(as_images(x), folder, recipe={**RECIPE, "index": 100})
    assert read_recipe(folder / "000102.png")["index"] == 102
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_an_animation_has_every_frame_and_its_recipe(tmp_path, suffix):
    frames = (torch.full((4, 1, 8, 8), value) for value in (-1.0, 0.0, 1.0))
    path = save_animation(frames, tmp_path / f"chain{suffix}", recipe=RECIPE, scale=2)
    with Image.open(path) as animation:
        assert animation.n_frames == 3 and animation.size == (38, 38)
        for i, level in enumerate((0, 128, 255)):
            animation.seek(i)
            assert np.asarray(animation.convert("L"))[8, 8] == level
    assert read_recipe(path)["seed"] == 3


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    save_images(as_images(levels(2)), tmp_path / "x.png")
    before = (tmp_path / "x.png").read_bytes()

    def full_disk(image: Any, file: Any, **_: Any) -> None:
        with open(file, "wb") as stream:
            stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    for name in ("x.png", "folder"):
        with pytest.raises(
            OSError, match=r"save_images: path must be writable, got.*No space left"
        ):
            save_images(as_images(levels(2)), tmp_path / name)
    with pytest.raises(OSError, match="save_animation: path must be writable"):
        save_animation([torch.zeros(1, 1, 4, 4)], tmp_path / "x.gif")
    assert (tmp_path / "x.png").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_a_path_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.gif").mkdir()
    cases: list[tuple[str, type[Exception], str]] = [
        ("missing/x.png", FileNotFoundError, "path must be in a folder that exists"),
        ("x.jpg", ValueError, "path must end in one of .png, .npz, no suffix"),
        ("file", NotADirectoryError, "path must be a folder"),
        ("file/x.png", FileNotFoundError, "path must be in a folder that exists"),
    ]
    for name, error, match in cases:
        with pytest.raises(error, match=match):
            check_writable(tmp_path / name)
        with pytest.raises(error, match=match):
            save_images(torch.zeros(1, 1, 4, 4), tmp_path / name)
    with pytest.raises(IsADirectoryError, match="path must be a file"):
        save_animation([torch.zeros(1, 1, 4, 4)], tmp_path / "folder.gif")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder.gif"]


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images.os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="path must be writable"):
        check_writable(tmp_path / "x.png")


@pytest.mark.parametrize(
    "kwargs, error, match",
    [
        ({"x": torch.zeros(2, 2, 4, 4)}, ValueError, "1, 3 or 4 channels, got 2"),
        ({"x": torch.zeros(1, 4, 4)}, ValueError, r"x must be \[N, C, H, W\]"),
        ({"x": torch.zeros(0, 1, 4, 4)}, ValueError, r"x must be \[N, C, H, W\]"),
        ({"x": torch.zeros(1, 1, 4, 4).byte()}, TypeError, "floating tensor, got torch.uint8"),
        ({"x": [1.0]}, TypeError, "floating tensor, got list"),
        ({"x": torch.full((1, 1, 2, 2), float("nan"))}, ValueError, "x must be finite, got nan"),
        ({"labels": [1]}, ValueError, r"labels must be integers \[2\]"),
        ({"labels": [0.5, 1.0]}, ValueError, r"labels must be integers \[2\]"),
        ({"labels": [0, 3], "class_names": ["a"]}, ValueError, "class_names must name class 3"),
        ({"columns": 0}, ValueError, "columns must be an int above 0"),
        ({"scale": 1.5}, ValueError, "scale must be an int above 0"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(tmp_path, kwargs, error, match):
    arguments = {"x": torch.zeros(2, 1, 4, 4), "path": tmp_path / "x.png", **kwargs}
    with pytest.raises(error, match=match):
        save_images(**arguments)
    assert not list(tmp_path.iterdir())


def test_an_animation_needs_frames_of_one_shape(tmp_path):
    with pytest.raises(ValueError, match="frames must not be empty"):
        save_animation([], tmp_path / "x.webp")
    with pytest.raises(ValueError, match="frames must have one shape"):
        save_animation([torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5)], tmp_path / "x.webp")
    with pytest.raises(ValueError, match=r"path must end in one of \.webp, \.gif"):
        save_animation([torch.zeros(1, 1, 4, 4)], tmp_path / "x.mp4")


def test_an_image_without_recipe_is_named(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="must be an image with a recipe"):
        read_recipe(tmp_path / "x.png")

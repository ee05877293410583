"""Readers never drop, relabel, rescale or clip silently: ambiguous data is refused, changes are reported."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import struct
import sys
import types
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from iddpm_ext.cli import main
from iddpm_ext.data import ArrayData, BadImage, check_data, match_classes, open_data, read_idx
from iddpm_ext.data import image as image_module


def _noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _images(folder: Path, count: int = 4, size: int = 8, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(_noise(seed + i, size, size)).save(folder / f"{i}.png")
    return folder


def _png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def _levels(data: Any, count: int) -> np.ndarray:
    x = data.images(torch.arange(count))[0]
    return ((x + 1) * 127.5).round().byte().numpy()


# ---- values


LEVELS = _noise(0, 4, 6, 6)
MEANT = {
    "unit": (LEVELS.astype(np.float32) / 255, (0, 1)),
    "levels": (LEVELS.astype(np.float32), (0, 255)),
    "signed": ((LEVELS / 127.5 - 1).astype(np.float64), (-1, 1)),
    "bytes": ((LEVELS.astype(np.int16) - 128).astype(np.int8), (-128, 127)),
    "integers": (LEVELS.astype(np.int64), (0, 255)),
    "12 bits": ((LEVELS.astype(np.uint32) * 4095 // 255).astype(np.uint16), (0, 4095)),
    "halves": (LEVELS.astype(np.float16) / 255, (0, 1)),
}


@pytest.mark.parametrize("kind", MEANT)
def test_values_mean_what_value_range_says_and_nothing_is_guessed(tmp_path, kind):
    values, value_range = MEANT[kind]
    np.save(tmp_path / "a.npy", values)
    if kind != "signed":
        with pytest.raises(ValueError, match=r"must have a value_range .*\?\) for .* between"):
            open_data(tmp_path / "a.npy")
    data = open_data(tmp_path / "a.npy", value_range=value_range)
    # A step of 12 bits, and float16's last bit near 1, are far less than half a level.
    assert np.array_equal(_levels(data, 4)[:, 0], LEVELS)
    if kind == "signed":
        assert np.array_equal(_levels(open_data(tmp_path / "a.npy"), 4)[:, 0], LEVELS)


@pytest.mark.parametrize(
    "values, message",
    [
        (np.array([0.0, np.nan, 0.5]), "must be finite, got values nan"),
        (np.array([0.0, np.inf, 0.5]), "must be finite, got values 0.0 .. inf"),
        (np.array([-0.5, 0.2, 1.5]), r"must have a value_range .* between -0.5 and 1.5"),
        (np.array([0, 1, 1], np.uint8), r"value_range .*\(0,1 or 0,255\?\) for uint8"),
        (np.array([0, 700, 900], np.uint16), r"\(0,1023 or 0,65535\?\) for uint16"),
    ],
)
def test_one_value_in_the_last_image_is_enough_to_refuse(tmp_path, values, message):
    images = np.zeros((3, 4, 4), values.dtype)
    images[:, 1, 1] = values
    np.save(tmp_path / "a.npy", images)
    with pytest.raises(ValueError, match=message):
        open_data(tmp_path / "a.npy")


def test_a_value_range_is_no_leave_to_clip(tmp_path):
    np.save(tmp_path / "a.npy", LEVELS.astype(np.float32))
    with pytest.raises(ValueError, match=r"must lie in the value_range 0,200, got values 0 .. 249"):
        open_data(tmp_path / "a.npy", value_range=(0, 200))
    for wrong in ((1, 0), (0,), (0, float("nan")), "ab"):
        with pytest.raises(ValueError, match="value_range must be two numbers"):
            open_data(tmp_path / "a.npy", value_range=wrong)


def test_one_image_alone_is_not_taken_for_a_batch_of_rows(tmp_path):
    np.save(tmp_path / "a.npy", _noise(0, 8, 8, 3))
    with pytest.raises(ValueError, match=r"must be \[N, H, W, C\] .* got \[8, 8, 3\]"):
        open_data(tmp_path / "a.npy")


def test_other_arrays_of_a_file_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", images=LEVELS, masks=LEVELS, labels=np.arange(4))
    assert open_data(tmp_path / "a.npz").notes == ["arrays of other names are left out: masks"]


@pytest.mark.parametrize("bits", [12, 16])
def test_files_of_twelve_bits_need_a_word_and_those_of_sixteen_do_not(tmp_path, bits):
    values = np.linspace(0, 2**bits - 1, 64).astype(np.uint16).reshape(8, 8)
    for name in ("a", "b"):
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    report = check_data(tmp_path)
    assert report.values == {"uint16": (0, 2**bits - 1)} and report.sound == (bits == 16)
    options: dict[str, Any] = {}
    if bits == 12:
        with pytest.raises(ValueError, match=r"value_range .*\(0,4095 or 0,65535\?\)"):
            open_data(tmp_path)
        assert "0,4095 or 0,65535?" in str(report)
        options = {"value_range": (0, 4095)}
        assert check_data(tmp_path, **options).sound
    x = open_data(tmp_path, **options).images(torch.tensor([0]))[0][0, 0].numpy()
    assert np.array_equal(np.round((x + 1) * ((2**bits - 1) / 2)), values)


def test_eight_bit_files_are_not_read_as_parts_of_a_deeper_range(tmp_path):
    Image.fromarray(np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8)).save(
        tmp_path / "a.png"
    )
    Image.fromarray(_noise(0, 8, 8)).save(tmp_path / "b.png")
    with pytest.raises(
        ValueError, match=r"b\.png must have values of the value_range 0,4095, got 8 bits"
    ):
        open_data(tmp_path, value_range=(0, 4095))


def test_floating_files_need_a_word_and_lose_nothing(tmp_path):
    values = np.linspace(-3, 5, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(
        ValueError, match=r"a\.tif: must have a value_range for floating values \(-3 .. 5"
    ):
        open_data(tmp_path)
    assert not check_data(tmp_path).sound
    x = open_data(tmp_path, value_range=(-3, 5)).images(torch.tensor([0]))[0][0, 0].numpy()
    # (v + 3) / 4 - 1 in float64, rounded once.
    assert np.array_equal(x, ((values.astype(np.float64) + 3) / 4 - 1).astype(np.float32))


# ---- transparency, frames, orientation


def _transparent(kind: str) -> Image.Image:
    image = Image.fromarray(_noise(0, 8, 8, 3))
    if kind == "palette":
        flat = image.quantize(4)
        flat.info["transparency"] = 0
        return flat
    image.putalpha(Image.fromarray(np.repeat(np.uint8([[0, 255]]), 32, axis=0).reshape(8, 8)))
    return image if kind == "RGBA" else image.convert("LA")


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette"])
def test_transparent_pixels_are_refused_unless_their_colour_is_said(tmp_path, kind):
    image = _transparent(kind)
    image.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: must be opaque, or alpha be 'drop'"):
        open_data(tmp_path)
    assert any("must be opaque" in line for line in check_data(tmp_path).unclear)
    clear = np.asarray(image.convert("RGBA"))[..., 3] == 0
    assert 0 < clear.mean() < 1
    read = {
        alpha: _levels(open_data(tmp_path, alpha=alpha, channels=3), 1)[0].transpose(1, 2, 0)
        for alpha in ("drop", "black", "white")
    }
    below = np.asarray(image.convert("RGB"))
    assert np.array_equal(read["drop"], below)
    for alpha, colour in (("black", 0), ("white", 255)):
        assert (read[alpha][clear] == colour).all()
        assert np.array_equal(read[alpha][~clear], below[~clear])
    assert check_data(tmp_path, alpha="white").sound


def test_opaque_alpha_channels_are_no_question(tmp_path):
    Image.fromarray(_noise(0, 8, 8, 3)).convert("RGBA").save(tmp_path / "a.png")
    assert open_data(tmp_path).image_shape == (3, 8, 8) and check_data(tmp_path).sound


def test_what_an_image_loses_in_reading_is_said(tmp_path):
    frames = [Image.fromarray(_noise(i, 8, 8)) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8)).save(tmp_path / "b.jpg", exif=exif)
    Image.new("CMYK", (8, 8)).save(tmp_path / "c.jpg")
    (tmp_path / "d.png").write_bytes(_sixteen_bit_colour())
    said = " ".join(open_data(tmp_path).notes)
    text = str(check_data(tmp_path))
    for words in (
        "only the first of several frames is read", "turned upright, as EXIF says",
        "CMYK is converted to RGB", "16 bits a channel of colour are read as 8",
    ):  # fmt: skip
        assert words in said and words in text


def _sixteen_bit_colour() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(b"\0" + bytes(8 * 6) for _ in range(8))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_resizing_is_said(tmp_path):
    _images(tmp_path / "d", size=12)
    np.save(tmp_path / "a.npy", _noise(0, 4, 12, 12))
    for path in (tmp_path / "d", tmp_path / "a.npy"):
        note = "images of 12x12 are resized and cropped to 8x8"
        assert open_data(path, image_size=8).notes == [note]
        assert open_data(path, image_size=12).notes == []


def test_no_decoder_that_runs_a_program_is_tried():
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    with pytest.raises(BadImage, match="file of no known format"):
        image_module.open_image(script, "a.png")


# ---- names of folders and files


def test_a_class_may_be_called_train(tmp_path):
    for name in ("car", "plane", "train"):
        _images(tmp_path / name)
    data = open_data(tmp_path)
    assert len(data) == 12 and data.class_names == ("car", "plane", "train")
    assert data.notes == [
        "the folder train is taken for a class, as others are beside it: car, plane"
    ]
    assert check_data(tmp_path).classes == {"car": 4, "plane": 4, "train": 4}


@pytest.mark.parametrize("beside", ["extra", "loose", "test"])
def test_folders_that_may_be_splits_or_not_are_refused(tmp_path, beside):
    for name in ("cat", "dog"):
        _images(tmp_path / "train" / name)
    if beside == "loose":
        _images(tmp_path, 1)
    else:
        _images(tmp_path / beside)
        _images(tmp_path / "unsupervised")
    with pytest.raises(
        ValueError, match=r"split must be 'all' .* or nothing else may be beside them"
    ):
        open_data(tmp_path)
    assert len(open_data(tmp_path, split="all")) > 8


def test_an_absent_split_is_not_replaced_by_the_other(tmp_path):
    for name in ("cat", "dog"):
        _images(tmp_path / "train" / name)
    with pytest.raises(ValueError, match="split must be one of those in the folders train"):
        open_data(tmp_path, split="test")


def test_of_two_folders_of_test_images_one_is_read_and_the_other_named(tmp_path):
    for name, count in (("train", 6), ("val", 3), ("test", 2)):
        _images(tmp_path / name, count)
    data = open_data(tmp_path, split="test")
    assert len(data) == 2
    assert data.notes == ["the split test is read; left out: train (6), val (3)"]


def test_what_systems_put_beside_images_is_left_out_and_named(tmp_path):
    for name in ("cat", "dog"):
        _images(tmp_path / name)
        for junk in ("@eaDir/0.png", ".thumbnails", "__MACOSX"):
            _images(tmp_path / name / junk)
        (tmp_path / name / "Thumbs.db").write_bytes(b"x")
        (tmp_path / name / "._0.png").write_bytes(b"x")
    _images(tmp_path / ".hidden", 1)
    (tmp_path / "labels.csv").write_text("x")
    data = open_data(tmp_path)
    assert len(data) == 8 and data.class_names == ("cat", "dog")
    first, second, third = data.notes
    for words in ("@eaDir (8)", ".thumbnails (8)", "__MACOSX (8)", "Thumbs.db (2)", "._* (2)"):
        assert words in first
    assert second == "left out, as their names are hidden: .hidden/0.png"
    assert ".csv (1); labels in such files are not read" in third
    assert all(note in str(check_data(tmp_path)) for note in data.notes)


def test_every_suffix_of_an_image_counts(tmp_path):
    for suffix in (".jfif", ".jpe"):
        Image.new("L", (8, 8), 50).save(tmp_path / f"a{suffix}", "JPEG")
    Image.new("L", (8, 8), 50).save(tmp_path / "a.tga")
    _images(tmp_path, 1)
    assert len(open_data(tmp_path)) == 4


def test_links_are_followed_and_loops_are_not(tmp_path):
    far, folder = _images(tmp_path / "far", 3), tmp_path / "d"
    _images(folder / "cat")
    (folder / "dog").symlink_to(far)
    (folder / "cat" / "loop").symlink_to(folder)
    (folder / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    data = open_data(folder)
    assert [name for name in data.names if "gone" not in name] == [
        *(f"cat/{i}.png" for i in range(4)), *(f"dog/{i}.png" for i in range(3)),
    ]  # fmt: skip
    assert "links to folders that are read already are left out: cat/loop" in data.notes
    (unreadable,) = check_data(folder).unreadable
    assert "cat/gone.png: must be readable, got No such file" in unreadable


def test_a_link_never_takes_the_place_of_its_folder(tmp_path):
    _images(tmp_path / "zebra")
    _images(tmp_path / "cat", seed=9)
    (tmp_path / "ant").symlink_to(tmp_path / "zebra")
    data = open_data(tmp_path)
    assert data.class_names == ("cat", "zebra") and len(data) == 8
    assert data.notes == ["links to folders that are read already are left out: ant"]


def test_zips_of_windows_keep_their_classes(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("cat", "dog"):
            for i in range(3):
                info = zipfile.ZipInfo("x")
                info.filename = f"{name}\\{i}.png"
                archive.writestr(info, _png(_noise(i, 8, 8)))
    data = open_data(tmp_path / "a.zip")
    assert data.class_names == ("cat", "dog")
    assert data.images(torch.arange(6))[2] == []


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_one_image_and_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("a.png", "b.png", "a.png"):
            archive.writestr(name, _png(_noise(0, 8, 8)))
    data = open_data(tmp_path / "a.zip")
    assert len(data) == 2
    assert data.notes == ["of members with one name only the last is read: a.png"]


def test_a_file_whose_name_is_not_utf8_is_named(tmp_path, capfdbinary):
    _images(tmp_path / "d")
    with open(os.fsencode(tmp_path / "d") + b"/\xe9t\xe9\x1b[2J.png", "wb"):
        pass
    assert main(["data", "check", str(tmp_path / "d")]) == 1
    said = capfdbinary.readouterr().out
    assert b"5 images, 1 unreadable" in said
    assert rb"/\xe9t\xe9\x1b[2J.png: must be" in said


def test_names_that_are_not_utf8_are_read_and_make_classes(tmp_path):
    for name in (b"\xe9t\xe9", b"hiver"):
        folder = os.fsencode(tmp_path) + b"/" + name
        os.mkdir(folder)
        for i in range(2):
            with open(folder + b"/\xff%d.png" % i, "wb") as file:
                file.write(_png(_noise(i, 8, 8)))
    data = open_data(tmp_path)
    assert data.class_names == ("\\xe9t\\xe9", "hiver")
    assert data.images(torch.arange(4))[2] == []


# ---- where classes come from


def _zip_with_labels(path: Path, labels: Any, count: int = 12) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            archive.writestr(f"{i // 4:05d}/img{i:08d}.png", _png(_noise(i, 8, 8)))
        content = labels if isinstance(labels, str) else json.dumps({"labels": labels})
        archive.writestr("dataset.json", content)
    return path


def _names(count: int = 12) -> list[str]:
    return [f"{i // 4:05d}/img{i:08d}.png" for i in range(count)]


@pytest.mark.parametrize("words", [False, True])
def test_labels_of_dataset_json_are_those_of_the_images(tmp_path, words):
    kinds = ["dog", "cat"] if words else [1, 0]
    entries = [[name, kinds[i % 2]] for i, name in enumerate(_names())]
    path = _zip_with_labels(tmp_path / "a.zip", entries[::-1])
    data = open_data(path)
    assert data.class_names == (("cat", "dog") if words else ("0", "1"))
    assert data.labels(torch.arange(12)).tolist() == [1 - i % 2 for i in range(12)]
    assert data.notes == ["classes are those of dataset.json"]
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "d")
    assert torch.equal(
        open_data(tmp_path / "d").labels(torch.arange(12)), data.labels(torch.arange(12))
    )


@pytest.mark.parametrize("content", ["null", "absent"])
def test_shards_are_no_classes_unless_they_are_said_to_be(tmp_path, content):
    data = open_data(_zip_with_labels(tmp_path / "a.zip", None if content == "null" else "{}"))
    assert data.class_names is None
    assert any("are taken for parts of one set and not for classes" in n for n in data.notes)
    named = open_data(tmp_path / "a.zip", classes="folders")
    assert named.class_names == ("00000", "00001", "00002")


@pytest.mark.parametrize(
    "labels, message",
    [
        ([[name, 0] for name in _names(11)], "must label every image, got none for 1 of 12"),
        ([[name, 0.5] for name in _names()], 'must hold "labels" as a list'),
        ([[name, [0, 1]] for name in _names()], 'must hold "labels" as a list'),
        (
            [[name, "a" if i else 0] for i, name in enumerate(_names())],
            "either numbers .* or names",
        ),
        ([[name, 1 << 70] for name in _names()], "either numbers of 64 bits"),
        ("{", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
    ],
)
def test_other_label_files_are_refused_with_the_ways_round(tmp_path, labels, message):
    path = _zip_with_labels(tmp_path / "a.zip", labels)
    with pytest.raises(ValueError, match=f"dataset.json.*{message}.*classes='folders'"):
        open_data(path)
    assert open_data(path, classes="none").class_names is None


def test_labels_of_images_that_are_not_there_are_named(tmp_path):
    path = _zip_with_labels(tmp_path / "a.zip", [[name, 0] for name in [*_names(), "x.png"]])
    assert "labels 1 images that are not read, such as x.png" in open_data(path).notes[1]


def test_where_classes_come_from_can_be_said(tmp_path):
    for i, name in enumerate(("cat_1", "cat_2", "dog_1", "dog_2")):
        _images(tmp_path / "a", 0)
        Image.fromarray(_noise(i, 8, 8)).save(tmp_path / "a" / f"{name}.png")
    auto = open_data(tmp_path / "a")
    assert auto.notes == ["classes are the names up to the first '_': cat, dog"]
    assert open_data(tmp_path / "a", classes="names").class_names == ("cat", "dog")
    assert open_data(tmp_path / "a", classes="none").class_names is None
    assert open_data(tmp_path, classes="folders").class_names == ("a",)
    for wrong, words in (
        ("folders", "in none"),
        ("file", "without a dataset.json"),
        ("x", "one of"),
    ):
        with pytest.raises(ValueError, match=f"classes must be .*{words}"):
            open_data(tmp_path / "a", classes=wrong)


def test_single_images_in_folders_are_said_to_make_no_classes(tmp_path):
    for name in ("a", "b", "c"):
        _images(tmp_path / name, 1)
    data = open_data(tmp_path)
    assert data.class_names is None and "3 folders of 3 images are not taken" in data.notes[0]


# ---- a number in a file never decides how much memory is taken


@pytest.fixture
def little_memory():
    """A memory limit of half a GiB more than the process has now, at which a greedy reader fails."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_labels_that_are_ids_are_refused_or_become_classes(tmp_path, little_memory):
    labels = np.array([10**9, 7, 7, 10**18])
    np.savez(tmp_path / "a.npz", images=LEVELS, labels=labels)
    with pytest.raises(ValueError, match=r"class numbers from 0, got 10{18} for 4 .*'ids'.*'none'"):
        open_data(tmp_path / "a.npz")
    data = open_data(tmp_path / "a.npz", classes="ids")
    assert data.class_names == ("7", "1000000000", "1000000000000000000")
    assert data.labels(torch.arange(4)).tolist() == [1, 0, 0, 2]
    assert open_data(tmp_path / "a.npz", classes="none").class_names is None
    assert main(["data", "check", str(tmp_path / "a.npz")]) == 1
    entries = [[name, 10**9 + i % 2] for i, name in enumerate(_names())]
    path = _zip_with_labels(tmp_path / "a.zip", entries)
    with pytest.raises(ValueError, match="class numbers from 0"):
        open_data(path)
    assert open_data(path, classes="ids").class_names == ("1000000000", "1000000001")


def _npy(shape: tuple[int, ...], values: bytes, dtype: str = "|u1", padding: int = 0) -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * padding + b"\n"
    return b"\x93NUMPY\x02\0" + struct.pack("<I", len(text)) + text + values


@pytest.mark.parametrize(
    "content",
    [
        _npy((10**6, 100, 100), b"x" * 1000),
        _npy((10**12, 10**12, 3), b"x" * 1000),
        _npy((4, 4, 4), b"x" * 64, dtype=f"|V{10**9}"),
        _npy((4, 4, 4), b"x" * 64, dtype=f"|S{2**31 - 1}"),
        _npy((4, 4, 4), b"x" * 64, padding=50_000),
        _npy((4, 4, 4), b"x" * 63),
        _npy((4, 4, 4), b"x" * 65),
        b"\x93NUMPY\x02\0\xff\xff\xff\xff{",
    ],
)
def test_headers_of_arrays_size_no_memory(tmp_path, content, little_memory):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", content)
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"must be a sound \.npz file"):
        open_data(tmp_path / "a.npz")
    if not content.endswith(b"x" * 65):  # longer than its array: no harm, as it is mapped
        with pytest.raises((ValueError, TypeError)):
            open_data(tmp_path / "a.npy")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<u2", ">u2", ">f4"])
def test_arrays_of_both_orders_and_both_byte_orders_are_read(tmp_path, order, dtype):
    values = np.array(LEVELS * 257.0 if dtype[1] == "u" else LEVELS / 127.5 - 1, dtype, order=order)
    np.savez(tmp_path / "a.npz", images=values)
    assert np.array_equal(_levels(open_data(tmp_path / "a.npz"), 4)[:, 0], LEVELS)


@pytest.mark.parametrize("compress", [False, True])
def test_sizes_of_idx_files_take_no_memory(tmp_path, compress, little_memory):
    path = tmp_path / "train-images-idx3-ubyte"
    for sizes in ((2**32 - 1,) * 3, (10**6, 10, 10)):
        data = bytes([0, 0, 8, 3]) + struct.pack(">3I", *sizes) + b"x" * 100
        path.write_bytes(gzip.compress(data) if compress else data)
        with pytest.raises(ValueError, match=r"read_idx: .* must (hold|unpack to at most)"):
            read_idx(path)


def test_a_gzip_bomb_is_not_unpacked(tmp_path, little_memory):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    header = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 4, 4) + bytes(32)
    # A GiB: members follow one another.
    path.write_bytes(gzip.compress(header) + 64 * gzip.compress(bytes(1 << 24)))
    with pytest.raises(ValueError, match="must hold 48 bytes"):
        read_idx(path)


def test_a_line_of_pixels_is_not_blown_up_to_a_square(tmp_path, little_memory):
    Image.new("L", (1_000_000, 1)).save(tmp_path / "a.png")
    with pytest.raises(BadImage, match="sides more alike for 256x256, got 1000000x1"):
        open_data(tmp_path, image_size=256, bad_images="stop").images(torch.tensor([0]))


def test_large_files_are_refused_unread(tmp_path, little_memory):
    _images(tmp_path)
    with open(tmp_path / "z.png", "wb") as file:
        file.truncate(1 << 40)
    (unreadable,) = check_data(tmp_path).unreadable
    assert "z.png: must have at most 536870912 bytes, got 1099511627776" in unreadable


# ---- the process's settings


def test_default_dtype_and_device_change_nothing(tmp_path):
    from iddpm_ext.data import Order, batches

    for name in ("a", "b"):
        _images(tmp_path / "d" / name)
    np.savez(tmp_path / "a.npz", images=LEVELS, labels=np.array([0, 1, 1, 0]))
    sources = (tmp_path / "d", tmp_path / "a.npz")

    def read() -> list[Any]:
        found = []
        for path in sources:
            data = open_data(path)
            found += list(batches(data, Order(len(data), 0), [[0, 1], [5, 2]]))
            found.append(check_data(path))
        return found

    want = read()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        got = read()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for a, b in zip(want, got, strict=True):
        if not hasattr(a, "images") or isinstance(a.images, int):
            assert a == b
            continue
        assert a.images.dtype == b.images.dtype and torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels) and torch.equal(a.positions, b.positions)


# ---- names decide which class of a network is meant


@pytest.mark.parametrize(
    "names, used, network, classes, expected",
    [
        (("bag", "boot"), [0, 1], ("boot", "hat", "bag"), 3, [2, 0]),
        (("bag", "hen"), [0], ("boot", "hat", "bag"), 3, [2, -1]),
        (("0", "1", "2"), [0, 2], ("boot", "hat", "bag"), 3, [0, -1, 2]),
        (("0", "2"), [0, 1], None, 3, [0, 2]),
        (("cat", "dog"), [0, 1], None, 2, [0, 1]),
        (("17", "42"), [0, 1], ("5", "17", "42"), 3, [1, 2]),
    ],
)
def test_classes_are_matched_by_name(names, used, network, classes, expected):
    assert match_classes("nll", names, used, network, classes).tolist() == expected


@pytest.mark.parametrize(
    "names, network, classes, message",
    [
        (("bag", "hen"), ("boot", "bag"), 2, r"of the network \(boot, bag\), got hen"),
        (("0", "1"), ("5", "17"), 2, r"\(5, 17\), got 0, 1"),
        (("cat", "dog"), None, 3, r"\(3 without names\), got cat, dog"),
        (("0", "3"), None, 3, "below the network's 3, got 3"),
    ],
)
def test_other_classes_are_refused_by_name(names, network, classes, message):
    with pytest.raises(ValueError, match=f"nll: data must have classes .*{message}"):
        match_classes("nll", names, range(len(names)), network, classes)


def test_array_data_says_its_errors_by_argument():
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 1\], got 0 .. 2"):
        ArrayData(LEVELS, np.array([0, 1, 2, 0]), ("a", "b"))
    with pytest.raises(ValueError, match="classes must be one of auto, ids, none, got 'folders'"):
        ArrayData(LEVELS, np.array([0, 1, 2, 0]), classes="folders")


# ---- Hugging Face data sets, by a stand-in for their library


class _Rows:
    """What is asked of a `datasets.Dataset`."""

    def __init__(self, columns: dict[str, list[Any]], features: dict[str, Any]):
        self._columns, self.features = columns, features

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._columns[key]
        return {name: values[key] for name, values in self._columns.items()}

    def cast_column(self, name: str, kind: Any) -> _Rows:
        assert not kind.decode
        return self


@pytest.fixture
def hub(monkeypatch):
    """A function that says what every load gives: images as files, and columns of class labels."""

    class Feature:
        def __init__(self, names: list[str] | None = None, decode: bool = True):
            self.names, self.decode = names, decode

    image, label = type("Image", (Feature,), {}), type("ClassLabel", (Feature,), {})

    def given(files: list[bytes], **labels: list[int]) -> None:
        columns: dict[str, list[Any]] = {
            "img": [{"bytes": f, "path": None} for f in files],
            **labels,
        }
        features = {"img": image(), **{name: label(["cat", "dog"]) for name in labels}}
        library = types.ModuleType("datasets")
        members = {
            "Image": image, "ClassLabel": label, "DatasetDict": dict,
            "load_dataset": lambda name, split: _Rows(columns, features),
        }  # fmt: skip
        vars(library).update(members)
        monkeypatch.setitem(sys.modules, "datasets", library)

    return given


def test_hub_images_are_read_as_files_are(hub):
    images = [_noise(i, 6, 6, 3) for i in range(4)]
    hub([_png(image) for image in images], label=[0, 1, 1, 0])
    data = open_data("hf:someone/pets")
    assert data.class_names == ("cat", "dog") and data.image_shape == (3, 6, 6)
    assert data.labels(torch.arange(4)).tolist() == [0, 1, 1, 0]
    assert np.array_equal(_levels(data, 4).transpose(0, 2, 3, 1), images)
    assert open_data("hf:someone/pets", classes="none").class_names is None
    assert open_data("hf:someone/pets", image_size=4).notes == [
        "images of 6x6 are resized and cropped to 4x4"
    ]


def test_of_several_columns_of_classes_one_must_be_named(hub):
    hub([_png(_noise(i, 6, 6)) for i in range(2)], fine=[0, 1], coarse=[1, 1])
    with pytest.raises(ValueError, match="'none' or one of the columns fine, coarse, got 'auto'"):
        open_data("hf:someone/pets")
    data = open_data("hf:someone/pets", classes="coarse")
    assert data.labels(torch.arange(2)).tolist() == [1, 1]


def test_hub_images_that_are_unclear_are_refused(hub):
    hub([_png(_noise(0, 6, 6)), _png(_noise(0, 8, 8))])
    with pytest.raises(
        ValueError, match="image_size must be given where sizes differ, got 6x6 and 8x8"
    ):
        open_data("hf:someone/pets")
    hub([_png(np.full((6, 6, 4), 7, np.uint8))])
    with pytest.raises(BadImage, match=r"someone/pets\[0\]: must be opaque"):
        open_data("hf:someone/pets")
    hub([_png(_noise(0, 6, 6))], label=[-1])
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 1\], got -1"):
        open_data("hf:someone/pets")

"""Readers of image data: every format, resizing, labels, order, and what damaged input gets."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from iddpm_ext.data import (
    ArrayData,
    BadImage,
    FileData,
    Order,
    batches,
    check_data,
    empty_classes,
    open_data,
)
from iddpm_ext.data import image as image_module
from iddpm_ext.data.image import Reading, fit, open_image, to_array


def _png(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def _noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _classes(folder: Path, counts: dict[str, int], size: int = 8) -> Path:
    for k, (name, count) in enumerate(counts.items()):
        for i in range(count):
            _png(folder / name / f"{i}.png", _noise(100 * k + i, size, size, 3))
    return folder


def _write_idx(path: Path, array: np.ndarray, compress: bool) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.tobytes()
    path.write_bytes(gzip.compress(data) if compress else data)


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_keep_values_and_labels(tmp_path, compress):
    images, labels = _noise(0, 5, 6, 7), np.array([0, 2, 1, 2, 0], np.uint8)
    suffix = ".gz" if compress else ""
    _write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", images, compress)
    _write_idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", labels, compress)
    data = open_data(tmp_path)
    x, used, complaints = data.images(torch.tensor([3, 0]))
    assert data.image_shape == (1, 6, 7) and len(data) == 5 and complaints == []
    assert torch.equal(((x + 1) * 127.5).round().byte()[:, 0], torch.from_numpy(images[[3, 0]]))
    assert data.labels(used).tolist() == [2, 0]


def test_truncated_idx_is_refused_by_its_size(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    _write_idx(path, _noise(0, 5, 6, 7), False)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="must hold 226 bytes"):
        open_data(tmp_path)


@pytest.mark.parametrize("shape", [(4, 6, 6), (4, 6, 6, 3), (4, 3, 6, 6), (4, 1, 6, 6)])
def test_numpy_arrays_of_every_layout_are_read(tmp_path, shape):
    images = _noise(1, *shape)
    np.savez(tmp_path / "a.npz", arr_0=images, arr_1=np.array([0, 1, 1, 0]))
    np.save(tmp_path / "a.npy", images)
    a, b = open_data(tmp_path / "a.npz"), open_data(tmp_path / "a.npy")
    expected = (
        images
        if images.ndim == 4 and shape[1] != 6
        else images.reshape(4, 6, 6, -1).transpose(0, 3, 1, 2)
    )
    index = torch.arange(4)
    assert np.array_equal(((a.images(index)[0] + 1) * 127.5).round().byte(), expected)
    assert torch.equal(a.images(index)[0], b.images(index)[0])
    assert a.labels(index).tolist() == [0, 1, 1, 0] and b.labels(index) is None


def test_sixteen_bit_arrays_keep_their_precision(tmp_path):
    values = np.arange(16, dtype=np.uint16).reshape(1, 4, 4) + 40_000
    np.save(tmp_path / "a.npy", values)
    x = open_data(tmp_path / "a.npy").images(torch.tensor([0]))[0]
    assert torch.equal(
        ((x + 1) * 32767.5).round().int().flatten(), torch.arange(40_000, 40_016, dtype=torch.int32)
    )


def test_pickled_arrays_are_never_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.array([{"a": 1}], dtype=object))
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object))
    for name in ("a.npz", "a.npy"):
        with pytest.raises(ValueError, match="open_data"):
            open_data(tmp_path / name)


def test_archives_larger_than_memory_are_refused_unread(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((100, 32, 32, 3), np.uint8))
    monkeypatch.setattr("iddpm_ext.data.memory.free_memory", lambda: 10_000)
    with pytest.raises(ValueError, match="free memory"):
        open_data(tmp_path / "a.npz")


def test_cifar_batches_give_planes_and_names(tmp_path):
    records = _noise(2, 6, 3073)
    records[:, 0] = [0, 1, 2, 1, 0, 2]
    (tmp_path / "data_batch_1.bin").write_bytes(records[:4].tobytes())
    (tmp_path / "data_batch_2.bin").write_bytes(records[4:].tobytes())
    (tmp_path / "batches.meta.txt").write_text("plane\ncar\nbird\n\n")
    data = open_data(tmp_path)
    assert data.class_names == ("plane", "car", "bird") and len(data) == 6
    assert data.labels(torch.arange(6)).tolist() == [0, 1, 2, 1, 0, 2]
    x = data.images(torch.tensor([5]))[0]
    assert np.array_equal(((x + 1) * 127.5).round().byte().flatten(), records[5, 1:])


def test_cut_cifar_file_is_refused(tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3072))
    with pytest.raises(ValueError, match="whole records of 3073"):
        open_data(tmp_path)


def test_folder_and_zip_of_it_give_the_same(tmp_path):
    folder = _classes(tmp_path / "d", {"cat": 3, "dog": 2})
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, f"d/{path.relative_to(folder)}")
    a, b = open_data(folder), open_data(tmp_path / "d.zip")
    index = torch.arange(5)
    assert a.class_names == b.class_names == ("cat", "dog")
    assert a.labels(index).tolist() == b.labels(index).tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(a.images(index)[0], b.images(index)[0])


def test_only_the_asked_split_is_read(tmp_path):
    _classes(tmp_path / "train", {"a": 2, "b": 2})
    _classes(tmp_path / "test", {"a": 1, "b": 1})
    assert len(open_data(tmp_path)) == 4 and len(open_data(tmp_path, split="test")) == 2
    assert open_data(tmp_path).class_names == ("a", "b")


def test_class_is_the_file_names_prefix_in_a_flat_folder(tmp_path):
    for name in ("dog_1.png", "cat_1.png", "cat_2.png", "dog_7.png"):
        _png(tmp_path / name, _noise(0, 4, 4))
    data = open_data(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.labels(torch.arange(4)).tolist() == [0, 0, 1, 1]


def test_unrelated_file_names_make_no_classes(tmp_path):
    for name in ("1_a.png", "2_b.png", "3_c.png"):
        _png(tmp_path / name, _noise(0, 4, 4))
    assert open_data(tmp_path).class_names is None


def test_grey_files_give_one_channel_and_mixed_ones_three(tmp_path):
    _png(tmp_path / "a.png", _noise(0, 4, 4))
    assert open_data(tmp_path).image_shape == (1, 4, 4)
    _png(tmp_path / "b.png", _noise(0, 4, 4, 3))
    assert open_data(tmp_path).image_shape == (3, 4, 4)
    assert open_data(tmp_path, channels=1).image_shape == (1, 4, 4)


def test_sixteen_bit_png_keeps_its_values(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    x = open_data(tmp_path).images(torch.tensor([0]))[0]
    assert torch.equal(
        ((x[0, 0] + 1) * 32767.5).round().int(), torch.from_numpy(ramp.astype(np.int32))
    )


def _original_resize(image: Image.Image, size: int) -> np.ndarray:
    """The published rule, step by step: halve by averaging, then bicubic, then the middle."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize("height, width", [(70, 33), (16, 16), (9, 40), (5, 7), (128, 64)])
def test_resize_and_crop_are_the_originals(height, width):
    image = Image.fromarray(_noise(3, height, width, 3))
    assert np.array_equal(np.asarray(fit(image, (16, 16))), _original_resize(image, 16))


def test_arrays_are_resized_like_files():
    image = (
        64 + _noise(4, 40, 30) // 2
    )  # in the middle, so that nothing is cut off between the passes
    data = ArrayData(image[None], image_size=16)
    got = data.images(torch.tensor([0]))[0][0, 0].numpy()
    expected = to_array(Image.fromarray(image), 1, (16, 16))[..., 0]
    assert data.image_shape == (1, 16, 16)
    # Pillow resizes rows, then columns, and rounds 8-bit images to whole levels after each; floating ones it
    # does not. The second pass weighs the half level of the first with the sum of its weights' sizes.
    weights = Image.fromarray(np.eye(40, dtype=np.float32)).resize((40, 21), Image.BICUBIC)
    amplified = np.abs(np.asarray(weights)).sum(1).max()
    assert np.abs(got - expected).max() <= (0.5 * amplified + 0.5) / 127.5 + 2e-6


def _damaged(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(_noise(5, 32, 32, 3)).save(file, "PNG" if "png" in kind else "JPEG")
    data = file.getvalue()
    return {
        "empty": b"",
        "text": b"hello, this is no image",
        "cut png": data[: len(data) // 2],
        "cut jpeg": data[: len(data) // 2],
        "png with damage": data[:60] + bytes(40) + data[100:],
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "cut png", "cut jpeg", "png with damage"])
def test_damaged_images_are_named(kind):
    with pytest.raises(BadImage, match=r"^somewhere/x\.png: must be"):
        open_image(_damaged(kind), "somewhere/x.png")


def test_decompression_bombs_are_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(image_module, "MAX_PIXELS", 1000)
    file = io.BytesIO()
    Image.new("L", (50, 50)).save(file, "PNG")
    with pytest.raises(BadImage, match="at most 1000 pixels, got 50x50"):
        open_image(file.getvalue(), "x")


def test_orientation_of_photographs_is_applied():
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(file, "JPEG", exif=exif)
    assert open_image(file.getvalue(), "x").size == (2, 4)


@pytest.mark.parametrize("mode", ["1", "P", "RGBA", "CMYK", "LA", "I", "F"])
def test_every_mode_becomes_the_asked_channels(mode):
    image = Image.new("L", (4, 4), 128).convert(mode)
    reading = Reading((0, 255)) if mode == "F" else None
    for channels in (1, 3):
        array = to_array(image, channels, (2, 2), reading)
        assert array.shape == (2, 2, channels) and array.dtype == np.float32
        assert array.min() >= -1 and array.max() <= 1


def test_unreadable_image_is_replaced_by_the_next_with_its_label(tmp_path):
    _classes(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a" / "1.png").write_bytes(b"no image")
    data = open_data(tmp_path)
    x, used, complaints = data.images(torch.tensor([0, 1]))
    assert used.tolist() == [0, 2] and data.labels(used).tolist() == [0, 1]
    assert len(complaints) == 1 and "a/1.png" in complaints[0]
    assert torch.equal(x[1], data.images(torch.tensor([2]))[0][0])


def test_stop_policy_raises_at_an_unreadable_image(tmp_path):
    _classes(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(BadImage, match=r"a/1\.png"):
        open_data(tmp_path, bad_images="stop")


def test_nothing_readable_is_an_error_not_a_loop(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(BadImage, match="must hold readable images"):
        open_data(tmp_path)


def test_differing_sizes_ask_for_image_size(tmp_path):
    _png(tmp_path / "a.png", _noise(0, 4, 4))
    _png(tmp_path / "b.png", _noise(0, 4, 6))
    with pytest.raises(ValueError, match="image_size must be given"):
        open_data(tmp_path).images(torch.tensor([0, 1]))
    assert open_data(tmp_path, image_size=4).images(torch.tensor([0, 1]))[0].shape == (2, 1, 4, 4)


def test_cut_zip_and_unknown_paths_are_refused(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name, words in {
        "a.zip": "complete zip",
        "notes.txt": "folder, .zip",
        "empty": "image files",
    }.items():
        with pytest.raises(ValueError, match=words):
            open_data(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="must exist"):
        open_data(tmp_path / "nowhere")


def test_zip_members_that_point_outside_are_left_out(tmp_path):
    file = io.BytesIO()
    Image.fromarray(_noise(0, 4, 4)).save(file, "PNG")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../../evil.png", file.getvalue())
        archive.writestr("good.png", file.getvalue())
    assert len(open_data(tmp_path / "a.zip")) == 1
    assert not list(tmp_path.parent.parent.glob("evil.png"))


def test_order_is_a_permutation_a_pass_and_depends_on_the_seed_alone():
    order = Order(7, seed=3)
    first, second = order.at(torch.arange(7)), order.at(torch.arange(7, 14))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(7))
    assert not torch.equal(first, second)
    assert torch.equal(Order(7, seed=3).at(torch.arange(5, 12)), torch.cat([first[5:], second[:5]]))
    assert not torch.equal(
        Order(100, seed=4).at(torch.arange(100)), Order(100, seed=3).at(torch.arange(100))
    )


def test_workers_change_nothing(tmp_path):
    data = open_data(_classes(tmp_path, {"a": 3, "b": 3}))
    positions = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    alone = list(batches(data, Order(6, 0), positions))
    helped = list(batches(data, Order(6, 0), positions, workers=2))
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        assert torch.equal(a.positions, b.positions)


def test_reading_leaves_the_global_generator_alone(tmp_path):
    data = open_data(_classes(tmp_path, {"a": 2, "b": 2}))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    next(batches(data, Order(4, 0), [[0, 1]]))
    assert torch.equal(torch.rand(1), expected)


def test_report_counts_what_training_would_trip_over(tmp_path):
    _classes(tmp_path, {"a": 3, "b": 2})
    _png(tmp_path / "b" / "grey.png", _noise(0, 8, 6))
    (tmp_path / "a" / "broken.png").write_bytes(b"")
    (tmp_path / "c").mkdir()
    report = check_data(tmp_path)
    assert report.images == 7 and len(report.unreadable) == 1 and not report.sound
    assert report.sizes == {"8x8": 5, "6x8": 1} and report.channels == {"3": 5, "1": 1}
    assert report.classes == {"a": 3, "b": 3} and report.empty_classes == ["c"]
    text = str(report)
    assert "broken.png" in text and "--image-size" in text and "empty class: c" in text


def test_report_on_sound_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=_noise(0, 4, 6, 6), arr_1=np.array([0, 1, 1, 0]))
    report = check_data(tmp_path / "a.npz")
    assert report.sound and report.classes == {"0": 2, "1": 2}


def test_bad_arguments_are_named(tmp_path):
    for kwargs in ({"split": "dev"}, {"image_size": 0}, {"channels": 2}):
        with pytest.raises(ValueError, match=f"open_data: {next(iter(kwargs))} must"):
            open_data(tmp_path, **kwargs)


def test_zip_data_travels_to_another_process(tmp_path):
    import pickle

    folder = _classes(tmp_path / "d", {"cat": 2, "dog": 2})
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, str(path.relative_to(folder)))
    data = open_data(tmp_path / "d.zip")
    assert isinstance(data, FileData)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.images(torch.arange(4))[0], data.images(torch.arange(4))[0])


def test_hub_data_sets_saved_to_disk_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(_noise(i, 6, 6, 3)) for i in range(4)]
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = datasets.Dataset.from_dict({"img": images, "label": [0, 1, 1, 0]}, features=features)
    rows.save_to_disk(tmp_path / "d")
    data = open_data(tmp_path / "d")
    x, used, _ = data.images(torch.tensor([2]))
    assert data.class_names == ("cat", "dog") and data.labels(used).tolist() == [1]
    assert np.array_equal(
        ((x[0] + 1) * 127.5).round().byte().permute(1, 2, 0), np.asarray(images[2])
    )


def test_one_image_of_another_size_counts_as_unreadable(tmp_path):
    for i in range(130):  # 64 are looked at, among them neither the second nor the third
        _png(tmp_path / f"{i:03}.png", _noise(i, 4, 6 if i == 1 else 4))
    data = open_data(tmp_path)
    x, used, complaints = data.images(torch.tensor([0, 1]))
    assert used.tolist() == [0, 2] and x.shape == (2, 1, 4, 4)
    assert len(complaints) == 1 and "001.png: must be 4x4" in complaints[0]
    with pytest.raises(BadImage, match=r"001\.png: must be 4x4 like the others, or image_size"):
        open_data(tmp_path, bad_images="stop").images(torch.tensor([1]))


def test_what_pillow_calls_a_bomb_is_told_by_our_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    file = io.BytesIO()
    Image.new("L", (50, 50)).save(file, "PNG")
    with pytest.raises(BadImage, match="at most 100000000 pixels, got a decompression bomb"):
        open_image(file.getvalue(), "x")


def test_empty_classes_are_told_of_folders_zips_and_labels(tmp_path):
    folder = _classes(tmp_path / "d", {"ab": 2, "c": 2})
    for name in ("a", "b", "z"):
        (folder / name).mkdir()
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    np.savez(tmp_path / "d.npz", images=_noise(0, 4, 6, 6), labels=np.array([0, 3, 3, 0]))
    expected = {"d": ["a", "b", "z"], "d.zip": ["a", "b", "z"], "d.npz": ["1", "2"]}
    for name, empty in expected.items():
        assert empty_classes(open_data(tmp_path / name)) == empty
        report = check_data(tmp_path / name)
        assert report.empty_classes == empty and not report.sound

"""Tar shards in WebDataset's convention and LMDB databases: read, labelled, shared out and resumed."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from iddpm_ext.checkpoint.runs import read_tensors
from iddpm_ext.data import BadImage, Order, batches, check_data, open_data
from iddpm_ext.training import TrainConfig, train
from iddpm_ext.training.step import positions_of


def png(seed: int, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(seed, size)).save(file, "PNG")
    return file.getvalue()


def pixels(seed: int, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path) -> Path:
    """11 images in three shards of different lengths, of the classes 0 and 2."""
    numbers = iter(range(11))
    for shard, count in enumerate((5, 4, 2)):
        files = {}
        for _ in range(count):
            i = next(numbers)
            files[f"{i:04}.png"] = png(i)
            files[f"{i:04}.cls"] = str(2 * (i % 2)).encode()
        write_tar(tmp_path / f"s-{shard:02}.tar", files)
    return tmp_path


def levels(x: torch.Tensor) -> np.ndarray:
    return ((x[:, 0] + 1) * 127.5).round().byte().numpy()


@pytest.mark.parametrize("pattern", ["s-{00..02}.tar", "s-{00,01,02}.tar", ""])
def test_images_and_classes_are_those_that_were_written(shards, pattern):
    data = open_data(f"{shards}/{pattern}" if pattern else shards)
    assert len(data) == 11 and data.class_names == ("0", "1", "2")
    at = torch.tensor([10, 0, 7])
    x, used, complaints = data.images(at)
    assert complaints == [] and used.tolist() == at.tolist()
    for image, i in zip(levels(x), at.tolist(), strict=True):
        assert np.array_equal(image, pixels(i))
    assert data.labels(at).tolist() == [0, 0, 2]
    assert "classes are those of the .cls files" in data.notes
    assert not any("suffix" in note for note in data.notes)
    assert len(open_data(f"{shards}/s-01.tar")) == 4
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.images(at)[0], x)
    report = check_data(f"{shards}/s-{{00..02}}.tar")
    assert report.images == 11 and report.classes == {"0": 6, "2": 5}


@pytest.mark.parametrize("workers", [0, 2])
def test_every_rank_has_its_even_share_of_all_shards(shards, workers):
    data = open_data(shards)
    config = TrainConfig(data="d", out="o", batch_size=4)
    seen: list[int] = []
    for rank in range(2):
        parts = positions_of(config, 0, rank, 2)
        source = batches(data, Order(11, 3), parts, workers)
        for _ in range(11):  # 44 positions of both, four passes
            batch = next(source)
            assert len(batch.images) == 2
            seen += [next(i for i in range(11) if np.array_equal(image, pixels(i)))
                     for image in levels(batch.images)]  # fmt: skip
    assert np.bincount(seen).tolist() == [4] * 11


def run_of(data: str, out: Path, **changes) -> TrainConfig:
    return TrainConfig(**{
        "data": data, "out": str(out), "steps": 4, "batch_size": 4, "ema": (0.9,), "model_channels": 32,
        "num_res_blocks": 1, "channel_mult": (1,), "attention_resolutions": (), "diffusion_steps": 20,
        "sample_every": 0, "progress": False, "device": "cpu", **changes,
    })  # fmt: skip


def assert_resumes(config: TrainConfig) -> None:
    """A run that is stopped and goes on ends as one in one go does."""
    whole, again = train(config), replace(config, out=f"{config.out}-again")
    train(replace(again, steps=2))
    resumed = train(again)
    for file in ("model.safetensors", "optim.safetensors"):
        ours, theirs = read_tensors(whole, file), read_tensors(resumed, file)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_training_on_shards_resumes_bit_for_bit(shards, tmp_path):
    assert_resumes(
        run_of(f"{shards}/s-{{00..02}}.tar", tmp_path / "run", class_cond=True, flip=True)
    )


def test_labels_come_from_json_folders_and_names(tmp_path):
    samples = {f"{i}.png": png(i) for i in range(4)}
    labels = {f"{i}.json": json.dumps({"label": "cat" if i < 2 else "dog"}) for i in range(4)}
    write_tar(tmp_path / "a.tar", samples | {n: t.encode() for n, t in labels.items()})
    data = open_data(tmp_path / "a.tar")
    assert data.class_names == ("cat", "dog")
    assert data.labels(torch.arange(4)).tolist() == [0, 0, 1, 1]
    assert open_data(tmp_path / "a.tar", classes="none").class_names is None
    nested = {f"x/{name}/{i}.png": png(i) for name in ("cat", "dog") for i in range(2)}
    write_tar(tmp_path / "b.tar", nested)
    assert open_data(tmp_path / "b.tar").class_names == ("cat", "dog")
    # The same names in several shards are told apart, and then folders are no classes.
    for name in ("c-0", "c-1"):
        write_tar(tmp_path / f"{name}.tar", nested)
    both = open_data(f"{tmp_path}/c-{{0..1}}.tar")
    assert len(both) == 8 and both.class_names is None
    assert any("names occur in several shards" in note for note in both.notes)
    ids = {f"{i}.cls": str(10**6 + i % 2).encode() for i in range(4)}
    write_tar(tmp_path / "d.tar", samples | ids)
    with pytest.raises(ValueError, match="classes='ids'"):
        open_data(tmp_path / "d.tar")
    assert open_data(tmp_path / "d.tar", classes="ids").class_names == ("1000000", "1000001")


def test_what_is_wrong_with_a_shard_is_said_when_it_is_opened(shards, tmp_path):
    whole = (shards / "s-00.tar").read_bytes()
    cases = {
        "cut.tar": (whole[:1800], "must be a sound, uncompressed tar archive"),
        "none.tar": (b"", "must be a sound, uncompressed tar archive"),
        "text.tar": (b"no archive" * 100, "must be a sound, uncompressed tar archive"),
    }
    for name, (content, says) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=says):
            open_data(tmp_path / name)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.add(shards / "s-00.tar", "x")
    with pytest.raises(ValueError, match="must be a sound, uncompressed tar archive"):
        open_data(tmp_path / "packed.tar")
    with pytest.raises(FileNotFoundError, match=r"got 2 of 5 that do not, such as .*s-03\.tar"):
        open_data(f"{shards}/s-{{00..04}}.tar")
    two = {"0.png": png(0), "0.mask.png": png(1)}
    some = {"0.png": png(0), "1.png": png(1), "0.cls": b"1"}
    empty = {"0.png": png(0), "0.cls": b""}
    broken = {"0.png": png(0), "0.json": b"{"}
    for files, says in (
        (two, r"a sample must have one image, got 0\.mask\.png, 0\.png"),
        (some, r"every sample must have a \.cls file where some have, got none for 1\.png"),
        (empty, r"every \.cls file must hold a class, .* got ''"),
        (broken, r"0\.json must be JSON"),
    ):
        write_tar(tmp_path / "x.tar", files)
        with pytest.raises(ValueError, match=says):
            open_data(tmp_path / "x.tar")
    with pytest.raises(ValueError, match="a sample must have one image"):
        write_tar(tmp_path / "x.tar", two)
        open_data(tmp_path / "x.tar", classes="none")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for _ in range(2):
            member = tarfile.TarInfo("0.png")
            member.size = len(png(0))
            archive.addfile(member, io.BytesIO(png(0)))
    with pytest.raises(ValueError, match=r"must hold every name once, got 0\.png twice"):
        open_data(tmp_path / "x.tar")


def test_links_in_a_shard_lead_nowhere(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for i in range(2):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(png(i))
            archive.addfile(member, io.BytesIO(png(i)))
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    data = open_data(tmp_path / "x.tar")
    assert len(data) == 2
    assert "left out of x.tar: 1 links and special files" in data.notes


# ---- LMDB


def write_lmdb(path: Path, entries: dict[bytes, bytes]) -> None:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as t:
        for key, value in entries.items():
            t.put(key, value)


def test_lmdb_images_are_read_by_their_keys_and_training_resumes(tmp_path):
    entries = {f"{'cat' if i < 3 else 'dog'}_{i}".encode(): png(i) for i in range(6)}
    write_lmdb(tmp_path / "d", entries | {b"__len__": b"6", b"length": b"6"})
    data = open_data(tmp_path / "d")
    assert len(data) == 6 and data.class_names == ("cat", "dog")
    assert "left out, as they are no images: __len__, length" in data.notes
    x, _, _ = data.images(torch.arange(6))
    assert all(np.array_equal(image, pixels(i)) for i, image in enumerate(levels(x)))
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.images(torch.arange(6))[0], x)
    assert check_data(tmp_path / "d").sound
    assert_resumes(run_of(str(tmp_path / "d"), tmp_path / "run", class_cond=True, workers=2))
    # LSUN's keys are digests: no classes.
    write_lmdb(tmp_path / "e", {bytes(f"{i:040x}", "ascii"): png(i) for i in range(4)})
    assert open_data(tmp_path / "e").class_names is None
    assert len(open_data(tmp_path / "e" / "data.mdb")) == 4


def test_lmdb_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    write_lmdb(tmp_path / "d", {b"0": pickle.dumps([1, 2]), b"1": pickle.dumps([3])})
    with pytest.raises(BadImage, match="must be an image, got a file of no known format"):
        open_data(tmp_path / "d")
    (tmp_path / "bad.mdb").write_bytes(b"nothing" * 1000)
    with pytest.raises(ValueError, match=r"bad\.mdb must be an LMDB database"):
        open_data(tmp_path / "bad.mdb")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ImportError, match="need the library `lmdb`: pip install lmdb"):
        open_data(tmp_path / "d")

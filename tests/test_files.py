"""Atomic writing on all file systems and under all names; folders that one run locks."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import iddpm_ext
from iddpm_ext import UNet, UNetConfig, files, load, save, save_images
from iddpm_ext.engines.cpu.algorithms import load_table, user_table_path
from iddpm_ext.text import duration, printable

SMALL = UNetConfig(image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1,),
                   attention_resolutions=())  # fmt: skip
# 255 bytes, the most that Linux takes; one of them of no encoding.
LONGEST = "é" * 121 + "\udcff" + ".safetensors"


def failing_fsync(monkeypatch: pytest.MonkeyPatch, code: int, *, folders: bool) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
@pytest.mark.parametrize("folders", [True, False])
def test_what_cannot_be_flushed_is_kept_and_told(tmp_path, monkeypatch, code, folders):
    failing_fsync(monkeypatch, code, folders=folders)
    with pytest.warns(UserWarning, match="cannot be flushed to disk"):
        save(UNet(SMALL), tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors").config == SMALL
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_flush_that_fails_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    failing_fsync(monkeypatch, errno.EIO, folders=False)
    with pytest.raises(OSError, match="Input/output error"):
        save(UNet(SMALL), tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []


def test_training_goes_on_where_folders_cannot_be_flushed(tmp_path, monkeypatch):
    from iddpm_ext.checkpoint.runs import verify_checkpoint
    from iddpm_ext.training.checkpoints import write_checkpoint

    failing_fsync(monkeypatch, errno.EINVAL, folders=True)
    with pytest.warns(UserWarning, match="cannot be flushed to disk"):
        path = write_checkpoint(tmp_path, 3, {"a": ({"x": torch.zeros(2)}, None)}, {}, keep=1)
    assert verify_checkpoint(path) is None


def test_names_as_long_as_the_system_allows_and_of_any_bytes_are_written(tmp_path):
    assert len(os.fsencode(LONGEST)) == 255
    (tmp_path / LONGEST).touch()
    save(UNet(SMALL), tmp_path / LONGEST)
    assert load(tmp_path / LONGEST).config == SMALL
    x = torch.zeros(2, 1, 8, 8)
    for name in (LONGEST.replace(".safetensors", "abcdefgh.png"),
                 LONGEST.replace(".safetensors", "abcdefgh.npz"),
                 LONGEST.replace(".safetensors", "abcdefghijkl")):  # fmt: skip
        assert len(os.fsencode(name)) == 255
        assert save_images(x, tmp_path / name).exists()
    animation = tmp_path / LONGEST.replace(".safetensors", "abcdefg.webp")
    assert iddpm_ext.save_animation([x, x], animation).exists()
    assert len(os.listdir(tmp_path)) == 5


def test_a_name_that_cannot_be_printed_does_not_end_a_verb_after_its_work(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.png"
    command = [sys.executable, "-m", "iddpm_ext", "sample", "--n", "1", "--steps", "2", "--out"]
    done = subprocess.run(
        [*map(os.fsencode, command), name], capture_output=True, timeout=300,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert b"\\udcff.png: 1 images" in done.stdout
    assert os.path.exists(name)


@pytest.fixture
def no_cache(monkeypatch) -> None:
    """A home in which no folder can be made, even by root."""
    monkeypatch.setenv("HOME", "/proc/sys")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def test_evaluate_gives_its_numbers_without_a_cache_and_says_so(no_cache):
    images = torch.rand(16, 3, 8, 8) * 2 - 1
    with pytest.warns(UserWarning, match="cache must be a folder .* got /proc/sys"):
        found = iddpm_ext.evaluate(images, _folder(images), extractor="pixels", metrics=("fid",),
                                   resamples=0, progress=False)  # fmt: skip
    assert found.scores


def _folder(images: torch.Tensor) -> Path:
    import tempfile

    folder = Path(tempfile.mkdtemp()) / "reference"
    return save_images(images, folder)


def test_tune_says_before_it_measures_that_nothing_can_be_written(no_cache, monkeypatch):
    from iddpm_ext.engines.cpu import tune

    monkeypatch.setattr(tune, "measure", lambda *_: pytest.fail("measured first"))
    with pytest.raises(OSError):
        tune.tune(UNet(SMALL), [1])


def test_a_user_without_a_home_has_no_cache_and_that_is_all(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert files.cache_folder() is None and user_table_path("x") is None
    iddpm_ext.sampling.tune  # noqa: B018 (imports the engines)
    monkeypatch.setattr(Path, "read_text", lambda *_: (_ for _ in ()).throw(PermissionError(13)))
    with pytest.warns(UserWarning, match="is ignored: it cannot be read"):
        assert load_table(tmp_path / "x.json") == {}


def test_a_folder_in_use_is_refused_and_free_again_after_its_run(tmp_path):
    folder = tmp_path / "deep" / "run"
    code = (
        "import sys, pathlib, iddpm_ext.files as f\n"
        "with f.locked(pathlib.Path(sys.argv[1]), 'train'): print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(RuntimeError, match=f"use by no other run.*process {holder.pid} on"):
        with files.locked(folder, "train"):
            pass
    holder.kill()
    holder.wait()
    with files.locked(folder, "train"):
        with pytest.raises(RuntimeError, match="which this process works in"):
            with files.locked(folder, "train"):
                pass
    # The killed holder's folder stays, without the lock; what is made for a lock goes with it.
    assert os.listdir(folder) == []
    with files.locked(tmp_path / "new" / "run", "train"):
        assert (tmp_path / "new" / "run" / "lock").exists()
    assert not (tmp_path / "new").exists()


def test_where_there_are_no_locks_the_user_is_told(tmp_path, monkeypatch):
    import fcntl

    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.warns(UserWarning, match="cannot be locked .* no second run"):
        with files.locked(tmp_path, "train"):
            pass


def test_two_runs_of_nll_do_not_write_one_journal(tmp_path):
    from iddpm_ext.likelihood.journal import Journal

    with Journal(tmp_path / "state", "00", 0, 2):
        with pytest.raises(RuntimeError, match="in use by no other run"):
            Journal(tmp_path / "state", "01", 0, 2)
        with Journal(tmp_path / "state", "00", 1, 2):  # another process of the same run
            pass
    with Journal(tmp_path / "state", "00", 0, 2) as journal:
        journal.remove()
    assert not (tmp_path / "state").exists()


def test_a_name_beside_the_longest_one_is_no_longer():
    assert files.beside(Path("a/x.safetensors"), ".steps") == Path("a/x.safetensors.steps")
    long = files.beside(Path("a") / LONGEST, ".steps")
    assert len(os.fsencode(long.name)) <= 255 and long.name.endswith(".steps")
    assert long != files.beside(Path("a") / LONGEST[1:], ".steps")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"),
        (65, "1 min 05 s"), (3599, "59 min 59 s"), (3599.7, "1 h 00 min"), (3720, "1 h 02 min"),
        (86399, "1 d 00 h"), (2 * 86400 + 3 * 3600, "2 d 03 h"),
    ],
)  # fmt: skip
def test_times_read_as_times(seconds, said):
    assert duration(seconds) == said


def test_text_of_a_file_is_shown_without_control_characters_and_not_endlessly():
    assert printable("out.2.bias") == "out.2.bias"
    assert printable("\x1b[31mé\n") == "\\x1b[31mé\\n"
    assert printable("x" * 1000) == "x" * 200 + "..."

"""Hostile and damaged checkpoints: refused with a ValueError, and nothing in them runs."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from openai_files import FLAGS, OWN

from iddpm_ext import Diffusion, UNet, load, load_classifier, save


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "must hold tensors by name, got list"),
        ({"a": 1}, "must hold tensors by name, got 'a': int"),
        ({1: torch.zeros(1)}, "must hold tensors by name, got 1: Tensor"),
        ({"a": torch.zeros(1).to_sparse()}, "must hold dense tensors, got a: torch.sparse_coo"),
        ({"a": torch.zeros(1).expand(10**12)}, "must store every element, got a"),
        ({"a": torch.zeros(1)}, "there is no input_blocks; the first names are a"),
        ({}, "there is no input_blocks; the first names are no tensor"),
        ({"input_blocks.99999999.0.weight": torch.zeros(1)}, "there is no input_blocks"),
        ({"input_blocks.9.x": torch.zeros(1), "output_blocks.9.x": torch.zeros(1)}, "10 input"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, content, says):
    torch.save(content, tmp_path / "model000001.pt")
    with pytest.raises(ValueError, match=says):
        load(tmp_path / "model000001.pt", flags=FLAGS)


def gadgets(marker: Path) -> dict[str, object]:
    """Objects that make a folder when they are unpickled, each by another way in."""

    def calling(function: object, *arguments: object) -> object:
        return type("Gadget", (), {"__reduce__": lambda self: (function, arguments)})()

    code = f"__import__('os').makedirs({str(marker)!r}, exist_ok=True)"
    mkdir = calling(os.makedirs, str(marker), 0o777, True)
    return {
        "os": mkdir,
        "system": calling(os.system, f"mkdir -p {marker}"),
        "eval": calling(eval, code),
        "exec": calling(exec, code),
        "subprocess": calling(subprocess.check_call, ["mkdir", "-p", str(marker)]),
        "nested torch file": calling(torch.storage._load_from_bytes, _bytes_of(mkdir)),
    }


def _bytes_of(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["archive", "old format", "bare pickle"])
@pytest.mark.parametrize("name", gadgets(Path("marker")))
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, name, kind):
    marker, path = tmp_path / "ran", tmp_path / "model000001.pt"
    content = {"out.2.bias": torch.zeros(6), "x": gadgets(marker)[name]}
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps({"x": content["x"]}))
        pickle.loads(path.read_bytes())
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "archive")
        torch.load(path, weights_only=False)
    assert marker.exists(), "the gadget itself does not work, so the test would show nothing"
    marker.rmdir()
    for reader in (load, load_classifier):
        with pytest.raises(ValueError, match="must be a whole PyTorch file of nothing but tensors"):
            reader(path, flags=FLAGS)
    assert not marker.exists()


def mutations(data: bytes, count: int, seed: int):
    """Copies of a file that are cut short, have flipped or inserted bytes, or absurd numbers."""
    generator = random.Random(seed)
    edges = min(len(data) // 2, 4096)
    for _ in range(count):
        # The structure of these files is at their ends; the middle is numbers.
        near = generator.choice([edges, edges, len(data)])
        at = generator.choice(
            [generator.randrange(near), len(data) - 1 - generator.randrange(near)]
        )
        kind = generator.randrange(5)
        if kind == 0:
            yield data[:at]
        elif kind == 1:
            flipped = bytearray(data)
            for _ in range(generator.choice([1, 1, 4])):
                i = min(max(0, at + generator.randrange(-16, 16)), len(data) - 1)
                flipped[i] ^= 1 << generator.randrange(8)
            yield bytes(flipped)
        elif kind == 2:
            number = struct.pack("<Q", generator.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1]))
            yield data[:at] + number + data[at + 8 :]
        elif kind == 3:
            yield data[:at] + generator.randbytes(generator.randrange(1, 9)) + data[at:]
        else:
            yield data[:at] + data[at + generator.randrange(1, 64) :]


@pytest.mark.parametrize("kind", ["ours", "archive", "old format"])
def test_damaged_files_give_a_value_error_or_load(tmp_path, kind):
    config = replace(OWN, channel_mult=(1,), attention_resolutions=())
    model = UNet(config).half()
    model.diffusion = Diffusion("linear", 200)
    path = tmp_path / ("a.safetensors" if kind == "ours" else "model000001.pt")
    if kind == "ours":
        save(model, path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=kind == "archive")
    data, refused = path.read_bytes(), 0
    soak = 10 if os.environ.get("IDDPM_SOAK") else 1
    for changed in mutations(data, 100 * soak, seed=7):
        path.write_bytes(changed)
        try:
            load(path, flags=None if kind == "ours" else FLAGS)
        except ValueError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**40, 2**63, 2**64 - 1])
def test_header_of_an_absurd_length_is_refused(tmp_path, length):
    path = tmp_path / "a.safetensors"
    save(UNet(replace(OWN, channel_mult=(1,), attention_resolutions=())), path)
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", length) + data[8:])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"__metadata__": {"unet": 3}}',
        b'{"__metadata__": {"unet": "3"}}',
        b"\xff\xfe",
    ],
)
def test_header_of_wrong_types_is_refused(tmp_path, header):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(ValueError, match="load: "):
        load(path)

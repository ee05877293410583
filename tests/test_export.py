"""torch.export and ONNX: the same outputs, any batch, no operator of our own."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch
from diffusers_networks import SMALL, small_network

import iddpm_ext
from iddpm_ext import UNetConfig
from iddpm_ext.cli import main


def variant(**changes) -> UNetConfig:
    return UNetConfig.from_dict({**SMALL.to_dict(), **changes})


CONFIGS = {
    "plain": SMALL,
    "options": variant(
        num_classes=5, num_head_channels=16, super_resolution=True, resblock_updown=True
    ),
}


def inputs(model, n: int) -> dict[str, torch.Tensor]:
    c, generator = model.config, torch.Generator().manual_seed(n)
    size = c.image_size
    values = {
        "x": torch.randn(n, c.in_channels, size, size, generator=generator),
        "timesteps": torch.linspace(999.75, 0.25, n),
    }
    if c.num_classes is not None:
        values["y"] = torch.arange(n) % (c.num_classes + 1) - 1
    if c.super_resolution:
        values["low_res"] = torch.randn(n, 3, size // 4, size // 4, generator=generator)
    return values


@pytest.mark.parametrize("name", CONFIGS)
def test_the_exported_program_has_no_operator_of_ours_and_takes_any_batch(name):
    model = small_network(CONFIGS[name])
    program = iddpm_ext.export_program(model)
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not [t for t in targets if "iddpm" in t or "autocast" in t]
    assert model.backend == "auto"
    for n in (1, 2, 5):
        values = inputs(model, n)
        with torch.no_grad():
            expected = model(**values)
            got = program.module()(**values)
        assert (got - expected).abs().max() <= 1e-5


def test_onnx_runtime_computes_the_same_at_any_batch(tmp_path):
    model = small_network(CONFIGS["options"])
    path = iddpm_ext.export_onnx(model, tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert {i.name: i.shape[0] for i in session.get_inputs()} == dict.fromkeys(
        inputs(model, 1), "batch"
    )
    for n in (1, 3):
        values = inputs(model, n)
        with torch.no_grad():
            expected = model(**values)
        got = session.run(["output"], {k: v.numpy() for k, v in values.items()})[0]
        assert (torch.from_numpy(got) - expected).abs().max() <= 1e-5


def test_convert_writes_onnx_and_verifies_it(tmp_path, capsys):
    target = tmp_path / "garments.onnx"
    assert main(["convert", "fashion-mnist", str(target), "--verify"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert float(last.split()[2].rstrip(",")) <= 1e-5 and target.exists()


def test_a_model_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    target = tmp_path / "model.onnx"
    target.write_bytes(b"old")

    def fail(*_, **__):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(RuntimeError, match="no such operator"):
        iddpm_ext.export_onnx(small_network(), target)
    assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda p: iddpm_ext.export_onnx(small_network(), p / "a.pt"), ValueError, "end in .onnx"),
        (
            lambda p: iddpm_ext.export_onnx(small_network(), p / "x" / "a.onnx"),
            FileNotFoundError,
            "existing folder",
        ),
        (
            lambda p: iddpm_ext.export_program(small_network(), image_size=15),
            ValueError,
            "image_size must be a multiple of 2, got 15",
        ),
        (lambda p: iddpm_ext.export_program(torch.nn.Identity()), TypeError, "must be a UNet"),
    ],
)
def test_bad_arguments_are_refused(call, error, match, tmp_path):
    with pytest.raises(error, match=match):
        call(tmp_path)

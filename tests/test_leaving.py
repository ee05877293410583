"""What leaves the package as weights: right, whatever wraps the network, or refused, naming the layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import CHANGES, FOLLOWED, Case
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

import iddpm_ext
from iddpm_ext import UNet
from iddpm_ext.interop.folder import read_folder, write_folder

WRAPPERS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "in parallel": torch.nn.DataParallel,
    "average": AveragedModel,
    "both": lambda model: torch.compile(torch.nn.DataParallel(model), backend="eager"),
}
#: Whose tensors are those of the configuration, though not what is computed with them.
SAME_TENSORS = {
    "hook", "pre-hook", "hook of time", "hook of qkv", "global hook", "forward", "class's forward",
    "subclass", "other layer", "more layers", "epsilon",
}  # fmt: skip
OTHER_TENSORS = set(CHANGES) - FOLLOWED - SAME_TENSORS


def output_of(network: Any, case: Case) -> Tensor:
    """Of a `UNet`, or of a network of diffusers."""
    x, t = case.given["noise"], case.given["t"].float()
    with torch.no_grad():
        out = network(x, t, case.given["labels"])
    return out if isinstance(out, Tensor) else out.sample


def exported(model: Any, folder: Path) -> Any:
    program = iddpm_ext.export_program(model)
    return lambda x, t, y: program.module()(x=x, timesteps=t, y=y)


def written(model: Any, folder: Path) -> UNet:
    return read_folder(write_folder(model, folder / "written"))


def saved(model: Any, folder: Path) -> Any:
    iddpm_ext.save(model, folder / "saved")
    return iddpm_ext.load(folder / "saved")


WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "to_diffusers": lambda model, folder: iddpm_ext.to_diffusers(model),
    "write_folder": written,
    "export_program": exported,
    "save": saved,
}


@pytest.mark.parametrize(
    ("way", "wrap"),
    [(way, wrap) for way in WAYS for wrap in WRAPPERS if way != "export_program" or wrap == "both"],
)
def test_the_network_inside_a_wrapper_leaves(way, wrap, tmp_path):
    if way in ("to_diffusers", "write_folder"):
        pytest.importorskip("diffusers")
    case = Case()
    wanted = output_of(case.network, case)
    found = output_of(WAYS[way](WRAPPERS[wrap](case.network), tmp_path), case)
    # As far as two formulations of one network round apart.
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("change", sorted(FOLLOWED))
def test_what_is_written_into_a_network_leaves_with_it(change, tmp_path):
    case = Case()
    CHANGES[change](case.network)
    found = saved(case.network, tmp_path).state_dict()
    for name, value in case.network.state_dict().items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("change", sorted(set(CHANGES) - FOLLOWED))
@pytest.mark.parametrize("convert", [iddpm_ext.to_diffusers, iddpm_ext.export_program])
def test_a_network_that_is_more_than_its_weights_is_refused(convert, change):
    if convert is iddpm_ext.to_diffusers:
        pytest.importorskip("diffusers")
    case = Case()
    undo = CHANGES[change](case.network)
    try:
        said = rf"^{convert.__name__}: model must be what its configuration says, .* got one where "
        with pytest.raises(ValueError, match=said):
            convert(case.network)
    finally:
        if undo is not None:
            undo()


@pytest.mark.parametrize("change", sorted(OTHER_TENSORS))
def test_save_refuses_tensors_that_load_would_not_take(change, tmp_path):
    case = Case()
    CHANGES[change](case.network)
    with pytest.raises(
        ValueError, match=r"^save: model must have the tensors that its configuration"
    ):
        iddpm_ext.save(case.network, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_save_refuses_a_layer_of_another_size(tmp_path):
    case = Case()
    case.network.out[2] = torch.nn.Conv2d(32, 4, 3, padding=1)
    with pytest.raises(
        ValueError, match=r"got out\.2\.weight \[4, 32, 3, 3\], out\.2\.bias \[4\]$"
    ):
        iddpm_ext.save(case.network, tmp_path / "saved")


@pytest.mark.parametrize("change", sorted(SAME_TENSORS))
def test_save_says_what_is_not_in_the_file(change, tmp_path):
    case = Case()
    undo = CHANGES[change](case.network)
    try:
        with pytest.warns(RuntimeWarning, match=r"^save: the file holds weights .* is not in it"):
            iddpm_ext.save(case.network, tmp_path / "saved")
    finally:
        if undo is not None:
            undo()


def test_save_of_a_network_and_of_a_classifier_says_nothing(tmp_path):
    case = Case()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iddpm_ext.save(case.network.train(), tmp_path / "network")
        iddpm_ext.save(case.given["classifier"], tmp_path / "classifier")

"""Networks in folders and on the hub: written, published and fetched, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import OWNER, TOKEN, Hub, serving

import iddpm_ext
from iddpm_ext import Diffusion, UNet, UNetConfig, cli
from iddpm_ext.checkpoint.hub import HubName, fetch
from iddpm_ext.evaluation.images import is_checkpoint

huggingface_hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")
NAME = f"{OWNER}/garments"


def network(**config: Any) -> UNet:
    torch.manual_seed(0)
    shape = {"image_size": 8, "in_channels": 1, "out_channels": 2, "model_channels": 32,
             "num_res_blocks": 1, "channel_mult": (1,), "attention_resolutions": ()}  # fmt: skip
    model = UNet(UNetConfig(**{**shape, "num_classes": 3, **config}))
    torch.nn.init.normal_(model.out[2].weight, std=0.02)
    model.diffusion = Diffusion("cosine", 100)
    model.extra = {"class_names": ["bag", "boot", "a|b *c*"], "step": 7, "data": "three | things"}
    return model.eval()


def same(a: UNet, b: UNet) -> bool:
    theirs = b.state_dict()
    return (
        a.config == b.config
        and a.diffusion == b.diffusion
        and a.extra == b.extra
        and all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in, as the endpoint of huggingface_hub, with an empty cache and the token of its owner."""
    from huggingface_hub import constants, hf_api

    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE",
            server.url + "/{repo_id}/resolve/{revision}/{filename}",
        )  # fmt: skip
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_a_folder_holds_the_network_and_its_card(tmp_path):
    model = network()
    model.save_pretrained(tmp_path / "mine")
    assert sorted(os.listdir(tmp_path / "mine")) == ["README.md", "model.safetensors"]
    for again in (
        iddpm_ext.load(tmp_path / "mine"),
        UNet.from_pretrained(tmp_path / "mine"),
        UNet.from_pretrained(str(tmp_path / "mine"), dtype=torch.float32),
    ):
        assert same(again, model) and not again.training


def test_a_wrapped_network_is_saved_and_another_is_refused(tmp_path):
    wrapped = torch.optim.swa_utils.AveragedModel(network())
    iddpm_ext.checkpoint.save_pretrained(wrapped, tmp_path / "mine")
    assert same(iddpm_ext.load(tmp_path / "mine"), network())
    with pytest.raises(TypeError, match="save_pretrained: model must be a UNet, got Linear"):
        iddpm_ext.checkpoint.save_pretrained(torch.nn.Linear(1, 1), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_every_command_takes_the_folder(tmp_path, capsys):
    network().save_pretrained(tmp_path / "mine")
    out = tmp_path / "samples.png"
    arguments = ["sample", str(tmp_path / "mine"), "-n", "2", "--steps", "2", "--labels", "bag,2"]
    assert cli.main([*arguments, "--out", str(out)]) == 0, capsys.readouterr().err
    assert out.is_file()


def test_a_card_that_someone_wrote_stays(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_text("by hand")
    network().save_pretrained(folder)
    assert (folder / "README.md").read_text() == "by hand"


def test_the_card_says_what_the_checkpoint_says(tmp_path):
    network().save_pretrained(tmp_path / "mine")
    card = huggingface_hub.ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.library_name == "iddpm_ext" and card.data.license is None
    for fact in (
        "| images | 8x8 pixels, 1 channel |",
        "| diffusion | cosine schedule, T = 100, predicts epsilon, variance learned_range |",
        "| step | 7 |",
        "three \\| things",
        "0: bag; 1: boot; 2: a\\|b \\*c\\*.",
    ):
        assert fact in card.text, card.text


def test_a_published_network_is_fetched_as_it_was(hub):
    model = network()
    address = model.push_to_hub("garments")
    assert address == f"{hub.url}/{NAME}/commit/{hub.revisions[NAME]['main']}"
    assert set(hub.commits[hub.revisions[NAME]["main"]]) == {
        ".gitattributes", "README.md", "model.safetensors",
    }  # fmt: skip
    assert same(UNet.from_pretrained(NAME), model)
    assert same(iddpm_ext.load(f"hf://{NAME}"), model)


def test_a_revision_is_the_one_that_is_asked_for(hub):
    first = network()
    first.push_to_hub("garments")
    commit = hub.revisions[NAME]["main"]
    second = network()
    torch.nn.init.ones_(second.out[2].weight)
    second.push_to_hub("garments")
    assert same(UNet.from_pretrained(NAME), second)
    assert same(UNet.from_pretrained(NAME, revision=commit), first)
    assert same(iddpm_ext.load(f"hf://{NAME}@{commit}"), first)
    with pytest.raises(errors.RevisionNotFoundError):
        UNet.from_pretrained(NAME, revision="nowhere")
    with pytest.raises(ValueError, match="revision must agree with name"):
        UNet.from_pretrained(f"hf://{NAME}@main", revision=commit)


def test_a_card_on_the_hub_stays(hub):
    hub.commit(NAME, {"README.md": b"by hand"})
    network().push_to_hub(NAME)
    files = hub.commits[hub.revisions[NAME]["main"]]
    assert files["README.md"] == b"by hand" and "model.safetensors" in files


def test_publishing_needs_the_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(errors.HfHubHTTPError, match="401"):
        network().push_to_hub("garments")
    assert network().push_to_hub("garments", token=TOKEN)


def test_nothing_but_safetensors_and_json_is_fetched(hub, tmp_path):
    network().push_to_hub("garments")
    hub.commit(NAME, {"pytorch_model.bin": b"code", "pipeline.py": b"code", "unet/x.py": b"code"})
    folder = fetch(NAME)
    assert [path.name for path in Path(folder).rglob("*") if path.is_file()] == [
        "model.safetensors"
    ]


def test_a_repository_without_a_network_is_refused(hub):
    hub.commit(NAME, {"pytorch_model.bin": b"code"})
    with pytest.raises(ValueError, match=r"repository with model.safetensors .* got somebody/garm"):
        UNet.from_pretrained(NAME)


def test_a_pipeline_of_diffusers_is_fetched_too(hub, tmp_path):
    pytest.importorskip("diffusers")
    from iddpm_ext.interop.folder import write_folder

    model = network(num_classes=None)
    folder = write_folder(model, tmp_path / "theirs")
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    hub.commit(NAME, files)
    again = UNet.from_pretrained(NAME)
    assert again.config == model.config and again.diffusion == model.diffusion


def test_diffusers_opens_the_snapshot_of_a_published_pipeline_with_labels(hub, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from iddpm_ext.interop.folder import write_folder

    folder = write_folder(network(), tmp_path / "theirs")
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    hub.commit(NAME, files)
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        huggingface_hub.snapshot_download(NAME), custom_pipeline="pipeline", trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    images = pipe(class_labels=[0, 2], num_inference_steps=2, output_type="np").images
    assert type(pipe) is iddpm_ext.IDDPMPipeline and len(images) == 2


def test_commands_take_a_name_of_the_hub(hub, tmp_path, capsys):
    network().push_to_hub("garments")
    out = tmp_path / "samples.png"
    arguments = ["sample", f"hf://{NAME}", "-n", "1", "--labels", "1", "--steps", "2"]
    assert cli.main([*arguments, "--out", str(out)]) == 0, capsys.readouterr().err
    assert out.is_file() and is_checkpoint(f"hf://{NAME}")


def test_a_missing_file_is_not_looked_for_on_the_hub(hub):
    with pytest.raises(FileNotFoundError, match="hf://org/name on the Hugging Face hub"):
        iddpm_ext.load(NAME)
    assert hub.requests == []


def test_a_folder_has_no_revisions(tmp_path):
    network().save_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match="revision must be None for the folder"):
        UNet.from_pretrained(tmp_path / "mine", revision="main")


def test_names_of_the_hub_are_read_as_the_hub_writes_them():
    assert HubName.parse("hf://a/b") == ("a/b", None)
    assert HubName.parse("a/b@v1") == ("a/b", "v1")


def test_a_cache_serves_without_the_hub(hub, tmp_path):
    """In a process that knows the cache and the mode from the environment, as people set them."""
    network().push_to_hub("garments")
    UNet.from_pretrained(NAME)
    code = f"""
import iddpm_ext
from huggingface_hub.errors import LocalEntryNotFoundError
print(iddpm_ext.UNet.from_pretrained({NAME!r}).extra["step"])
try:
    iddpm_ext.UNet.from_pretrained({NAME!r}, cache_dir="nothing")
except LocalEntryNotFoundError:
    print("absent")
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "7\nabsent\n", done.stderr


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        UNet.from_pretrained("a/b")

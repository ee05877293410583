"""Networks in folders and on the Hugging Face hub: one safetensors file and a card for people.

The hub is `huggingface_hub`'s business: its cache (HF_HOME), offline mode (HF_HUB_OFFLINE), tokens
(HF_TOKEN, `hf auth login`) and endpoint (HF_ENDPOINT) hold here as everywhere. Only safetensors and
JSON files are fetched, never code.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from iddpm_ext.files import write_whole
from iddpm_ext.networks.foreign import unwrapped
from iddpm_ext.networks.unet import UNet

from .card import card_of
from .write import save

SCHEME = "hf://"
WEIGHTS = "model.safetensors"
CARD = "README.md"
_OF_DIFFUSERS = "diffusion_pytorch_model"
# What `load` reads: a folder of ours, or a network or a pipeline of diffusers.
_FETCHED = (
    WEIGHTS,
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(
        f"{folder}{name}"
        for folder in ("", "unet/")
        for name in (
            "config.json",
            f"{_OF_DIFFUSERS}.safetensors",
            f"{_OF_DIFFUSERS}-*-of-*.safetensors",
            f"{_OF_DIFFUSERS}.safetensors.index.json",
        )
    ),
)


def is_on_hub(name: object) -> bool:
    """Whether this is the hub's own way to name one of its models, "hf://org/name"."""
    return isinstance(name, str) and name.startswith(SCHEME)


class HubName(NamedTuple):
    """A repository of the hub, and a branch, tag or commit of it (None: its main branch)."""

    repository: str
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> HubName:
        """Of "hf://org/name" or "hf://org/name@revision"."""
        repository, _, revision = text.removeprefix(SCHEME).partition("@")
        return cls(repository, revision or None)


def save_pretrained(model: UNet, folder: str | os.PathLike[str]) -> None:
    """Writes the network into a folder as `load` reads it and the hub shows it.

    model.safetensors holds all of it; README.md is a card written from that. A card that is there
    already is left as it is: someone may have written it.

    model: a UNet, perhaps wrapped as `save` takes it.
    folder: made if need be, in an existing one; other files in it stay.
    Raises TypeError for another model, OSError if the folder cannot be written.
    """
    model = _require_unet("save_pretrained", model)
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"save_pretrained: folder must be a folder, got {str(folder)!r}")
    target.mkdir(exist_ok=True)
    save(model, target / WEIGHTS)
    if not (target / CARD).exists():
        write_whole(target / CARD, card_of(model).encode())


def push_to_hub(
    model: UNet,
    repository: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    message: str = "Upload an iddpm_ext network",
    create_pr: bool = False,
) -> str:
    """Publishes the network on the Hugging Face hub in one commit; the repository is made if need be.

    The card is uploaded where the repository has none.

    model: as of `save_pretrained`.
    repository: "org/name", or "name" for your own account.
    revision: an existing branch (None: main). private: of a repository that is made.
    token: as everywhere in huggingface_hub; None for the one that you logged in with.
    message: of the commit. create_pr: propose it as a pull request instead.
    Returns the address of the commit. Raises ImportError without huggingface_hub, its own errors else.
    """
    model = _require_unet("push_to_hub", model)
    hub = _library("push_to_hub")
    api = hub.HfApi(token=token)
    name = api.create_repo(repository, private=private, exist_ok=True).repo_id
    files: list[str] = [WEIGHTS]
    if not api.file_exists(name, CARD, revision=revision):
        files.append(CARD)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder, WEIGHTS))
        Path(folder, CARD).write_text(card_of(model, name), encoding="utf-8")
        done = api.create_commit(
            name,
            [hub.CommitOperationAdd(file, str(Path(folder, file))) for file in files],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
        )
    return str(done.pr_url or done.commit_url)


def fetch(
    repository: str,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder in the hub's cache with what `load` reads of a repository, fetched where it is not there.

    Arguments as of `snapshot_download` of huggingface_hub. Raises ImportError without it, its own errors
    else, ValueError where the repository has no network that `load` reads.
    """
    hub = _library("from_pretrained")
    folder = hub.snapshot_download(
        repository,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        allow_patterns=list(_FETCHED),
    )
    found = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.safetensors"))
    if not found:
        at = "" if revision is None else f" at {revision}"
        raise ValueError(
            f"from_pretrained: name must be of a repository with {WEIGHTS} or with "
            f"{_OF_DIFFUSERS}.safetensors, got {repository}{at}, which has neither"
        )
    return Path(folder)


def from_pretrained(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    **how: Any,
) -> UNet:
    """The network of a folder or of a repository of the Hugging Face hub, as `load` gives it.

    name: an existing folder, or "org/name" on the hub: one that `push_to_hub` or `save_pretrained`
        wrote, or a network or pipeline of diffusers in safetensors form.
    revision: a branch, tag or commit of the repository. token, cache_dir, local_files_only: as
        everywhere in huggingface_hub.
    how: device and dtype, as of `load`.
    Raises what `load` and `fetch` raise; ValueError for a revision of a folder.
    """
    from .read import load

    text = os.fspath(name)
    if not Path(text).is_dir():
        given = HubName.parse(text)
        if revision is not None and given.revision not in (None, revision):
            raise ValueError(
                f"from_pretrained: revision must agree with name, got {revision!r} and {text!r}"
            )
        name = fetch(
            given.repository,
            revision or given.revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    elif revision is not None:
        raise ValueError(
            f"from_pretrained: revision must be None for the folder {text!r}, got {revision!r}"
        )
    return load(name, **how)


def _require_unet(who: str, model: Any) -> UNet:
    inner = unwrapped(model)
    if not isinstance(inner, UNet):
        raise TypeError(f"{who}: model must be a UNet, got {type(inner).__name__}")
    return inner


def _library(who: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{who}: the hub needs the library huggingface_hub: pip install huggingface_hub"
        ) from error
    return huggingface_hub

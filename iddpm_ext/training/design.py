"""The network and the diffusion process that a run trains, from its settings or from a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from iddpm_ext.checkpoint import bundled, is_on_hub
from iddpm_ext.checkpoint.read import COMPANION, parse_metadata, read_network
from iddpm_ext.checkpoint.read_classifier import parse_classifier, read_classifier
from iddpm_ext.checkpoint.runs import WEIGHTS
from iddpm_ext.checkpoint.torch_file import is_torch_file
from iddpm_ext.diffusion import Diffusion
from iddpm_ext.networks.classifier import ClassifierConfig
from iddpm_ext.networks.config import UNetConfig
from iddpm_ext.sizes import checked_size

from .config import TrainConfig

ImageShape = tuple[int, int, int]

# Setting -> field of the network's configuration. Dropout is missing, as it need not agree with a file's.
_NETWORK = {
    "model_channels": "model_channels",
    "num_res_blocks": "num_res_blocks",
    "channel_mult": "channel_mult",
    "num_heads": "num_heads",
    "num_heads_upsample": "num_heads_upsample",
    "num_head_channels": "num_head_channels",
    "attention_order": "attention_order",
    "resblock_updown": "resblock_updown",
    "scale_shift": "use_scale_shift_norm",
    "pool": "pool",
}
# Setting -> argument of `Diffusion`.
_PROCESS = {
    "schedule": "schedule",
    "diffusion_steps": "num_timesteps",
    "variance": "variance",
    "prediction": "prediction",
    "rescale_timesteps": "rescale_timesteps",
    "zero_terminal_snr": "zero_terminal_snr",
    "sigma_data": "sigma_data",
}
LABELS = "label_emb.weight"


@dataclass(frozen=True)
class Start:
    """The weights that a run begins with. name: of the file as the settings give it."""

    name: str
    tensors: dict[str, Tensor]
    extra: dict[str, Any]
    of_openai: bool


@dataclass(frozen=True)
class Design:
    """The network that a run trains, and the process that it is trained for.

    low_res: side of the input images of a super-resolution network; None for other networks. start: the
    weights to start from, None for new ones. notes: messages for the user.
    """

    network: UNetConfig | ClassifierConfig
    diffusion: Diffusion
    low_res: int | None = None
    start: Start | None = None
    notes: tuple[str, ...] = ()


def design_of_settings(
    config: TrainConfig, image_shape: ImageShape, class_names: tuple[str, ...] | None
) -> Design:
    """The design of a new network."""
    channels, height, width = image_shape
    common: dict[str, Any] = {
        ours: getattr(config, name) for name, ours in _NETWORK.items() if name != "pool"
    }
    common.update(
        image_size=checked_size("train", (height, width)), in_channels=channels, dropout=config.dropout,
        attention_resolutions=config.attention_resolutions,
    )  # fmt: skip
    classes = len(class_names) if class_names else None
    diffusion = Diffusion(**{ours: getattr(config, name) for name, ours in _PROCESS.items()})
    if config.classifier:
        del common["num_heads_upsample"]
        assert classes is not None
        network = ClassifierConfig(**common, num_classes=classes, pool=config.pool)
        return Design(network, diffusion)
    outputs = 2 * channels if diffusion.learns_variance else channels
    return Design(
        UNetConfig(
            **common, out_channels=outputs, num_classes=classes if config.class_cond else None,
            super_resolution=config.super_resolution is not None,
        ),
        diffusion,
        config.super_resolution,
    )  # fmt: skip


def design_of_checkpoint(config: TrainConfig, path: Path) -> Design:
    """The design of the run whose checkpoint directory is `path`."""
    with safe_open(path / WEIGHTS, framework="pt", device="cpu") as file:
        metadata = file.metadata()
    parse: Any = parse_classifier if config.classifier else parse_metadata
    described = parse(path, metadata)
    network = replace(described.config, dropout=config.dropout)
    return Design(network, described.diffusion, described.extra.get("low_res_size"))


def design_of_file(
    config: TrainConfig, image_shape: ImageShape, class_names: tuple[str, ...] | None
) -> Design:
    """The design of the network in `config.init_from`, with its weights as `start`.

    Settings of network and process that are at their defaults are taken from the file. Of the others, those
    of the network must agree with the file, while those of the process override it. Image size, dropout and,
    for a file of OpenAI's, the number of classes are always the run's.

    Raises ValueError if settings or data do not fit the file, naming all that do not.
    """
    name = config.init_from
    path, described, tensors = read_start(config, name, image_shape, average=False)
    network, extra = described.config, described.extra
    openai = path.is_file() and is_torch_file(path)
    wrong = _contradictions(config, network)
    network, lines = _fitted(config, network, image_shape, class_names, openai=openai)
    wrong += lines
    low_res = None
    if getattr(network, "super_resolution", False):
        low_res = config.super_resolution or extra.get("low_res_size")
        if low_res is None:
            wrong.append("super_resolution=None (there a network that needs the low side)")
    elif config.super_resolution is not None:
        wrong.append(f"super_resolution={config.super_resolution} (there a network without)")
    if wrong:
        raise ValueError(f"train: settings must be those of {name}, got {', '.join(wrong)}")
    diffusion, notes = _process(config, described.diffusion), []
    if config.objective == "hybrid" and not config.classifier and not diffusion.learns_variance:
        raise ValueError(
            f"train: objective must be simple or vlb for variance {diffusion.variance}, which {name} "
            "has, got hybrid"
        )
    if described.diffusion is not None and described.diffusion != diffusion:
        notes.append(f"{name} was trained for {described.diffusion!r}")
    notes.append(f"the network is that of {name}, with {diffusion!r}")
    return Design(network, diffusion, low_res, Start(name, tensors, extra, openai), tuple(notes))


def read_start(config: TrainConfig, name: str, image_shape: ImageShape, *, average: bool) -> Any:
    """(path, described, tensors) of a bundled name, file or folder that a run starts from."""
    known = (*bundled(), *COMPANION)
    if name not in known and not is_on_hub(name) and not Path(name).exists():
        raise FileNotFoundError(f"train: init files must exist, got {name!r}")
    side = max(image_shape[1:])
    flags: dict[str, Any] = {"image_size": side, "attention_order": config.attention_order}
    for key in ("num_heads_upsample", "num_head_channels"):
        if getattr(config, key) is not None:
            flags[key] = getattr(config, key)
    if config.classifier:
        flags.update(
            num_res_blocks=config.num_res_blocks, resblock_updown=config.resblock_updown,
            attention_resolutions=config.attention_resolutions, channel_mult=config.channel_mult,
            use_scale_shift_norm=config.scale_shift, pool=config.pool,
        )  # fmt: skip
        if config.num_head_channels is None:
            flags["num_heads"] = config.num_heads
        return read_classifier(name, average=average, otherwise=flags)
    if config.num_head_channels is None:
        flags["num_heads"] = config.num_heads
    default = TrainConfig()
    for key, argument in _PROCESS.items():
        # The tensors determine the kind of variance, unless it is set explicitly.
        if key != "variance" or config.variance != default.variance:
            flags[argument] = getattr(config, key)
    for key in ("zero_terminal_snr", "sigma_data"):  # no file of OpenAI's has these
        del flags[key]
    return read_network(name, average=average, otherwise=flags)


def _contradictions(config: TrainConfig, network: UNetConfig | ClassifierConfig) -> list[str]:
    """Settings that differ from both their defaults and the network's."""
    default, known = TrainConfig(), {field.name for field in fields(network)}
    found = []
    for name, theirs in _NETWORK.items():
        value = getattr(config, name)
        if theirs in known and value not in (getattr(default, name), getattr(network, theirs)):
            found.append(f"{name}={value!r} (there {getattr(network, theirs)!r})")
    return found


def _fitted(
    config: TrainConfig,
    network: Any,
    image_shape: ImageShape,
    class_names: tuple[str, ...] | None,
    *,
    openai: bool,
) -> tuple[Any, list[str]]:
    """The file's configuration adapted to the run's images and classes, and what does not fit."""
    channels, height, width = image_shape
    wrong = []
    if network.in_channels != channels:
        wrong.append(f"images of {channels} channels (there {network.in_channels})")
    levels = range(len(network.channel_mult))
    encoder = network if isinstance(network, UNetConfig) else network.encoder()
    attended = [level for level in levels if encoder.has_attention(level)]
    side = max(height, width)
    sides = tuple(side >> level for level in attended)
    asked = config.attention_resolutions
    if asked != TrainConfig().attention_resolutions:
        if [level for level in levels if side >> level in asked] != attended:
            wrong.append(f"attention_resolutions={asked!r} (there {sides!r})")
    size = checked_size("train", (height, width))
    changes: dict[str, Any] = {
        "image_size": size,
        "attention_resolutions": sides,
        "dropout": config.dropout,
    }
    names, classes = class_names or (), network.num_classes
    if config.classifier or classes is not None or config.class_cond:
        if classes is None:
            wrong.append("class_cond=True (there no classes)")
        elif not names:
            wrong.append(f"data without classes (there {classes})")
        elif openai and not config.classifier and len(names) < classes:
            changes["num_classes"] = len(names)
        elif len(names) != classes:
            wrong.append(f"num_classes={len(names)} (there {classes})")
    return (network if wrong else replace(network, **changes)), wrong


def _process(config: TrainConfig, theirs: Diffusion | None) -> Diffusion:
    """The file's process, overridden by the settings that are not at their defaults."""
    given = {ours: getattr(config, name) for name, ours in _PROCESS.items()}
    if theirs is None:
        return Diffusion(**given)
    default = TrainConfig()
    said = {ours: given[ours] for name, ours in _PROCESS.items()
            if getattr(config, name) != getattr(default, name)}  # fmt: skip
    described = theirs.to_dict()
    if {"schedule", "num_timesteps"} & said.keys():
        described.update(betas=None, timesteps=None)
        if described["schedule"] == "custom":
            described["schedule"] = config.schedule
    return Diffusion.from_dict({**described, **said})


def labels_kept(start: Start, rows: int) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a start for a network of `rows` classes, and a note if it has more."""
    tensors = start.tensors
    if not start.of_openai or LABELS not in tensors or not len(tensors[LABELS]) > rows > 0:
        return tensors, []
    note = f"{start.name} has {len(tensors[LABELS])} classes, of which the run keeps {rows}"
    return {**tensors, LABELS: tensors[LABELS][:rows]}, [note]


def network_of_metadata(metadata: dict[str, str]) -> dict[str, Any]:
    """The configuration of the network, U-Net or classifier, in a file of this package."""
    return json.loads(metadata["unet"] if "unet" in metadata else metadata["classifier"])

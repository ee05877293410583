"""Every command and snippet of the README and of docs/ runs as it is written there.

In a folder with the files that they name, at toy size: `fashion-mnist` and OpenAI's checkpoints are small
random networks of the same kinds, the data a few images. Long computations are scaled down by the
substitutions in SCALED; nothing else in a line is changed. It takes minutes, so it runs in CI, not in
`make test`. For `make`, `pip` and programs for a GPU only the existence of targets, versions and programs is
checked.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import iddpm_ext
from iddpm_ext import Diffusion, UNet, UNetConfig, cli
from iddpm_ext.checkpoint import read, released
from iddpm_ext.networks.classifier import Classifier
from iddpm_ext.networks.config import UNetConfig as Config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CLASSES = ["bag", *(f"c{i}" for i in range(1, 10))]
STEPS = 200  # a multiple of 50, for ddim50
TRAINED = "--steps 4 --batch-size 4 --model-channels 32 --num-res-blocks 1 --channel-mult 1"
# Pattern in a command or snippet -> what runs in its place.
SCALED = {
    r"\[3\] \* 64": "[3] * 2",
    r"\(model, steps=50\)": "(model, steps=4, n=2)",
    r"\(model, steps=50, x_0": "(model, steps=4, x_0",
    r"num_inference_steps=50": "num_inference_steps=2",
    r"\bn=16\b": "n=2",
    r"-n 10000\b": "-n 12 --steps 2",
    r"-n 1000\b": "-n 2",
    r"-n 100\b": "-n 1",
    r"-n 2000\b": "-n 12 --resamples 0 --steps 2",
    r"-n 64 --steps 50": "-n 10 --steps 2",
    r"--labels bag,8,8": "--labels bag,8,8 --steps 2",
    r"samples\.npz --reference DIR": "samples.npz --reference DIR --resamples 0",
    r"--extractor (inception-2015-12-05\.pt|efficientnet-lite0)": "--extractor pixels",
    r"--steps [26]00000( --batch-size 128)?": f"{TRAINED} --sample-every 0",
    r"--steps 2000 --batch-size 16 --lr 5e-4": f"{TRAINED} --sample-every 0",
    r" --num-res-blocks 1 --channel-mult 1,1,2": "",
    r"-n 20 --out mine": "-n 20 --steps 2 --out mine",
    r"\(model, 12,": "(model, 2,",
    r"--batch-sizes 1,16": "--batch-sizes 1 --rounds 1",
    r"--data TRAINING_IMAGES": "--data TRAINING_IMAGES -n 2 --candidates 32 --most 25",
    r"--nproc-per-node 4": "--nproc-per-node 2",
}
SMALL: dict[str, Any] = {
    "model_channels": 32, "num_res_blocks": 1, "channel_mult": (1,), "attention_resolutions": (),
}  # fmt: skip


def blocks(language: str) -> list[Any]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for block in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: block.start()].count("\n") + 2
            found.append(pytest.param(block[1], id=f"{page.name}:{line}"))
    return found


def scaled(text: str) -> str:
    for pattern, replacement in SCALED.items():
        text = re.sub(pattern, replacement, text)
    return text


def network(image_size: int, channels: int, classes: int | None = None, **more: Any) -> UNet:
    torch.manual_seed(0)
    config = {**SMALL, "image_size": image_size, "num_classes": classes, **more}
    model = UNet(UNetConfig(**config, in_channels=channels, out_channels=2 * channels))
    torch.nn.init.normal_(model.out[2].weight, std=0.02)
    model.diffusion = Diffusion("cosine", STEPS)
    return model.eval()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with what the pages name, and the names of networks that stand for large ones."""
    folder = tmp_path_factory.mktemp("stage")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    (folder / "weights").mkdir()
    patch.setattr(read, "WEIGHTS", folder / "weights")
    garments = network(28, 1, classes=10)
    schedules = {"25": [round(i * (STEPS - 1) / 24) for i in range(25)]}
    pictures = {"10": [round(i * (STEPS - 1) / 10) for i in range(10)]}
    garments.extra = {
        "class_names": CLASSES, "step_schedules": schedules, "picture_schedules": pictures,
    }  # fmt: skip
    iddpm_ext.save(garments, folder / "weights" / "fashion-mnist.safetensors")
    for name in ("my.safetensors", "my_model.safetensors", "CHECKPOINT"):
        iddpm_ext.save(garments, folder / name)
    for data in ("DIR", "DATA", "TRAINING_IMAGES"):
        for i, label in enumerate(CLASSES):
            (folder / data / label).mkdir(parents=True)
            for k in range(2):
                pixels = np.random.default_rng(2 * i + k).integers(0, 256, (28, 28), np.uint8)
                Image.fromarray(pixels).save(folder / data / label / f"{k}.png")
    samples = np.random.default_rng(0).integers(0, 256, (12, 28, 28, 1), np.uint8)
    np.savez(folder / "samples.npz", samples)
    _write_openai_files(folder, patch)
    yield folder
    patch.undo()


def _write_openai_files(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Released files, whose published flags are those of toys meanwhile, and those of a run."""
    toy = "--num_channels 32 --num_res_blocks 1 --channel_mult 1,1 --attention_resolutions 16"
    patch.setitem(
        released._FLAGS, "cifar10_uncond_50M_500K.pt",
        (released._IMPROVED, f"--image_size 32 --noise_schedule cosine --diffusion_steps {STEPS} {toy}"),
    )  # fmt: skip
    patch.setitem(
        released._CLASSIFIERS, "64x64_classifier.pt",
        "--image_size 64 --classifier_depth 1 --classifier_width 64 "
        "--classifier_attention_resolutions 8 --channel_mult 1,1",
    )  # fmt: skip
    cifar = UNet(_config(released.flags_of("cifar10_uncond_50M_500K.pt")))
    torch.save(cifar.state_dict(), folder / "cifar10_uncond_50M_500K.pt")
    from iddpm_ext.checkpoint.read_classifier import released_classifier

    classifier = Classifier(released_classifier("64x64_classifier.pt"))
    torch.save(classifier.state_dict(), folder / "64x64_classifier.pt")
    # As `iddpm train` with the scaled flags would have it.
    own = network(28, 1)
    torch.save(own.state_dict(), folder / "model500000.pt")
    torch.save(own.state_dict(), folder / "ema_0.9999_500000.pt")
    optimizer = torch.optim.AdamW(own.parameters())
    for parameter in own.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "opt500000.pt")


def _config(flags: dict[str, Any]) -> UNetConfig:
    names = Config.__dataclass_fields__.keys() & flags.keys()
    return UNetConfig(**{name: flags[name] for name in names}, out_channels=6)


def commands(block: str) -> Iterator[list[str]]:
    for line in block.replace("\\\n", " ").splitlines():
        if words := shlex.split(scaled(line), comments=True):
            yield words


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("sh"))
def test_commands_run_as_written(stage, block, capsys):
    for words in commands(block):
        program, *rest = words
        if program == "iddpm":
            assert cli.main(rest) == 0, f"{words}: {capsys.readouterr().err}"
        elif program == "torchrun":
            _torchrun(rest)
        elif program == "make":
            targets = [word for word in rest if "=" not in word]
            made = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True)
            assert targets and made.returncode == 0, made.stderr
        elif program == "pip":
            assert rest[0] == "install" and all(
                word == "." or f"{word}\n" in (ROOT / "constraints.txt").read_text()
                for word in rest[1:]
            ), words
        else:
            assert program == "python" and (ROOT / rest[0]).is_file(), words


def _torchrun(arguments: list[str]) -> None:
    """Sampling in two processes; of the other verbs, what torchrun hands on, in one."""
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(arguments)
    assert parsed.module and parsed.training_script == "iddpm_ext"
    if parsed.training_script_args[0] != "sample":
        assert cli.main(parsed.training_script_args) == 0
        return
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("python"))
def test_snippets_run_as_written(stage, block):
    pytest.importorskip("diffusers")
    from diffusers import DDPMPipeline
    from diffusers_networks import small_network

    levels = torch.randint(0, 256, (4, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    model = iddpm_ext.load("fashion-mnist")
    unet = iddpm_ext.to_diffusers(small_network())
    shape = (2, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    images = levels.float() / 127.5 - 1
    names: dict[str, Any] = {
        "iddpm_ext": iddpm_ext, "DDPMPipeline": DDPMPipeline, "model": model, "unet": unet,
        "IDDPMScheduler": iddpm_ext.IDDPMScheduler, "images": images,
        "labels": torch.arange(4), "t": torch.tensor([3, 40]), "noise": torch.randn(shape),
        "x_0": torch.rand(shape) * 2 - 1, "classifier": _classifier(28, 1),
        "base": network(8, 3), "upsampler": network(16, 3, super_resolution=True),
        "pipe": DDPMPipeline(unet, iddpm_ext.IDDPMScheduler.from_diffusion(Diffusion("cosine", STEPS))),
    }  # fmt: skip
    if "invert(" in block:
        names["x_0"] = images
    exec(compile(scaled(block), "the page", "exec"), names)


def _classifier(image_size: int, channels: int) -> torch.nn.Module:
    """Logits [N, 10] of x and t."""

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(channels * image_size**2, 10)

        def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return self.layer(x.flatten(1))

    return Linear()


def test_substitutions_are_all_needed():
    text = "\n".join(page.read_text() for page in PAGES)
    assert [pattern for pattern in SCALED if not re.search(pattern, text)] == []

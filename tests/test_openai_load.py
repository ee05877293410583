"""OpenAI's checkpoints: recognised, completed from flags, refused where they differ, never run."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden import make_guided
from golden.make_unet import fill_by_formula
from openai_files import FLAGS, MARCH, OWN, config_of_flags
from safetensors.torch import save_file

import iddpm_ext
from iddpm_ext import Classifier, Diffusion, UNet, UNetConfig, load, load_classifier, save
from iddpm_ext.checkpoint.flags import read_flags
from iddpm_ext.checkpoint.openai import describe, released_config
from iddpm_ext.checkpoint.read_classifier import released_classifier
from iddpm_ext.checkpoint.released import RELEASED, RELEASED_CLASSIFIERS
from iddpm_ext.checkpoint.shapes import Structure, infer
from iddpm_ext.cli import main

JULY = json.loads(make_guided.GOLDEN.read_text())["released"]


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def on_meta(config: UNetConfig) -> UNet:
    with torch.device("meta"):
        return UNet(config)


def own(tmp_path: Path, config: UNetConfig = OWN, name: str = "model000200.pt") -> Path:
    model = UNet(config)
    fill_by_formula(model)
    torch.save(model.state_dict(), tmp_path / name)
    return tmp_path / name


def variance_of(flags: dict) -> str:
    return "learned_range" if flags["learn_sigma"] else "fixed_large"


@pytest.mark.parametrize("name", MARCH)
def test_march_2021_file_is_recognised_with_its_published_flags(name):
    flags = MARCH[name]["flags"]
    config = config_of_flags(flags)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = describe(Path(name), shapes_of(on_meta(config)), None)
    assert found.config == config
    assert name in found.extra["openai"]["recognised"]
    assert found.diffusion == Diffusion(
        flags["noise_schedule"],
        flags["diffusion_steps"],
        variance_of(flags),
        "epsilon",
        flags["rescale_timesteps"],
    )


@pytest.mark.parametrize("name", RELEASED)
def test_released_files_of_one_structure_share_their_process(name):
    found = describe(Path(name), shapes_of(on_meta(released_config(name))), None)
    for other in found.extra["openai"]["recognised"]:
        theirs = released_config(other)
        assert replace(theirs, dropout=0.0) == replace(found.config, dropout=0.0)
        assert describe(Path(other), shapes_of(on_meta(theirs)), None).diffusion == found.diffusion


@pytest.mark.parametrize("name", JULY)
def test_july_2021_networks_have_the_original_codes_tensors(name):
    with torch.device("meta"):
        model = (
            Classifier(released_classifier(name))
            if name in RELEASED_CLASSIFIERS
            else UNet(released_config(name))
        )
    assert make_guided.digest(model) == JULY[name]
    assert name in RELEASED_CLASSIFIERS or infer(shapes_of(model)) == Structure.of_config(
        model.config
    )


def test_july_2021_processes_have_a_thousand_steps_and_no_rescaling():
    for name in set(RELEASED) - set(MARCH):
        found = describe(Path(name), shapes_of(on_meta(released_config(name))), None)
        schedule = "cosine" if name.startswith("64x64") else "linear"
        expected = Diffusion(schedule, 1000, "learned_range", rescale_timesteps=False)
        assert found.diffusion == expected, name
        order = "new" if name.startswith("64x64") else "legacy"
        assert found.config.attention_order == order, name


def test_whole_cifar_file_loads_in_one_call_and_goes_on_as_ours(tmp_path, capsys):
    config = released_config("cifar10_uncond_50M_500K.pt")
    tensors = {
        name: torch.full(value.shape, 0.25, dtype=torch.float16)
        for name, value in on_meta(config).state_dict().items()
    }
    torch.save(tensors, tmp_path / "cifar10_uncond_50M_500K.pt")
    model = load(tmp_path / "cifar10_uncond_50M_500K.pt")
    assert model.config == config
    assert model.diffusion == Diffusion("cosine", 4000, "learned_range", rescale_timesteps=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(bool((p == 0.25).all()) for p in model.parameters())
    save(model, tmp_path / "ours.safetensors", dtype=torch.float16)
    back = load(tmp_path / "ours.safetensors")
    assert (back.config, back.diffusion) == (model.config, model.diffusion)
    names = ["cifar10_uncond_50M_500K.pt", "cifar10_uncond_vlb_50M_500K.pt"]
    assert back.extra["openai"]["recognised"] == names
    assert main(["info", str(tmp_path / "ours.safetensors")]) == 0
    assert ", ".join(names) in capsys.readouterr().out


def test_released_file_that_does_not_fit_is_refused_with_the_difference(tmp_path):
    name = "cifar10_uncond_50M_500K.pt"
    tensors = {k: torch.zeros(v.shape) for k, v in on_meta(OWN).state_dict().items()}
    torch.save(tensors, tmp_path / name)
    with pytest.raises(ValueError, match=f"contradicts the released {name}") as caught:
        load(tmp_path / name)
    assert "time_embed.0.weight [128, 32] instead of [512, 128]" in str(caught.value)
    del tensors["out.2.weight"]
    torch.save(tensors, tmp_path / name)
    with pytest.raises(ValueError, match=r"missing: .*; unexpected|missing: "):
        load(tmp_path / name)


def test_renamed_released_file_is_recognised_aloud():
    shapes = shapes_of(on_meta(released_config("lsun_cat.pt")))
    with pytest.warns(UserWarning, match="has the tensors of OpenAI's 256x256_diffusion_uncond"):
        found = describe(Path("cats.pt"), shapes, None)
    assert found.diffusion is not None
    assert found.diffusion.num_timesteps == 1000


def test_run_of_ones_own_is_never_taken_for_a_released_file():
    shapes = shapes_of(on_meta(released_config("cifar10_uncond_50M_500K.pt")))
    for name in ("model500000.pt", "ema_0.9999_500000.pt"):
        with pytest.raises(ValueError, match="flags must give what the tensors of"):
            describe(Path(name), shapes, None)


def test_flags_go_before_the_published_ones():
    name = "imagenet64_uncond_100M_1500K.pt"
    shapes = shapes_of(on_meta(released_config(name)))
    found = describe(Path(name), shapes, {"diffusion_steps": 1000, "num_head_channels": 32,
                                          "use_new_attention_order": True})  # fmt: skip
    assert found.diffusion is not None
    assert (found.diffusion.schedule, found.diffusion.num_timesteps) == ("cosine", 1000)
    assert found.config.heads(384) == 12
    assert found.config.attention_order == "new"


@pytest.mark.parametrize(
    "config",
    [
        OWN,
        replace(OWN, out_channels=3, use_scale_shift_norm=False),
        replace(OWN, num_classes=10, attention_resolutions=(16, 8), num_res_blocks=2),
        replace(OWN, super_resolution=True, num_classes=4),
        replace(OWN, super_resolution=True, out_channels=3),
        replace(OWN, in_channels=1, out_channels=2, attention_resolutions=()),
        replace(OWN, channel_mult=(2, 1, 3), attention_resolutions=(4,)),
        replace(OWN, resblock_updown=True, channel_mult=(1, 1, 2)),
        replace(OWN, conv_resample=False),
        replace(OWN, channel_mult=(1,), attention_resolutions=()),
    ],
)
def test_tensors_tell_everything_but_the_flags_that_are_asked_for(tmp_path, config):
    more = {"use_new_attention_order": False} if config.resblock_updown else {}
    path = own(tmp_path, config)
    with pytest.raises(ValueError, match="flags must give what the tensors of") as caught:
        load(path)
    asked = ["image_size", "num_heads or num_head_channels", "noise_schedule", "diffusion_steps",
             "rescale_timesteps", *more]  # fmt: skip
    assert all(name in str(caught.value) for name in asked)
    model = load(path, flags={**FLAGS, **more})
    assert model.config == config
    assert model.diffusion == Diffusion(
        "linear", 200, variance_of({"learn_sigma": config.out_channels == 2 * config.in_channels}),
        rescale_timesteps=False,
    )  # fmt: skip
    for name, value in torch.load(path).items():
        assert torch.equal(model.state_dict()[name], value)


def test_one_missing_flag_is_the_only_one_named(tmp_path):
    path = own(tmp_path)
    for name in FLAGS:
        flags = {k: v for k, v in FLAGS.items() if k != name}
        with pytest.raises(ValueError, match="cannot tell: ") as caught:
            load(path, flags=flags)
        listed = str(caught.value).split("cannot tell: ")[1].split(";")[0]
        assert name in listed
        assert not any(other in listed for other in flags)


def test_flags_are_read_from_a_command_line_as_from_a_mapping(tmp_path):
    path = own(tmp_path, name="ema_0.9999_000200.pt")
    line = (
        "--image_size 16 --num_channels 32 --num_res_blocks 1 --num_heads 2 --learn_sigma True "
        "--channel_mult 1,2 --attention_resolutions 8 --diffusion_steps 200 --noise_schedule linear "
        "--rescale_timesteps=False --rescale_learned_sigmas False --use_kl True --lr 1e-4"
    )
    model = load(path, flags=line)
    assert (model.config, model.diffusion) == (OWN, load(path, flags=FLAGS).diffusion)
    assert read_flags(line) == read_flags(
        dict(pair.split() for pair in line.replace("=", " ").split("--")[1:])
    )


@pytest.mark.parametrize(
    ("flags", "process"),
    [
        ({"predict_xstart": True}, {"prediction": "x_0"}),
        ({"schedule": "cosine"}, {"schedule": "cosine"}),
        ({"sigma_small": True, "learn_sigma": False}, {"variance": "fixed_small"}),
        ({"variance": "fixed_small"}, {"variance": "fixed_small"}),
    ],
)
def test_flags_of_the_process_in_either_language(tmp_path, flags, process):
    path = own(tmp_path, replace(OWN, out_channels=3))
    base = {k: v for k, v in FLAGS.items() if not ({"schedule"} & flags.keys() and "schedule" in k)}
    diffusion = load(path, flags={**base, **flags}).diffusion
    assert {name: getattr(diffusion, name) for name in process} == process


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"num_channels": 64}, "which have model_channels 32, not 64"),
        ({"class_cond": True}, "class_cond False, not True"),
        ({"learn_sigma": False}, "learn_sigma True, not False"),
        ({"attention_resolutions": "16,8"}, r"attention_resolutions \[8\], not \[16, 8\]"),
        ({"use_scale_shift_norm": "false"}, "use_scale_shift_norm True, not False"),
        ({"large_size": 16}, "super_resolution False, not True"),
        ({"image_size": 32}, None),
        ({"model_channels": 32, "num_channels": 64}, "flags must agree on model_channels"),
        ({"num_heads": "four"}, "flags must give num_heads as an integer, got 'four'"),
        ({"num_heads": 3}, "flags must fit .* num_heads must divide the 64 channels"),
        ({"learn_sigma": 1}, "flags must give learn_sigma as True or False, got 1"),
        ({"diffusion_steps": 1}, "flags must fit .*"),
        ({"noise_schedule": "quadratic"}, "flags must fit .* schedule must be"),
        ({"colour": 1}, "flags must be among .* got 'colour'"),
    ],
)
def test_wrong_flags_are_refused_with_the_difference(tmp_path, flags, says):
    path = own(tmp_path)
    if says is None:
        # The same tensors make a network for 32x32 images, with attention at another side.
        assert load(path, flags={**FLAGS, **flags}).config.attention_resolutions == (16,)
        return
    with pytest.raises(ValueError, match=says):
        load(path, flags={**FLAGS, **flags})


def test_flags_that_cannot_be_read_are_refused(tmp_path):
    path = own(tmp_path)
    with pytest.raises(ValueError, match="flags must read '--name value --name value'"):
        load(path, flags="--image_size 64 --learn_sigma")
    with pytest.raises(TypeError, match="flags must be a mapping or a string, got list"):
        load(path, flags=["--image_size", "64"])
    save(load(path, flags=FLAGS), tmp_path / "ours.safetensors")
    with pytest.raises(ValueError, match=r"flags must be None for .*ours.safetensors"):
        load(tmp_path / "ours.safetensors", flags=FLAGS)


def test_own_file_goes_on_as_ours_without_flags(tmp_path):
    model = load(own(tmp_path), flags=FLAGS)
    save(model, tmp_path / "ours.safetensors")
    back = load(tmp_path / "ours.safetensors")
    assert (back.config, back.diffusion) == (model.config, model.diffusion)
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([7.0])
    with torch.no_grad():
        assert torch.equal(back(x, t), model(x, t))


def test_safetensors_of_openai_tensors_without_metadata_load_with_flags(tmp_path):
    tensors = torch.load(own(tmp_path))
    save_file(tensors, tmp_path / "plain.safetensors")
    assert load(tmp_path / "plain.safetensors", flags=FLAGS).config == OWN


def test_old_format_of_torch_loads_too(tmp_path):
    tensors = torch.load(own(tmp_path))
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load(tmp_path / "old.pt", flags=FLAGS).config == OWN


def test_loaded_weights_do_not_depend_on_the_mapped_file(tmp_path):
    path = own(tmp_path)
    model = load(path, flags=FLAGS)
    expected = torch.load(path)["out.2.bias"]
    with open(path, "r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(model.out[2].bias, expected)


@pytest.mark.parametrize("name", ["64x64_classifier.pt", "256x256_classifier.pt"])
def test_released_classifier_is_one_call(tmp_path, name):
    with torch.device("meta"):
        expected = Classifier(released_classifier(name)).state_dict()
    torch.save({k: torch.zeros(v.shape, dtype=torch.float16) for k, v in expected.items()},
               tmp_path / name)  # fmt: skip
    assert load_classifier(tmp_path / name).config == released_classifier(name)
    os.rename(tmp_path / name, tmp_path / "renamed.pt")
    model = load_classifier(tmp_path / "renamed.pt")
    assert model.config == released_classifier(name)
    assert not model.training


def test_classifier_of_ones_own_and_its_round_trip(tmp_path):
    config = iddpm_ext.ClassifierConfig(
        image_size=16, model_channels=32, num_classes=10, num_res_blocks=1, channel_mult=(1, 2),
        attention_resolutions=(8,), num_head_channels=32, pool="spatial",
    )  # fmt: skip
    model = Classifier(config).eval()
    torch.save(model.state_dict(), tmp_path / "model000001.pt")
    line = (
        "--image_size 16 --classifier_depth 1 --classifier_attention_resolutions 8 "
        "--classifier_use_scale_shift_norm True --classifier_resblock_updown True "
        "--classifier_pool spatial --channel_mult 1,2 --num_head_channels 32"
    )
    again = load_classifier(tmp_path / "model000001.pt", flags=line)
    assert again.config == config
    save(again, tmp_path / "ours.safetensors")
    back = load_classifier(tmp_path / "ours.safetensors")
    assert back.config == config
    assert torch.equal(back.out[2].weight, model.out[2].weight)
    with pytest.raises(ValueError, match=r"flags must be given for .* classifier_depth"):
        load_classifier(tmp_path / "model000001.pt")
    with pytest.raises(ValueError, match=r"cannot tell: .*classifier_pool"):
        load_classifier(tmp_path / "model000001.pt", flags={"image_size": 16})
    with pytest.raises(ValueError, match="load_classifier reads those"):
        load(tmp_path / "model000001.pt", flags=FLAGS)
    with pytest.raises(ValueError, match="must carry the configuration of its network"):
        load(tmp_path / "ours.safetensors")
    with pytest.raises(ValueError, match="must carry the configuration of a classifier"):
        save(UNet(OWN), tmp_path / "unet.safetensors")
        load_classifier(tmp_path / "unet.safetensors")
    with pytest.raises(FileNotFoundError, match="load_classifier: path must be an existing file"):
        load_classifier(tmp_path / "absent.pt")

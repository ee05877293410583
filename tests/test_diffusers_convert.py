"""Weights to and from diffusers' UNet2DModel: the same function, and the same bits back."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers_networks import SMALL, filled, small_network
from openai_files import MARCH, config_of_flags

import iddpm_ext
from iddpm_ext import Diffusion, IDDPMUNet2DModel, UNet, UNetConfig, from_diffusers, to_diffusers
from iddpm_ext.cli import main
from iddpm_ext.interop.folder import read_folder, write_folder

diffusers.utils.logging.set_verbosity_error()

# file -> (tensors of ours, of theirs, whether the stock class computes it): ecosystem.md, section 1.
SHAPES = {
    "cifar10_uncond_50M_500K.pt": (446, 506, True),
    "imagenet64_uncond_100M_1500K.pt": (450, 510, False),
    "imagenet64_cond_270M_250K.pt": (451, 511, False),
    "lsun_uncond_100M_1200K_bs128.pt": (426, 450, True),
    "upsample_cond_500K.pt": (457, 501, False),
}


def variant(**changes) -> UNetConfig:
    return UNetConfig.from_dict({**SMALL.to_dict(), **changes})


# Each option that the conversion knows, at a small size.
VARIANTS = {
    "plain": SMALL,
    "heads of two widths": variant(channel_mult=(1, 2, 3), attention_resolutions=(8, 4)),
    "other heads on the way up": variant(num_heads=4, num_heads_upsample=2),
    "labels": variant(num_classes=7),
    "super-resolution": variant(super_resolution=True),
    "added embedding": variant(use_scale_shift_norm=False, num_heads=1),
    "new order": variant(attention_order="new"),
    "guided-diffusion": variant(
        num_head_channels=16, resblock_updown=True, channel_mult=(1, 2, 3), attention_order="new"
    ),
    "one channel": variant(in_channels=1, out_channels=1, num_res_blocks=2, dropout=0.1),
}


def outputs(model: UNet, unet) -> tuple[torch.Tensor, torch.Tensor]:
    """What ours and theirs say of the same input, at the first, a middle and the last time."""
    c, generator = model.config, torch.Generator().manual_seed(1)
    size = min(c.image_size, 64)
    x = torch.randn(3, c.in_channels, size, size, generator=generator)
    t = torch.tensor([0.0, 412.25, 999.75])
    kwargs, theirs = {}, {}
    if c.num_classes is not None:
        kwargs["y"] = theirs["class_labels"] = torch.tensor([0, c.num_classes - 1, -1])
    if c.super_resolution:
        low_res = torch.randn(3, c.in_channels, size // 4, size // 4, generator=generator)
        kwargs["low_res"] = theirs["low_res"] = low_res
    with torch.no_grad():
        return model(x, t, **kwargs), unet(x, t, **theirs).sample


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 5e-6 * a.abs().max())


@pytest.mark.parametrize("name", VARIANTS)
def test_both_networks_compute_the_same_and_the_weights_come_back_to_the_bit(name):
    model = small_network(VARIANTS[name])
    unet = to_diffusers(model)
    assert agree(*outputs(model, unet))
    back = from_diffusers(unet)
    state = model.state_dict()
    if model.config.attention_order == "new":
        # Nothing in diffusers' tensors says in which order qkv was; ours says the first one.
        assert agree(*outputs(back, unet))
        return
    assert list(back.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in back.state_dict().items())


def test_the_other_order_of_qkv_computes_something_else():
    model = small_network(SMALL)
    wrong = UNet(variant(attention_order="new"))
    wrong.load_state_dict(model.state_dict())
    ours, theirs = outputs(model, to_diffusers(wrong))
    assert (ours - theirs).abs().max() > 1e-2 * ours.abs().max()


def test_the_stock_class_is_taken_where_it_computes_the_same_and_else_refused():
    kinds = {name: type(to_diffusers(small_network(c))).__name__ for name, c in VARIANTS.items()}
    own = {"heads of two widths", "other heads on the way up", "labels", "super-resolution"}
    assert kinds == {n: "IDDPMUNet2DModel" if n in own else "UNet2DModel" for n in VARIANTS}
    assert (
        type(to_diffusers(small_network(VARIANTS["labels"]), stock=True)).__name__ == "UNet2DModel"
    )
    with pytest.raises(ValueError, match=r"stock must be False .* heads of widths"):
        to_diffusers(small_network(VARIANTS["heads of two widths"]), stock=True)


@pytest.mark.parametrize("name", SHAPES)
def test_released_shapes_load_strictly_into_their_class(name):
    ours, theirs, stock = SHAPES[name]
    with torch.device("meta"):
        model = UNet(config_of_flags(MARCH[name]["flags"]))
    assert len(model.state_dict()) == ours
    unet = to_diffusers(model)
    assert len(unet.state_dict()) == theirs
    assert (type(unet) is diffusers.UNet2DModel) == stock
    back = from_diffusers(unet)
    assert {k: v.shape for k, v in back.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_the_cifar_network_computes_the_same_in_diffusers():
    model = filled(UNet(config_of_flags(MARCH["cifar10_uncond_50M_500K.pt"]["flags"])))
    assert agree(*outputs(model, to_diffusers(model)))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_released_networks_compute_the_same_in_diffusers(name):
    config = config_of_flags(MARCH[name]["flags"])
    model = filled(UNet(config))
    unet = to_diffusers(model)
    ours, theirs = outputs(model, unet)
    assert agree(ours, theirs)
    if not SHAPES[name][2] and not config.super_resolution and config.num_classes is None:
        # Why there is a class of our own: the stock one loads these tensors, and is wrong.
        wrong = diffusers.UNet2DModel.from_config(unet.config)
        wrong.load_state_dict(unet.state_dict())
        assert not agree(ours, outputs(model, wrong.eval())[1])


def test_a_foreign_unet_is_refused_with_everything_that_differs():
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(32, 64), freq_shift=1, norm_eps=1e-6,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"freq_shift=0 .*norm_eps=1e-05 .*mirror each other"):
        from_diffusers(unet)


def test_a_network_that_diffusers_made_and_trained_comes_over():
    unet = diffusers.UNet2DModel(
        sample_size=16, out_channels=6, block_out_channels=(32, 64, 96), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    filled(unet)
    model = from_diffusers(unet, diffusion=Diffusion())
    assert model.diffusion == Diffusion() and model.config.num_head_channels == 8
    assert agree(*outputs(model, unet))


def test_folders_hold_the_network_and_its_process(tmp_path):
    model = small_network(VARIANTS["heads of two widths"])
    model.diffusion = Diffusion("linear", 1000, rescale_timesteps=False)
    write_folder(model, tmp_path / "pipe")
    back = read_folder(tmp_path / "pipe")
    assert back.diffusion == model.diffusion
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in model.state_dict().items())
    alone = read_folder(tmp_path / "pipe" / "unet")
    assert alone.diffusion is None and alone.config == back.config
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipe"]
    with pytest.raises(ValueError, match="new or an empty folder"):
        write_folder(model, tmp_path / "pipe")


def test_a_folder_that_is_no_safetensors_is_refused(tmp_path):
    model = small_network()
    write_folder(model, tmp_path / "unet")
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        read_folder(tmp_path / "unet")
    weights.unlink()
    with pytest.raises(ValueError, match=r"must hold diffusion_pytorch_model.safetensors"):
        read_folder(tmp_path / "unet")
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    config["layers_per_block"] += 1
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="missing"):
        read_folder(tmp_path / "unet")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("iddpm_ext.files.flush", fail)
    with pytest.raises(OSError, match="disk full"):
        write_folder(small_network(), tmp_path / "unet")
    assert list(tmp_path.iterdir()) == []


def test_convert_goes_to_diffusers_and_back_and_verifies(tmp_path, capsys):
    folder, file = tmp_path / "garments", tmp_path / "back.safetensors"
    assert main(["convert", "fashion-mnist", str(folder), "--verify"]) == 0
    assert main(["convert", str(folder), str(file), "--verify"]) == 0
    printed = capsys.readouterr().out.splitlines()
    differences = [float(line.split()[2].rstrip(",")) for line in printed if "output" in line]
    assert len(differences) == 2 and differences[0] < 1e-5 and differences[1] == 0
    assert len([line for line in printed if line.startswith("  t = ")]) == 12
    ours, back = iddpm_ext.load("fashion-mnist"), iddpm_ext.load(file)
    assert back.config == ours.config and back.diffusion == ours.diffusion
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in ours.state_dict().items())
    pipe = iddpm_ext.IDDPMPipeline.from_pretrained(folder)
    assert isinstance(pipe.unet, IDDPMUNet2DModel)


def test_convert_names_what_it_cannot_write(tmp_path, capsys):
    assert main(["convert", "fashion-mnist", str(tmp_path / "a.bin")]) == 1
    assert "target must end in .safetensors or .onnx" in capsys.readouterr().err
    assert list(Path(tmp_path).iterdir()) == []


def test_convert_takes_an_openai_file_and_its_flags(tmp_path, capsys):
    model = small_network(VARIANTS["heads of two widths"])
    torch.save(model.state_dict(), tmp_path / "ema_0.9999_000100.pt")
    source, folder = str(tmp_path / "ema_0.9999_000100.pt"), tmp_path / "pipe"
    flags = (
        "--image_size 16 --num_heads 2 --noise_schedule linear --diffusion_steps 1000 "
        "--learn_sigma True --predict_xstart False --rescale_timesteps False"
    )
    assert main(["convert", source, str(folder), "--verify", f"--flags={flags}"]) == 0, (
        capsys.readouterr().err
    )
    assert float(capsys.readouterr().out.splitlines()[-1].split()[2].rstrip(",")) < 1e-5
    assert read_folder(folder).diffusion == Diffusion("linear", 1000, rescale_timesteps=False)

"""The programs under python/examples run, at toy size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers_networks import small_network
from PIL import Image

import iddpm_ext

EXAMPLES = Path(__file__).parent.parent / "python" / "examples"


def run(name: str, *arguments: object) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_train_your_own(tmp_path):
    for i in range(6):
        (tmp_path / "photos").mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    small = ("--batch-size", 4, "--image-size", 16, "--width", 32)
    for steps in (2, 3):
        run(
            "train_your_own.py", "--data", tmp_path / "photos", "--out", tmp_path / "run",
            "--steps", steps, *small,
        )  # fmt: skip
        assert (tmp_path / "run" / "ckpt" / f"step-{steps}").is_dir()
    assert (tmp_path / "run" / "drawn.png").exists()


def test_sample_openai(tmp_path):
    model = small_network()
    torch.save(model.state_dict(), tmp_path / "ema_0.9999_000010.pt")
    flags = (
        "--image_size 16 --num_heads 2 --noise_schedule cosine --diffusion_steps 4000 "
        "--learn_sigma True --predict_xstart False --rescale_timesteps True "
    )
    printed = run(
        "sample_openai.py", tmp_path / "ema_0.9999_000010.pt", "--flags", flags, "--steps", 3,
        "--n", 4, "--out", tmp_path / "a.png",
    )  # fmt: skip
    assert "Diffusion(cosine, 4000 steps, learned_range, epsilon)" in printed
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (4, 16, 16, 3)
    assert iddpm_ext.load(tmp_path / "a.safetensors").config == model.config


def test_swap_into_diffusers(tmp_path):
    printed = run("swap_into_diffusers.py", "--out", tmp_path, "--steps", 3, "--n", 2)
    assert "ResnetBlock2D: GroupNorm, scale-shift and SiLU" in printed
    wanted = {"ddpm.png", "ddim.png", "dpm++.png", "ours.png", "pipeline"}
    assert {path.name for path in tmp_path.iterdir()} == wanted

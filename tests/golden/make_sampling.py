"""Write sampling.json: whole chains of the original code, to compare ours with.

    python tests/golden/make_sampling.py CHECKOUT_OF_OPENAI_IMPROVED_DIFFUSION

The original draws its noise by ``torch.randn_like``; here it is given ours, named by seed, image
and step. Its float64 coefficients are looked up without rounding, so that agreement can be asked
to many digits. The model is a formula, repeated in tests/test_sampling.py.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

from iddpm_ext.random import STREAM_REVERSE, NoiseKey, normal

SEED = 11
# schedule, T, spacing, variance, sampler, eta, clip
CASES = [
    ("cosine", 4000, "50", "learned_range", "ddpm", 0.0, True),
    ("cosine", 400, "10,15,20", "fixed_large", "ddpm", 0.0, True),
    ("linear", 1000, "25", "fixed_small", "ddpm", 0.0, False),
    ("cosine", 4000, "ddim50", "learned_range", "ddim", 0.0, True),
    ("linear", 1000, "ddim25", "fixed_small", "ddim", 0.5, True),
    ("linear", 1000, "25", "learned_range", "ddim", 1.0, False),
]


def main(checkout: str) -> None:
    sys.path.insert(0, checkout)
    sys.modules.setdefault("mpi4py", types.SimpleNamespace(MPI=None))
    from improved_diffusion import gaussian_diffusion as gd
    from improved_diffusion import respace

    def extract64(array, timesteps, shape):
        rows = torch.from_numpy(np.asarray(array))[timesteps]
        return rows.view(-1, *[1] * (len(shape) - 1)).expand(shape)

    gd._extract_into_tensor = extract64
    x_T = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chains = {}
    for settings in CASES:
        schedule, total, spacing, variance, sampler, eta, clip = settings
        diffusion = respace.SpacedDiffusion(
            use_timesteps=respace.space_timesteps(total, spacing),
            betas=gd.get_named_beta_schedule(schedule, total),
            model_mean_type=gd.ModelMeanType.EPSILON,
            model_var_type=gd.ModelVarType[variance.upper()],
            loss_type=gd.LossType.MSE,
            rescale_timesteps=True,
        )
        seen: list[float] = []

        def model(x, t, variance=variance, seen=seen):
            seen.append(float(t[0]))
            eps = 0.9 * x + 0.1 * torch.sin(t.double() / 50).view(-1, 1, 1, 1)
            return torch.cat([eps, torch.cos(3 * x)], 1) if variance == "learned_range" else eps

        steps = iter(reversed(diffusion.timestep_map))

        def noise(x, steps=steps):
            key = NoiseKey(SEED, STREAM_REVERSE, torch.arange(len(x)), next(steps))
            return normal(key, x.shape).double()

        original, torch.randn_like = torch.randn_like, noise
        loop = diffusion.p_sample_loop if sampler == "ddpm" else diffusion.ddim_sample_loop
        arguments = {"eta": eta} if sampler == "ddim" else {}
        x = loop(model, x_T.shape, noise=x_T, clip_denoised=clip, device="cpu", **arguments)
        torch.randn_like = original
        name = " ".join(str(s) for s in settings)
        chains[name] = {"settings": settings, "x": x.flatten().tolist(), "timesteps": seen}

    golden = {
        "note": "Numbers of openai/improved-diffusion, made by make_sampling.py (see there).",
        "seed": SEED,
        "x_T": x_T.flatten().tolist(),
        "chains": chains,
    }
    Path(__file__).with_name("sampling.json").write_text(json.dumps(golden, indent=0) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

"""Draw from a checkpoint of openai/improved-diffusion, as it is.

    python python/examples/sample_openai.py cifar10_uncond_50M_500K.pt --steps 100 --out birds.png

A released file is recognised by its tensors. A file of another run needs flags:

    python python/examples/sample_openai.py ema_0.9999_200000.pt --flags "--noise_schedule cosine
        --diffusion_steps 4000 --rescale_timesteps True --num_heads 4 --image_size 64"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import iddpm_ext


def main() -> None:
    """Loads, draws, writes images and a safetensors file that needs no flags any more."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--flags")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--sampler", choices=["ddpm", "ddim", "dpm++"], default="ddpm")
    parser.add_argument("--out", type=Path, default=Path("samples.png"))
    arguments = parser.parse_args()

    model = iddpm_ext.load(arguments.checkpoint, flags=arguments.flags)
    print(model.diffusion, f"{sum(p.numel() for p in model.parameters()):,} parameters")

    x = iddpm_ext.sample(model, arguments.steps, n=arguments.n, sampler=arguments.sampler, seed=0)
    print(iddpm_ext.save_images(x, arguments.out))
    # The file that the original's evaluator reads, and the weights with their configuration inside.
    print(iddpm_ext.save_images(x, arguments.out.with_suffix(".npz")))
    iddpm_ext.save(model, arguments.out.with_suffix(".safetensors"))


if __name__ == "__main__":
    main()

"""Train on your own images, draw from the averaged weights, and continue an interrupted run.

    python python/examples/train_your_own.py --data photos/ --out runs/photos --steps 50000

DATA is a folder or a zip of images (one folder per class, for --class-cond), an .npz, or anything else
that `iddpm train` reads. Called again, it continues from the newest valid checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import iddpm_ext
from iddpm_ext.training import TrainConfig, train


def main() -> None:
    """Trains, samples and writes a grid beside the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--class-cond", action="store_true")
    arguments = parser.parse_args()

    config = TrainConfig(
        data=arguments.data,
        out=str(arguments.out),
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        image_size=arguments.image_size,
        model_channels=arguments.width,
        attention_resolutions=(arguments.image_size // 4,),
        class_cond=arguments.class_cond,
        objective="hybrid",  # the paper's: learns the variance beside the noise
        resume="auto",
    )
    checkpoint = train(config)

    # The averaged weights draw better images than the last ones.
    model = iddpm_ext.load(next(iter(sorted(checkpoint.glob("ema_*.safetensors")))))
    x = iddpm_ext.sample(model, steps=50, n=16, seed=0)
    print(iddpm_ext.save_images(x, arguments.out / "drawn.png"))


if __name__ == "__main__":
    main()

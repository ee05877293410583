"""A network of the paper in a pipeline of diffusers, and a pipeline of diffusers on our operators.

    python python/examples/swap_into_diffusers.py fashion-mnist --out garments/

Needs `pip install diffusers`. OUT becomes a folder that `from_pretrained` reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import iddpm_ext
from iddpm_ext.interop.folder import write_folder


def main() -> None:
    """Converts, draws by three samplers, and draws once more by our own sampler."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default="fashion-mnist")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--n", type=int, default=10)
    arguments = parser.parse_args()

    model = iddpm_ext.load(arguments.checkpoint)
    folder = write_folder(model, arguments.out / "pipeline")  # as `iddpm convert` does

    pipe = iddpm_ext.IDDPMPipeline.from_pretrained(folder)
    classes = model.config.num_classes
    labels = None if classes is None else [i % classes for i in range(arguments.n)]
    for sampler in ("ddpm", "ddim", "dpm++"):
        pipe.scheduler = iddpm_ext.IDDPMScheduler.from_config(
            pipe.scheduler.config, sampler=sampler
        )
        with iddpm_ext.accelerate(pipe.unet) as done:
            images = pipe(
                batch_size=arguments.n,
                class_labels=labels,
                num_inference_steps=arguments.steps,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            ).images
        print(iddpm_ext.save_images(images * 2 - 1, arguments.out / f"{sampler}.png"))
    print(done)

    # The same pipeline by our sampler: on a CPU its network runs in the engine, several times faster.
    x = iddpm_ext.sample(pipe, arguments.steps, n=arguments.n, labels=labels, seed=0)
    print(iddpm_ext.save_images(x, arguments.out / "ours.png"))


if __name__ == "__main__":
    main()

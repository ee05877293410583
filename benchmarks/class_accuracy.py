"""How many class-conditional samples a classifier of real images takes for their class.

A small convolutional network is trained on the real images of the training split (a few minutes on one core),
or with --extractor a linear layer on the features of a network that `iddpm evaluate` knows; its accuracy on
the real images of the test split is measured, and then that on samples, as many of each class:

    python -m benchmarks.class_accuracy --data /usr/share/datasets/fashion-mnist
    python -m benchmarks.class_accuracy --model cifar10-small --data cifar10.zip \\
        --extractor efficientnet-lite0-112

Fashion-MNIST is the Debian package dataset-fashion-mnist, or any folder with the four IDX files.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import iddpm_ext
from benchmarks.context import context, write_json
from iddpm_ext.data import ImageData, match_classes, open_data
from iddpm_ext.evaluation.extractors import open_extractor


def convolutional(channels: int, size: tuple[int, int], classes: int) -> nn.Sequential:
    """Two convolutions and two linear layers; [N, C, H, W] -> [N, classes] logits."""
    height, width = size
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(64 * (height // 4) * (width // 4), 128), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(128, classes),
    )  # fmt: skip


class Judge:
    """A classifier of images [N, C, H, W] in [-1, 1], trained by `fit`."""

    def __init__(self, data: ImageData, classes: int, extractor: str | None) -> None:
        channels, height, width = data.image_shape
        self._extractor = None if extractor is None else open_extractor(extractor)
        self.network: nn.Module = nn.LazyLinear(classes)
        if self._extractor is None:
            self.network = convolutional(channels, (height, width), classes)

    def inputs(self, images: Tensor) -> Tensor:
        """What the network reads: the images, or features [N, D] of them."""
        if self._extractor is None:
            return images
        levels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
        found = [self._extractor(part).features.float() for part in levels.split(64)]
        return torch.cat(found).clone()

    def fit(self, inputs: Tensor, labels: Tensor, epochs: int, batch: int = 128) -> None:
        """Trains with Adam and a rate that falls to zero."""
        self.network.train()
        if isinstance(self.network, nn.LazyLinear):
            self.network(inputs[:2])  # which gives it its weights
        steps = epochs * (len(inputs) // batch)
        optimizer = torch.optim.Adam(self.network.parameters(), lr=2e-3)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for _ in range(epochs):
            for chosen in torch.randperm(len(inputs)).split(batch)[: len(inputs) // batch]:
                optimizer.zero_grad()
                F.cross_entropy(self.network(inputs[chosen]), labels[chosen]).backward()
                optimizer.step()
                decay.step()
        self.network.eval()

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """The most likely class of each, int64 [N]."""
        return torch.cat([self.network(part).argmax(1) for part in inputs.split(500)])


def read(data: ImageData, classes: Tensor) -> tuple[Tensor, Tensor]:
    """All images of a split, float32 [N, C, H, W] in [-1, 1], and their labels as the model numbers them."""
    images, indices, _ = data.images(torch.arange(len(data)))
    labels = data.labels(indices)
    assert labels is not None
    return images, classes[labels]


def main() -> None:
    """Trains, samples, and prints accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--model", default="fashion-mnist", help="a name or file of iddpm_ext.load")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--extractor", help="features to classify by, as in iddpm evaluate")
    parser.add_argument("--epochs", type=int, default=5, help="of the classifier")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="of sampling; the classifier is on the CPU")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()

    model = iddpm_ext.load(arguments.model, arguments.device)
    count, names = model.config.num_classes, model.extra.get("class_names")
    train, test = (open_data(arguments.data, split=split) for split in ("train", "test"))
    if count is None or train.class_names is None:
        parser.error("the model and the data must have classes")
    numbers = list(range(len(train.class_names)))
    classes = match_classes("class_accuracy", train.class_names, numbers, names, count)

    torch.manual_seed(arguments.seed)
    judge = Judge(train, count, arguments.extractor)
    images, truth = read(train, classes)
    judge.fit(judge.inputs(images), truth, arguments.epochs)
    images, truth = read(test, classes)
    real = float((judge(judge.inputs(images)) == truth).float().mean())
    print(f"real test images: {real:.2%} of {len(truth)} recognised")

    labels = torch.arange(arguments.samples) % count
    began = time.perf_counter()
    samples = iddpm_ext.sample(
        model, steps=arguments.steps, labels=labels, seed=arguments.seed, batch_size=50,
        guidance_scale=arguments.guidance_scale,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    hits = judge(judge.inputs(samples.float().cpu())) == labels
    shown = names or [str(k) for k in range(count)]
    per_class = {str(name): float(hits[labels == k].float().mean()) for k, name in enumerate(shown)}
    accuracy = float(hits.float().mean())
    for name, share in per_class.items():
        print(f"  {name:<12}{share:.1%}")
    print(
        f"samples at {arguments.steps} steps: {accuracy:.2%} of {len(labels)} recognised "
        f"({seconds:.0f} s of sampling)"
    )
    if arguments.json is not None:
        figures = {
            **context("class_accuracy"),
            "command": " ".join(["python -m benchmarks.class_accuracy", *sys.argv[1:]]),
            "model": arguments.model,
            "samples": len(labels),
            "steps": arguments.steps,
            "guidance_scale": arguments.guidance_scale,
            "extractor": arguments.extractor,
            "seed": arguments.seed,
            "real_test_accuracy": real,
            "sample_accuracy": accuracy,
            "per_class": per_class,
            "sampling_seconds": round(seconds, 1),
        }
        write_json(arguments.json, figures)


if __name__ == "__main__":
    main()

"""How many class-conditional samples a classifier of real Fashion-MNIST takes for their class.

A small convolutional network is trained on the 60,000 real images (a few minutes on one core), its
accuracy on the 10,000 real test images is measured, and then that on samples, as many of each class:

    python -m benchmarks.fashion_mnist_accuracy --data /usr/share/datasets/fashion-mnist

The data is the Debian package dataset-fashion-mnist, or any folder with the four IDX files.
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
from iddpm_ext.data import open_data

NAMES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip


def classifier() -> nn.Sequential:
    """Two convolutions and two linear layers; [N, 1, 28, 28] -> [N, 10] logits."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(64 * 49, 128), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(128, 10),
    )  # fmt: skip


def read(path: str, split: str) -> tuple[Tensor, Tensor]:
    """All images of a split, float32 [N, 1, 28, 28] in [-1, 1], and their labels, int64 [N]."""
    data = open_data(path, split=split)
    images, indices, _ = data.images(torch.arange(len(data)))
    labels = data.labels(indices)
    if labels is None:
        raise ValueError(f"data must have labels, got none in {path}")
    return images, labels


def train(images: Tensor, labels: Tensor, epochs: int, batch: int = 128) -> nn.Sequential:
    """A classifier of these images, trained with Adam and a rate that falls to zero."""
    model = classifier()
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(batch)[: len(images) // batch]:
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            decay.step()
    return model.eval()


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The most likely class of each image, int64 [N]."""
    return torch.cat([model(part).argmax(1) for part in images.split(500)])


def main() -> None:
    """Trains, samples, and prints accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--model", default="fashion-mnist", help="a name or file of iddpm_ext.load")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=5, help="of the classifier")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--classifier", type=Path, help="weights to load, or to write after training"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    if arguments.classifier is not None and arguments.classifier.exists():
        judge = classifier()
        judge.load_state_dict(torch.load(arguments.classifier, weights_only=True))
        judge.eval()
    else:
        judge = train(*read(arguments.data, "train"), arguments.epochs)
        if arguments.classifier is not None:
            torch.save(judge.state_dict(), arguments.classifier)
    images, truth = read(arguments.data, "test")
    real = float((predict(judge, images) == truth).float().mean())
    print(f"real test images: {real:.2%} of {len(truth)} recognised")

    labels = torch.arange(arguments.samples) % 10
    model = iddpm_ext.load(arguments.model)
    began = time.perf_counter()
    samples = iddpm_ext.sample(
        model, steps=arguments.steps, labels=labels, seed=arguments.seed, batch_size=50
    )
    seconds = time.perf_counter() - began
    hits = predict(judge, samples.float()) == labels
    per_class = {name: float(hits[labels == k].float().mean()) for k, name in enumerate(NAMES)}
    accuracy = float(hits.float().mean())
    for name, share in per_class.items():
        print(f"  {name:<10}{share:.1%}")
    print(
        f"samples at {arguments.steps} steps: {accuracy:.2%} of {len(labels)} recognised "
        f"({seconds:.0f} s of sampling)"
    )
    if arguments.json is not None:
        figures = {
            **context("fashion_mnist_accuracy"),
            "command": " ".join(["python -m benchmarks.fashion_mnist_accuracy", *sys.argv[1:]]),
            "model": arguments.model,
            "samples": len(labels),
            "steps": arguments.steps,
            "seed": arguments.seed,
            "real_test_accuracy": real,
            "sample_accuracy": accuracy,
            "per_class": per_class,
            "sampling_seconds": round(seconds, 1),
        }
        write_json(arguments.json, figures)


if __name__ == "__main__":
    main()

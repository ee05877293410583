"""Few steps, by every sampler, variance and schedule: python -m benchmarks.few_steps --model NAME --data DIR

For each number of steps K: the Fréchet distance of samples to the training images, with its interval, the
seconds of sampling, and bits/dim of test images for the chains that have a bound. Every result is written
to --output as soon as it is there, and what the file already has is not computed again: a run may be
interrupted, and made in pieces by --methods, --steps and --n. The model is first given moments and picture
schedules, where it has none, kept beside the output. --table prints what the file holds, with the best of
each K; --picture draws a row of the same images for each method and K; --errors measures, for the methods
without noise, how far their images are from those of the same noise by 1,000 steps.

    python -m benchmarks.few_steps --model fashion-mnist --data /usr/share/datasets/fashion-mnist \\
        --n 5000 --output benchmarks/results/few_steps_fashion-mnist.json

The extractor is that of `iddpm evaluate`; FID's Inception is a file of yours (--extractor FILE).
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import iddpm_ext
from benchmarks.context import context, write_json
from iddpm_ext.engines.spec import weights_fingerprint
from iddpm_ext.evaluation import evaluate
from iddpm_ext.likelihood import find_covariance, find_moments
from iddpm_ext.networks.unet import UNet
from iddpm_ext.sampling import find_picture_schedules

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COUNTS = (5, 8, 10, 15, 25, 50, 100)


class Method(NamedTuple):
    """A row: arguments of `sample`, and whether the chain has a bound of its own."""

    steps: str
    sampler: str
    variance: str | None = None
    eta: float = 0.0

    @property
    def bound(self) -> bool:
        return self.sampler == "ddpm"

    def at(self, count: int) -> int | str:
        """The `steps` of `sample`."""
        text = self.steps.format(count)
        return int(text) if text.isdigit() else text

    @property
    def noise(self) -> bool:
        """Whether its steps add any."""
        return self.sampler in ("ddpm", "dpm++sde") or self.variance is not None or self.eta > 0


METHODS = {
    "ddpm": Method("{}", "ddpm"),
    "ddpm-small": Method("{}", "ddpm", "fixed_small"),
    "ddpm-analytic": Method("{}", "ddpm", "analytic"),
    "ddpm-optimal": Method("optimal-{}", "ddpm"),
    "ddpm-optimal-analytic": Method("optimal-{}", "ddpm", "analytic"),
    "ddpm-best-analytic": Method("analytic-{}", "ddpm", "analytic"),
    "ddpm-covariance": Method("{}", "ddpm", "optimal"),
    "ddpm-best-covariance": Method("analytic-{}", "ddpm", "optimal"),
    "ddpm-pictures": Method("pictures-{}", "ddpm"),
    "ddpm-pictures-analytic": Method("pictures-{}", "ddpm", "analytic"),
    "ddim": Method("{}", "ddim"),
    "ddim-analytic": Method("{}", "ddim", "analytic"),
    "ddim-covariance": Method("{}", "ddim", "optimal"),
    "ddim-pictures": Method("pictures-{}", "ddim"),
    "ddim-pictures-analytic": Method("pictures-{}", "ddim", "analytic"),
    "dpm++": Method("{}", "dpm++"),
    "dpm++-pictures": Method("pictures-{}", "dpm++"),
    "dpm++3": Method("{}", "dpm++3"),
    "dpm++3-pictures": Method("pictures-{}", "dpm++3"),
    "dpm++sde": Method("{}", "dpm++sde"),
    "dpm++sde-pictures": Method("pictures-{}", "dpm++sde"),
    "unipc": Method("{}", "unipc"),
    "unipc-pictures": Method("pictures-{}", "unipc"),
    "unipc3": Method("{}", "unipc3"),
    "unipc3-pictures": Method("pictures-{}", "unipc3"),
}
# Methods without moments, picture schedules and the newer solvers, for comparison.
BEFORE = ("ddpm", "ddpm-small", "ddpm-optimal", "ddim", "dpm++")


def prepared(name: str, data: str, kept: Path, methods: Sequence[Method], device: str) -> UNet:
    """The model with moments, and with picture schedules and a head as methods need; `kept` keeps them."""
    model = iddpm_ext.load(kept if kept.exists() else name, device)
    had, weights = set(model.extra), weights_fingerprint(model)
    if "moments" not in had:
        model.extra["moments"] = find_moments(model, data, limit=64).to_extra(weights)
    if "picture_schedules" not in had and any(m.steps.startswith("pictures") for m in methods):
        model.extra["picture_schedules"] = find_picture_schedules(model).to_extra()
    if "covariance" not in had and any(m.variance == "optimal" for m in methods):
        model.extra["covariance"] = find_covariance(model, data).to_extra(weights)
    if set(model.extra) != had:
        iddpm_ext.save(model, kept)
    return model


def turns(model: UNet, n: int) -> torch.Tensor | None:
    """Labels int64 [n] of the classes in turn; None without classes."""
    classes = model.config.num_classes
    return None if classes is None else torch.arange(n, dtype=torch.int64) % classes


def measure(model: UNet, method: Method, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """Distance, bits/dim and seconds of one method at one number of steps."""
    steps, labels = method.at(count), turns(model, args.n)
    began = time.perf_counter()
    images = iddpm_ext.sample(
        model, steps, n=args.n, labels=labels, seed=args.seed, sampler=method.sampler,
        variance=method.variance, eta=method.eta, dtype=args.dtype, progress=False,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    with warnings.catch_warnings():
        # The warning that fewer samples than features bias the distance; the table has their number.
        warnings.simplefilter("ignore", UserWarning)
        found = evaluate(
            images, args.data, extractor=args.extractor, metrics=("fid",), reference_n=args.reference,
            image_size=model.config.image_size, device=args.device, progress=False,
        )  # fmt: skip
    ((name, score),) = found.scores.items()
    row: dict[str, Any] = {"metric": name, "distance": score.value, "seconds": seconds}
    if score.ci95 is not None:
        row["ci95"] = [score.ci95.low, score.ci95.high]
    if method.bound and args.images:
        bound = iddpm_ext.nll(
            model, args.data, limit=args.images, steps=steps, variance=method.variance,
            budget=args.budget, seed=args.seed, progress=False,
        )  # fmt: skip
        row.update(bpd=bound.bpd, bpd_ci95=list(bound.ci95))
    return row


def table(rows: dict[str, dict[str, Any]], n: int) -> str:
    """Markdown: methods by K, distance ± half of its interval and bits/dim; the best of each K in bold."""
    counts = sorted({row["steps"] for row in rows.values() if row["n"] == n})
    found = {(row["method"], row["steps"]): row for row in rows.values() if row["n"] == n}
    best = {k: min((r["distance"], m) for (m, c), r in found.items() if c == k)[1] for k in counts}
    lines = ["| method | " + " | ".join(map(str, counts)) + " |", "|---" * (len(counts) + 1) + "|"]
    for method in METHODS:
        cells = []
        for count in counts:
            row = found.get((method, count))
            if row is None:
                cells.append("")
                continue
            low, high = row.get("ci95", (row["distance"],) * 2)
            cell = f"{row['distance']:.1f} ± {(high - low) / 2:.1f}"
            cell = f"**{cell}**" if best[count] == method else cell
            cells.append(cell + (f"; {row['bpd']:.3f}" if "bpd" in row else ""))
        if any(cells):
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    for count in counts:
        old = [r for (m, c), r in found.items() if c == count and m in BEFORE]
        now = found[best[count], count]
        if old and "ci95" in now:
            least = min(old, key=lambda row: row["distance"])
            beyond = "beyond" if now["ci95"][1] < least["ci95"][0] else "not beyond"
            lines.append(
                f"\n{count} steps: {now['method']} {now['distance']:.1f} against {least['method']} "
                f"{least['distance']:.1f}, {beyond} the intervals."
            )
    return "\n".join(lines)


def trajectory_errors(
    model: UNet, methods: Sequence[str], args: argparse.Namespace
) -> dict[str, float]:
    """RMS distance of images to those of the same noise by 1,000 steps of dpm++ (or all), by "method K".

    Both chains begin with the same step, and clamp predictions, without which that step decides everything.
    """
    assert model.diffusion is not None
    total, labels = model.diffusion.num_train_timesteps, turns(model, args.errors)

    def images(steps: int | str | list[int], sampler: str) -> torch.Tensor:
        return iddpm_ext.sample(
            model, steps, n=args.errors, labels=labels, seed=args.seed, sampler=sampler, progress=False
        )  # fmt: skip

    exact: dict[int, torch.Tensor] = {}
    found = {}
    for name in methods:
        method = METHODS[name]
        if method.noise:
            continue
        for count in args.steps:
            steps = method.at(count)
            pictures = model.extra.get("picture_schedules", {})
            first = total - 1 if isinstance(steps, int) else pictures[str(count)][-1]
            if first not in exact:
                fine = torch.linspace(0, first, min(1000, first + 1), dtype=torch.float64)
                exact[first] = images(fine.round().long().tolist(), "dpm++")
            away = images(steps, method.sampler) - exact[first]
            found[f"{name} {count}"] = float(away.square().mean().sqrt())
            print(f"{name} {count}: {found[f'{name} {count}']:.4f}", flush=True)
    return found


def draw(model: UNet, methods: list[str], counts: list[int], args: argparse.Namespace) -> None:
    """Rows of the same ten images, for each K every method."""
    labels = turns(model, 10)
    rows = []
    for count in counts:
        for name in methods:
            method = METHODS[name]
            images = iddpm_ext.sample(
                model, method.at(count), n=10, labels=labels, seed=args.seed, sampler=method.sampler,
                variance=method.variance, dtype=args.dtype, progress=False,
            )  # fmt: skip
            rows.append(images)
    iddpm_ext.save_images(torch.cat(rows), args.picture, columns=10)
    print(f"{args.picture}: for {counts} steps each {', '.join(methods)}, from above")


def main() -> None:
    """Measures what the file lacks, or prints or draws it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="fashion-mnist", help="a name or file of iddpm_ext.load")
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--extractor", default="efficientnet-lite0")
    parser.add_argument("--n", type=int, default=5000, help="samples")
    parser.add_argument("--reference", type=int, help="training images; all if not given")
    parser.add_argument(
        "--images", type=int, default=100, help="test images for bits/dim; 0 for none"
    )
    parser.add_argument(
        "--budget", type=float, default=32, help="evaluations per image for bits/dim"
    )
    parser.add_argument("--methods", type=_methods, default=list(METHODS), help="of the table")
    parser.add_argument("--steps", type=_numbers, default=list(COUNTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of sampling; bits/dim are in float32"
    )
    parser.add_argument("--table", action="store_true", help="print the file's results alone")
    parser.add_argument("--picture", type=Path, help="a PNG of the methods and steps, and no more")
    parser.add_argument("--errors", type=int, help="images to measure distances to 1,000 steps of")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, added to")
    args = parser.parse_args()
    args.dtype = DTYPES[args.dtype]
    torch.set_num_threads(args.threads)
    record = json.loads(args.output.read_text()) if args.output.exists() else {"rows": {}}
    if args.table:
        print(table(record["rows"], args.n))
        return
    model = prepared(
        args.model, args.data, args.output.with_suffix(".safetensors"),
        [METHODS[m] for m in args.methods], args.device,
    )  # fmt: skip
    if args.picture is not None:
        draw(model, args.methods, args.steps, args)
        return
    if args.errors is not None:
        errors = {
            f"{args.model} {key}": v
            for key, v in trajectory_errors(model, args.methods, args).items()
        }
        record["errors"] = {**record.get("errors", {}), **errors}
        write_json(args.output, record)
        return
    for count in args.steps:
        for name in args.methods:
            key = f"{args.model} {name} {count} {args.n} {args.seed} {args.extractor}"
            if key in record["rows"]:
                continue
            if METHODS[name].steps.startswith("optimal") and "step_schedules" not in model.extra:
                print(f"{name} {count}: the model has no optimal schedules", flush=True)
                continue
            row = measure(model, METHODS[name], count, args)
            record["rows"][key] = {
                "method": name, "steps": count, "n": args.n, "dtype": str(args.dtype)[6:],
                "device": args.device, **row,
            }  # fmt: skip
            record.update(context("benchmarks.few_steps"))
            write_json(args.output, record)
            shown = f"{row['distance']:.2f}" + (
                f", {row['bpd']:.3f} bits/dim" if "bpd" in row else ""
            )
            print(f"{name} {count}: {shown}, {row['seconds']:.0f} s", flush=True)
    print(table(record["rows"], args.n))


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _methods(text: str) -> list[str]:
    words = text.split(",")
    unknown = set(words) - set(METHODS)
    if unknown:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(METHODS)}, got {unknown}")
    return words


if __name__ == "__main__":
    main()

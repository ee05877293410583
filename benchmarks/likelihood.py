"""The cost of a likelihood, and bits/dim of short chains: python -m benchmarks.likelihood --data DIR

Without a further flag: how many network evaluations the mean over the images needs for a half-width of the
95 % interval of 0.01 bits/dim, by running growing budgets, against the full sum and against steps drawn
uniformly. --steps-table: bits/dim at few steps, evenly spaced, by ddimN and by the checkpoint's optimal
schedules, all on the same images with the same noise. --samples FILE.png draws the same images by all of
those. DIR is the Debian package dataset-fashion-mnist, or any data that `iddpm nll` reads.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import iddpm_ext
from benchmarks.context import context, write_json
from iddpm_ext.likelihood import Likelihood
from iddpm_ext.networks.unet import UNet

BUDGETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
COUNTS = (5, 10, 25, 50, 100, 250)
SPACINGS = {"even": "{}", "ddim": "ddim{}", "optimal": "optimal-{}"}


def half_width(result: Likelihood) -> float:
    """Half the 95 % interval over steps and noise."""
    return (result.ci95[1] - result.ci95[0]) / 2


def uniform_evaluations(result: Likelihood, target: float) -> float:
    """Evaluations an image that steps drawn uniformly, with replacement, would need.

    One evaluation has the variance T sum_t E[l_t^2] - (sum_t E[l_t])^2 for an image; both moments come from
    the steps that `result` drew, interpolated in log(t + 1) between them.
    """
    steps = result.per_step
    drawn = (steps.count > 1).numpy()
    count, mean = steps.count.numpy()[drawn], steps.bpd.numpy()[drawn]
    square = mean**2 + steps.bpd_error.numpy()[drawn] ** 2 * (count - 1)
    log_t = np.log1p(np.arange(len(drawn)))
    squares = np.exp(np.interp(log_t, log_t[drawn], np.log(square)))
    bound = (result.per_image_bpd - result.prior_bpd).square().mean()
    variance = len(drawn) * squares.sum() - float(bound)
    return variance * (1.96 / target) ** 2 / len(result.per_image_bpd)


def cost(model: UNet, args: argparse.Namespace) -> dict[str, Any]:
    """The smallest budget that reaches the half-width, and the costs of the alternatives."""
    rows: list[dict[str, Any]] = []
    result = None
    for budget in BUDGETS:
        began = time.process_time()
        result = iddpm_ext.nll(model, args.data, limit=args.n, budget=budget, seed=args.seed)
        rows.append(
            {
                "budget": budget,
                "evaluations": result.evaluations,
                "bpd": result.bpd,
                "half_width": half_width(result),
                "cpu_seconds": time.process_time() - began,
            }
        )
        print(
            f"budget {budget:>3}: {result.bpd:.4f} ± {half_width(result):.4f} bits/dim", flush=True
        )
        # Without pairs, the error over steps and noise cannot be separated from that over images.
        if budget > 1 and half_width(result) <= args.half_width:
            break
    assert result is not None
    total = model.diffusion.num_timesteps if model.diffusion else 0
    needed = result.evaluations / len(result.per_image_bpd)
    uniform = uniform_evaluations(result, args.half_width)
    print(
        f"{needed:.1f} evaluations per image for ± {args.half_width} over {args.n} images; "
        f"the full sum takes {total} ({total / needed:.0f}x), uniform steps {uniform:.0f} "
        f"({uniform / needed:.0f}x)"
    )
    return {
        "half_width": args.half_width,
        "images": args.n,
        "rows": rows,
        "evaluations_an_image": needed,
        "full_sum_evaluations_an_image": total,
        "uniform_evaluations_an_image": uniform,
        "times_fewer_than_the_full_sum": total / needed,
        "times_fewer_than_uniform": uniform / needed,
    }


def steps_table(model: UNet, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Bits/dim of every number of steps and spacing, as rows, printed as a table."""
    rows = []
    print("| steps | " + " | ".join(args.spacings) + " |\n|" + "---|" * (len(args.spacings) + 1))
    for count in args.counts:
        cells = []
        for name in args.spacings:
            steps: int | str = SPACINGS[name].format(count)
            steps = int(steps) if steps.isdigit() else steps
            result = iddpm_ext.nll(
                model, args.data, limit=args.n, steps=steps, budget=args.budget, seed=args.seed
            )
            row = {"steps": count, "spacing": name, "bpd": result.bpd, "ci95": list(result.ci95)}
            rows.append({**row, "evaluations": result.evaluations})
            digits = 1 if half_width(result) > 0.1 else 3
            cells.append(f"{result.bpd:.{digits}f} ± {half_width(result):.{digits}f}")
        print(f"| {count} | " + " | ".join(cells) + " |", flush=True)
    return rows


def draw_samples(model: UNet, args: argparse.Namespace) -> None:
    """A picture: a row for each number of steps and spacing, the same image in each column."""
    rows = []
    for count in args.counts:
        for name in args.spacings:
            steps: int | str = SPACINGS[name].format(count)
            steps = int(steps) if steps.isdigit() else steps
            sampler = "ddim" if name == "ddim" else "ddpm"
            labels = None if model.config.num_classes is None else list(range(10))
            rows.append(
                iddpm_ext.sample(
                    model,
                    steps,
                    n=10,
                    labels=labels,
                    seed=args.seed,
                    sampler=sampler,
                    progress=False,
                )
            )
    iddpm_ext.save_images(torch.cat(rows), args.samples, columns=10)
    print(f"{args.samples}: for {args.counts} steps each {', '.join(args.spacings)}, from above")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="fashion-mnist")
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--n", type=int, default=1000, help="images, the first of the test split")
    parser.add_argument("--half-width", type=float, default=0.01, help="bits/dim")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-table", action="store_true")
    parser.add_argument("--counts", type=_numbers, default=list(COUNTS))
    parser.add_argument("--spacings", type=_words, default=list(SPACINGS))
    parser.add_argument("--budget", type=float, default=64, help="of the table")
    parser.add_argument("--samples", type=Path, help="a PNG of samples of the table's chains")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = iddpm_ext.load(args.model)
    record = context("benchmarks.likelihood")
    if args.samples is not None:
        draw_samples(model, args)
    if args.steps_table:
        record["rows"] = steps_table(model, args)
    elif args.samples is None:
        record.update(cost(model, args))
    if args.output is not None:
        write_json(args.output, record)


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _words(text: str) -> list[str]:
    words = text.split(",")
    unknown = set(words) - set(SPACINGS)
    if unknown:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(SPACINGS)}, got {unknown}")
    return words


if __name__ == "__main__":
    main()

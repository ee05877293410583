"""Tables 1 and 2: schedule x objective, trained alike; distance and bits/dim.

The paper's rows on ImageNet 64x64 and CIFAR-10, with a small network on your data, and both samplers
of timesteps.
"""

from __future__ import annotations

from ablation import FLAGS, ablation
from common import SMALL, arguments, bits, distance, progress, table_figure, write

#: the paper's rows: (short chain, schedule, objective, sampler of timesteps, whether at the lower rate)
ROWS = [
    (True, "linear", "simple", "uniform", False),
    (False, "linear", "simple", "uniform", False),
    (False, "linear", "hybrid", "uniform", False),
    (False, "cosine", "simple", "uniform", False),
    (False, "cosine", "hybrid", "uniform", False),
    (False, "cosine", "hybrid", "uniform", True),
    (False, "cosine", "hybrid", "loss-second-moment", True),
    (False, "cosine", "vlb", "uniform", True),
    (False, "cosine", "vlb", "loss-second-moment", True),
]


def main() -> None:
    """Trains the networks and measures each."""
    flags = arguments(
        __doc__, checkpoint=False, samples=(1000, 30), references=(5000, 60), images=(200, 8),
        budget=(100, 20), sample_steps=(50, 10), extractor=("efficientnet-lite0-112", "pixels"), **FLAGS,
    )  # fmt: skip
    rows = []
    for short, schedule, objective, sampler, lower in progress(ROWS, "trainings"):
        rate = flags.vlb_lr if lower else None
        model, records = ablation(flags, schedule, objective, sampler, short=short, lr=rate)
        value, half = distance(model, flags.data, flags, steps=flags.sample_steps)
        found = bits(model, flags)
        rows.append({
            "T": flags.short if short else flags.long, "schedule": schedule, "objective": objective,
            "timesteps": "importance" if sampler != "uniform" else sampler,
            "lr": rate or SMALL["lr"],
            "bits/dim": found.bpd, "bits/dim +-": (found.ci95[1] - found.ci95[0]) / 2,
            f"FD-{flags.extractor}": value, "FD +-": half,
            "train s": records[-1]["seconds"],
        })  # fmt: skip
    title = f"Tables 1, 2: schedule x objective, {flags.train_steps} steps of training"
    write(flags, "table1_2_ablation", rows, table_figure(rows, title), samples=flags.samples)


if __name__ == "__main__":
    main()

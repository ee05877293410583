"""Tables 1 and 2: schedule x objective, trained alike; distance and bits/dim.

The paper's rows on ImageNet 64x64 and CIFAR-10, with a small network on your data.
"""

from __future__ import annotations

from typing import Any

from common import arguments, bits, distance, table_figure, trained, write

#: the paper's rows: (T, schedule, objective); "simple" has a fixed variance there
ROWS = [
    ("short", "linear", "simple"),
    ("long", "linear", "simple"),
    ("long", "linear", "hybrid"),
    ("long", "cosine", "simple"),
    ("long", "cosine", "hybrid"),
    ("long", "cosine", "vlb"),
]


def main() -> None:
    """Trains the six networks and measures each."""
    flags = arguments(
        __doc__, checkpoint=False, train_steps=(3000, 8), width=(32, 32), samples=(300, 30),
        references=(1000, 60), images=(32, 8), budget=(100, 20), sample_steps=(50, 10),
        short=(1000, 50), long=(4000, 100), extractor=("efficientnet-lite0-112", "pixels"),
    )  # fmt: skip
    rows = []
    for length, schedule, objective in ROWS:
        total = flags.short if length == "short" else flags.long
        settings: dict[str, Any] = {"objective": objective}
        if objective == "simple":
            settings["variance"] = "fixed_large"
        if objective == "vlb":
            settings["timestep_sampler"] = "loss-second-moment"
        model, _ = trained(
            flags, f"table1 {total} {schedule} {objective}", data=flags.data,
            steps=flags.train_steps, diffusion_steps=total, schedule=schedule,
            model_channels=flags.width, log_every=flags.train_steps, **settings,
        )  # fmt: skip
        value, half = distance(model, flags.data, flags, steps=flags.sample_steps)
        found = bits(model, flags)
        rows.append({
            "T": total, "schedule": schedule, "objective": objective, "bits/dim": found.bpd,
            "bits/dim +-": (found.ci95[1] - found.ci95[0]) / 2,
            f"FD-{flags.extractor}": value, "FD +-": half,
        })  # fmt: skip
    title = f"Tables 1, 2: schedule x objective, {flags.train_steps} steps of training"
    write(flags, "table1_2_ablation", rows, table_figure(rows, title))


if __name__ == "__main__":
    main()

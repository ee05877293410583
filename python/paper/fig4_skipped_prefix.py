"""Figure 4: quality when the first part of the reverse chain is skipped, linear against cosine.

The chain begins at step (1 - fraction) T from pure noise, as if that step were the last. A linear
schedule loses nothing by it, as its last steps hold noise alone. The networks are those of Tables 1
and 2, trained here unless they were, or the checkpoints --cosine and --linear.
"""

from __future__ import annotations

from ablation import FLAGS, ablation
from common import arguments, axes, distance, progress, write

import iddpm_ext


def main() -> None:
    """Samples from shortened chains and draws their distances."""
    flags = arguments(
        __doc__, checkpoint=False, cosine=("", ""), linear=("", ""), samples=(500, 50),
        references=(5000, 100), steps=(50, 10),
        fractions=([0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3], [0.0, 0.1, 0.3]),
        extractor=("efficientnet-lite0-112", "pixels"), **FLAGS,
    )  # fmt: skip
    figure, (panel,) = axes("Figure 4: skipping the first part of the reverse chain")
    rows = []
    for schedule, name in (("cosine", flags.cosine), ("linear", flags.linear)):
        model = iddpm_ext.load(name) if name else ablation(flags, schedule)[0]
        assert model.diffusion is not None
        total = model.diffusion.num_timesteps
        for fraction in progress(flags.fractions, schedule):
            last = round((1 - fraction) * (total - 1))
            kept = max(2, round((1 - fraction) * flags.steps))
            steps = sorted({round(i * last / (kept - 1)) for i in range(kept)})
            value, half = distance(model, flags.data, flags, steps=steps)
            rows.append({"schedule": schedule, "skipped": fraction, "fd": value, "ci95_half": half})
        mine = [row for row in rows if row["schedule"] == schedule]
        panel.errorbar(
            [row["skipped"] for row in mine], [row["fd"] for row in mine],
            [row["ci95_half"] for row in mine], marker="o", capsize=3, label=schedule,
        )  # fmt: skip
    panel.set(xlabel="skipped share of the chain", ylabel=f"FD-{flags.extractor}")
    panel.legend()
    write(flags, "fig4_skipped_prefix", rows, figure, samples=flags.samples)


if __name__ == "__main__":
    main()

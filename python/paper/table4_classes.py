"""Table 4: class-conditional samples: distance, precision and recall, by guidance scale.

The paper's table has no guidance; a scale of 1 is that. Larger ones trade recall for precision.
"""

from __future__ import annotations

import iddpm_ext

from common import arguments, progress, table_figure, write  # isort: skip


def main() -> None:
    """Samples every class evenly at each scale."""
    flags = arguments(
        __doc__, samples=(1000, 30), references=(5000, 60), steps=(50, 5),
        scales=([1.0, 1.5, 2.0, 3.0], [1.0]), extractor=("efficientnet-lite0-112", "pixels"),
    )  # fmt: skip
    model = iddpm_ext.load(flags.checkpoint)
    rows = []
    for scale in progress(flags.scales, "scales"):
        found = iddpm_ext.evaluate(
            model, flags.data, extractor=flags.extractor, n=flags.samples, steps=flags.steps,
            reference_n=flags.references, guidance_scale=scale, dtype=flags.precision,
            resamples=10, batch_size=50,
        )  # fmt: skip
        row: dict[str, float | str] = {"guidance": scale}
        for name, score in found.scores.items():
            row[name.removesuffix(f"-{found.extractor}")] = score.value
        rows.append(row)
    title = f"Table 4: {flags.samples} class-conditional samples, features of {flags.extractor}"
    write(flags, "table4_classes", rows, table_figure(rows, title), samples=flags.samples)


if __name__ == "__main__":
    main()

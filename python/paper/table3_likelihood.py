"""Table 3: bits/dim of a checkpoint here, under the published ones.

The published rows are of ImageNet 64x64 and CIFAR-10; bits/dim of other data cannot be compared
with them, and stand apart.
"""

from __future__ import annotations

import iddpm_ext

from common import arguments, bits, table_figure, write  # isort: skip

# As published (Nichol & Dhariwal 2021, table 3): ImageNet 64x64, CIFAR-10.
PUBLISHED = [
    ("Glow", "-", "3.35"),
    ("Flow++", "-", "3.08"),
    ("PixelCNN", "-", "3.14"),
    ("SPN", "3.52", "-"),
    ("NVAE", "-", "2.91"),
    ("Very Deep VAE", "3.52", "2.87"),
    ("PixelSNAIL", "3.52", "2.85"),
    ("Image Transformer", "3.48", "2.90"),
    ("Sparse Transformer", "3.44", "2.80"),
    ("Routing Transformer", "3.43", "-"),
    ("DDPM", "3.77", "3.70"),
    ("DDPM (continuous flow)", "-", "2.99"),
    ("Improved DDPM", "3.53", "2.94"),
]


def main() -> None:
    """Measures, and writes one table."""
    flags = arguments(__doc__, images=(128, 8), budget=(250, 40))
    rows = [
        {
            "model": name,
            "ImageNet 64": imagenet,
            "CIFAR-10": cifar,
            "here": "",
            "source": "published",
        }
        for name, imagenet, cifar in PUBLISHED
    ]
    found = bits(iddpm_ext.load(flags.checkpoint), flags)
    low, high = found.population_ci95
    rows.append({
        "model": flags.checkpoint, "ImageNet 64": "-", "CIFAR-10": "-",
        "here": f"{found.bpd:.3f} ({low:.3f} to {high:.3f})", "source": f"{flags.images} test images",
    })  # fmt: skip
    figure = table_figure(rows, "Table 3: bits/dim")
    write(flags, "table3_likelihood", rows, figure, bpd=found.bpd, ci95=list(found.ci95))


if __name__ == "__main__":
    main()

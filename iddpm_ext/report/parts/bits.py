"""The part on likelihood: bits per dimension, and the term of every step."""

from __future__ import annotations

import torch

from iddpm_ext.data import ImageData
from iddpm_ext.likelihood import nll
from iddpm_ext.report.charts import Line, chart
from iddpm_ext.report.elements import Body, Chart, Command, Missing, Text
from iddpm_ext.report.subject import Subject


def likelihood(subject: Subject) -> Body:
    """Bits per dimension and the term of every step."""
    if subject.model.diffusion is None:
        raise Missing("The checkpoint holds no diffusion process, so there is no bound.")
    split, data = held_out(subject)
    effort = subject.effort
    limit = min(effort.likelihood_images, len(data))
    result = nll(
        subject.model, data, budget=effort.likelihood_budget, limit=limit, seed=subject.seed,
        split=split,
    )  # fmt: skip
    steps = result.per_step
    seen = steps.count > 0
    t = (steps.timesteps[seen] + 1).tolist()
    bpd, error = steps.bpd[seen], steps.bpd_error[seen].nan_to_num(0)
    svg = chart(
        [
            Line(
                "L_t", t, bpd.tolist(), (bpd - error).clamp(min=1e-12).tolist(),
                (bpd + error).tolist(), marked=False,
            )
        ],
        title="Where the bits are", x_label="diffusion step t", y_label="L_t in bits/dim",
        x_log=True, y_log=True,
    )  # fmt: skip
    low, high = result.population_ci95
    of = "test" if split == "test" else "training"
    words = (
        f"{result.bpd:.3f} bits/dim over {limit} {of} images, 95 % {result.ci95[0]:.3f} to "
        f"{result.ci95[1]:.3f} for these images, {low:.3f} to {high:.3f} for all such images. Fewer bits "
        "are better; 8 is what the pixels take as they are."
    )
    remark = (
        []
        if split == "test"
        else [Text("The data have no test images: these may have been trained on.")]
    )
    first = float(bpd[0]) if len(bpd) else float("nan")
    alt = (
        f"Line chart, both axes logarithmic: the term L_t falls from {first:.2g} bits/dim at the first "
        f"step to {float(bpd[-1]):.2g} at the last of {len(steps.bpd)}."
    )
    command = (
        f"iddpm nll {subject.word} {subject.data_flags()} --split {split} -n {limit} --budget "
        f"{effort.likelihood_budget} --seed {subject.seed} --plot"
    )
    facts = {"bits/dim": f"{result.bpd:.3f} ({low:.3f} to {high:.3f})"}
    return Body((Text(words), *remark, Chart(svg, alt), Command(command)), facts)


def held_out(subject: Subject) -> tuple[str, ImageData]:
    """The test images, or the training images if there are no others.

    A folder without splits is read whole for either split, so that both have the same images.
    """
    train = subject.open("train")
    try:
        test = subject.open("test")
    except ValueError:
        return "train", train
    first = torch.arange(min(8, len(test)), dtype=torch.int64, device="cpu")
    if len(test) == len(train) and torch.equal(test.images(first)[0], train.images(first)[0]):
        return "train", train
    return "test", test

"""Bits per dimension of images, with confidence intervals, and the terms of every step.

Example: iddpm nll fashion-mnist --data DIR -n 100 --budget 64
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from iddpm_ext.cli._common import (
    MaybeCount,
    pick_device,
    pick_dtype,
    quiet,
    read_steps,
    result,
    starting,
)


def run(
    checkpoint: Annotated[str, tyro.conf.Positional] = "fashion-mnist",
    *,
    data: Path,
    classes: str = "auto",
    value_range: tuple[float, ...] | None = None,
    alpha: Literal["refuse", "drop", "black", "white"] = "refuse",
    split: Literal["train", "test", "all"] = "test",
    n: MaybeCount = None,
    budget: float | None = None,
    full: bool = False,
    steps: str | None = None,
    seed: int = 0,
    clip: bool = True,
    exact: bool = False,
    out: Path = Path("nll"),
    plot: bool = False,
    batch_size: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    engine: bool = True,
    backend: str = "auto",
    method: Literal["bound", "full", "information", "ode"] = "bound",
    tolerance: float = 1e-4,
    variance: Literal["fixed_small", "fixed_large", "analytic", "optimal"] | None = None,
    device: str = "auto",
) -> None:
    """Computes the bound and writes nll.json, per_step.csv and per_image.csv.

    After an interruption, the same call continues. Under torchrun, the processes divide the
    images among them; the first one writes.

    Args:
        checkpoint: a bundled name, a file, a run's folder, or hf://org/name.
        data: a folder, zip or array of images, as for training; classes are taken by their names.
        classes: source of the classes: auto, folders, names, file (dataset.json), ids, none or a column.
        value_range: the values of black and white, 0,1 or 0,4095 or =-1,1, if the type does not imply them.
        alpha: handling of transparent pixels: refuse; drop (keep their colours); black or white.
        split: train or test, for data that has both.
        n: use only the first n images.
        budget: network evaluations per image, at least 1; by default 64 for the bound, 1000 points for
            information.
        full: evaluate every step of every image, whatever the budget.
        steps: a shorter chain: 50; ddim50; 10,15,20 for sections; dense-50 with every early step too;
            optimal-50 or analytic-50 for a schedule of the checkpoint.
        seed: of the noise and the drawn steps.
        clip: clamp every predicted image to [-1, 1].
        exact: compute the decoder's likelihood without the original's approximation.
        out: a folder.
        plot: draw the terms against the step into plot.png (needs matplotlib).
        batch_size: maximum number of evaluations at once.
        dtype: precision of the network.
        engine: use an engine where one supports the network.
        backend: of the ops: auto, reference, cpu, cuda or triton.
        method: the bound, its full sum, the information-theoretic estimator, or the probability flow (ode).
        tolerance: of ode.
        variance: analytic, by the moments that `iddpm steps` stores; optimal, by the heads that
            `iddpm covariance` trains; fixed_small or fixed_large; by default the network's own.
        device: auto, cpu, cuda or cuda:1.
    """
    starting("nll", f"loading {checkpoint}")

    import iddpm_ext
    from iddpm_ext.data import open_data
    from iddpm_ext.likelihood.request import make_likelihood_request
    from iddpm_ext.likelihood.run import compute
    from iddpm_ext.sampling.distributed import Processes
    from iddpm_ext.text import duration

    processes = Processes.of_torchrun()
    if budget is None and method == "bound" and not full:
        budget = 64
    if plot:
        from iddpm_ext.likelihood.plot import require_matplotlib

        require_matplotlib()
    model = iddpm_ext.load(checkpoint).to(pick_device(device))
    images = open_data(
        data, split=split, image_size=model.config.image_size, bad_images="stop", classes=classes,
        value_range=value_range, alpha=alpha,
    )  # fmt: skip
    request = make_likelihood_request(
        model, images, labels=None, low_res=None, budget=None if full else budget,
        steps=read_steps(steps), clip=clip, exact=exact, batch_size=batch_size, seed=seed,
        split=split, limit=n, diffusion=None,
        dtype=pick_dtype(dtype), engine=engine, backend=backend,
        progress=processes.rank == 0 and not quiet(), variance=variance, method=method, tolerance=tolerance,
    )  # fmt: skip
    began = time.perf_counter()
    with processes:
        found = compute(request, out / "state", processes)
    seconds = time.perf_counter() - began
    if processes.rank > 0:
        return
    written = found.write(out)
    if plot:
        from iddpm_ext.likelihood.plot import plot_steps

        written.append(plot_steps(found.per_step, out / "plot.png"))
    files = [str(path) for path in written]
    result(
        f"{checkpoint}: {found}\n"
        f"L_T {found.prior_bpd:.6f} bits/dim; {request.spec.diffusion}; "
        f"{found.facts['network']}, {request.spec.device}, {duration(seconds)}\n" + ", ".join(files),
        {
            "checkpoint": checkpoint, "bpd": found.bpd, "ci95": found.ci95,
            "population_ci95": found.population_ci95, "prior_bpd": found.prior_bpd,
            "evaluations": found.evaluations, "seconds": round(seconds, 3), **found.facts,
            "files": files,
        },
    )  # fmt: skip

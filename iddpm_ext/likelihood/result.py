"""The result of `nll`, and its files."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iddpm_ext.files import write_whole
from iddpm_ext.likelihood.design import Design
from iddpm_ext.likelihood.estimate import estimate
from iddpm_ext.likelihood.evaluate import MEASURED
from iddpm_ext.likelihood.request import LikelihoodRequest


@dataclass(frozen=True, eq=False)
class PerStep:
    """Means over the evaluations of each step, float64 [T]; NaN for steps without any.

    bpd: the term L_t in bits/dim; bpd_error: its standard error over images and noise (NaN below two
    evaluations). x_0_mse, eps_mse: mean squared errors. v_outside: share of v outside [-1, 1].
    count: int64 [T], evaluations. timesteps: int64 [T], the step's index in the training chain.
    """

    timesteps: Tensor
    count: Tensor
    bpd: Tensor
    bpd_error: Tensor
    x_0_mse: Tensor
    eps_mse: Tensor
    v_outside: Tensor

    def to_csv(self) -> str:
        """A header and one line per step."""
        names = ("timesteps", "count", "bpd", "bpd_error", "x_0_mse", "eps_mse", "v_outside")
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("step", "timestep", *names[1:]))
        columns = [getattr(self, name).tolist() for name in names]
        for step, row in enumerate(zip(*columns, strict=True)):
            writer.writerow([step, *("" if _is_nan(value) else value for value in row)])
        return text.getvalue()


@dataclass(frozen=True, eq=False)
class Likelihood:
    """Bits per dimension of images, by the method that `facts` names.

    bpd: the mean over the images. ci95: (low, high) over steps and noise, for these images.
    population_ci95: (low, high) for the distribution that the images were drawn from; NaN for one image.
    prior_bpd: the mean of L_T, which is part of bpd. per_image_bpd: float64 [N]. per_step: see `PerStep`;
    `per_step_bpd` and `per_step_count` [T] are its columns. evaluations: of the network, including the
    pilot's. Method "ode" has no steps, and its prior_bpd is NaN. facts: how it was computed, JSON-ready.
    """

    bpd: float
    ci95: tuple[float, float]
    population_ci95: tuple[float, float]
    prior_bpd: float
    per_image_bpd: Tensor
    per_step: PerStep
    evaluations: int
    facts: dict[str, Any]

    @property
    def per_step_bpd(self) -> Tensor:
        """L_t in bits/dim, float64 [T], NaN where never drawn."""
        return self.per_step.bpd

    @property
    def per_step_count(self) -> Tensor:
        """Evaluations of each step, int64 [T]."""
        return self.per_step.count

    def to_json(self) -> str:
        """Everything, as JSON text; NaN is null."""
        fields = {
            "bpd": self.bpd,
            "ci95": list(self.ci95),
            "population_ci95": list(self.population_ci95),
            "prior_bpd": self.prior_bpd,
            "evaluations": self.evaluations,
            **self.facts,
            "per_image_bpd": self.per_image_bpd.tolist(),
            "per_step": {name: value.tolist() for name, value in vars(self.per_step).items()},
        }
        return json.dumps(_without_nan(fields), allow_nan=False)

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Writes nll.json, per_step.csv and per_image.csv into `folder`, each whole or not at all."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        images = [f"{i},{value!r}\n" for i, value in enumerate(self.per_image_bpd.tolist())]
        texts = {
            "nll.json": self.to_json() + "\n",
            "per_step.csv": self.per_step.to_csv(),
            "per_image.csv": "image,bpd\n" + "".join(images),
        }
        for name, text in texts.items():
            write_whole(target / name, text.encode())
        return [target / name for name in texts]

    def __str__(self) -> str:
        return (
            f"{self.bpd:.4f} bits/dim, 95 % {_range(self.ci95)} over steps and noise, "
            f"{_range(self.population_ci95)} over images ({len(self.per_image_bpd)} images, "
            f"{self.evaluations / len(self.per_image_bpd):.1f} evaluations per image)"
        )


def likelihood_of(
    request: LikelihoodRequest,
    design: Design,
    terms: Tensor,
    per_step: PerStep,
    evaluations: int,
    facts: dict[str, Any],
) -> Likelihood:
    """The likelihood from evaluated terms [N, M] of a design, with the prior's term."""
    chain = request.spec.diffusion
    prior = torch.cat([chain.prior_bpd(part) for part in request.x_0.split(256)])
    mean, ci95, population, per_image = estimate(design, terms, prior)
    return Likelihood(
        bpd=mean,
        ci95=ci95,
        population_ci95=population,
        prior_bpd=float(prior.double().mean()),
        per_image_bpd=per_image,
        per_step=per_step,
        evaluations=evaluations,
        facts=facts,
    )


def facts_of(request: LikelihoodRequest, network: str, **more: Any) -> dict[str, Any]:
    """How a likelihood was computed, JSON-ready."""
    return {
        "images": len(request.x_0),
        "budget": request.budget,
        "seed": request.seed,
        "clip": request.clip,
        "exact": request.exact,
        "diffusion": repr(request.spec.diffusion),
        "network": network,
        "device": str(request.spec.device),
        **more,
    }


def summarize_steps(design: Design, measured: Tensor, timesteps: Tensor) -> PerStep:
    """The means for each step of measurements [N, M, 4] of a design with timesteps.shape[0] steps."""
    t, total = design.t.flatten(), len(timesteps)
    values = measured.double().flatten(0, 1)
    count = torch.bincount(t, minlength=total)
    sums = torch.zeros(total, len(MEASURED), dtype=torch.float64, device="cpu").index_add_(
        0, t, values
    )
    means = sums / count[:, None]
    residual = (values[:, 0] - means[t, 0]).square()
    squares = torch.zeros(total, dtype=torch.float64, device="cpu").index_add_(0, t, residual)
    error = (squares / (count - 1).clamp(min=0) / count).sqrt()
    bpd, x_0_mse, eps_mse, v_outside = means.unbind(1)
    return PerStep(timesteps, count, bpd, error, x_0_mse, eps_mse, v_outside)


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if _is_nan(value) else value


def _range(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.4f} .. {interval[1]:.4f}"

"""Evaluates the network on noised images and measures the terms of the bound and errors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from iddpm_ext import ops
from iddpm_ext.engines.base import undisturbed
from iddpm_ext.engines.choosing import Network, choose_network
from iddpm_ext.engines.spec import require_within_float16
from iddpm_ext.likelihood.request import LikelihoodRequest
from iddpm_ext.ops.columns import Column
from iddpm_ext.random import STREAM_FORWARD, NoiseKey

#: What is measured: L_t in bits/dim; mean squared errors of x_0 and eps; share of v outside [-1, 1].
MEASURED = ("bpd", "x_0_mse", "eps_mse", "v_outside")


class Rows(NamedTuple):
    """Evaluations to make: image, step of the chain and replicate of the noise, each int64 [n]."""

    image: Tensor
    t: Tensor
    draw: Tensor


class Outputs(NamedTuple):
    """x_0 and x_t [n, C, H, W], the network's output of them, and t int64 [n], on the device."""

    x_0: Tensor
    x_t: Tensor
    model_output: Tensor
    t: Tensor


class Evaluator:
    """Evaluates rows of a request's images.

    batch_size: rows per call at most. The weights are the model's present ones.
    """

    def __init__(self, request: LikelihoodRequest, batch_size: int):
        self.request, spec = request, request.spec
        self.network: Network = choose_network(spec, batch_size)
        self._table = spec.diffusion.table(spec.device)

    def outputs(self, rows: Rows) -> Outputs:
        """The network's outputs for noised images."""
        with undisturbed(self.request.spec.device.type):
            return self._outputs(rows)

    def _outputs(self, rows: Rows) -> Outputs:
        request, spec = self.request, self.request.spec
        chain, device = spec.diffusion, spec.device
        x_0 = request.x_0[rows.image].to(device)
        t = rows.t.to(device)
        # A `NoiseKey` has one replicate; a batch has few different ones.
        x_t = torch.empty_like(x_0)
        for draw in rows.draw.unique().tolist():
            which = (rows.draw == draw).nonzero()[:, 0]
            key = NoiseKey(
                request.seed, STREAM_FORWARD, rows.image[which].to(device),
                chain.timesteps[rows.t[which]].to(device), draw,
            )  # fmt: skip
            at = which.to(device)
            x_t[at] = ops.q_sample(x_0[at], t[at], self._table, key, backend=spec.backend)
        return Outputs(x_0, x_t, self.output(x_t, t, rows.image), t)

    def output(self, x_t: Tensor, t: Tensor, images: Tensor) -> Tensor:
        """The output that the chain reads for noised images [n, C, H, W] at steps t int64 [n] of it.

        images: int64 [n], which of the request's they are.
        """
        timesteps = self.request.spec.diffusion.model_timesteps(t)
        out = self.at(x_t, timesteps, images)
        finish = self.request.spec.finish
        return out if finish is None else finish(out, t)

    def at(self, x_t: Tensor, timesteps: Tensor, images: Tensor) -> Tensor:
        """The network's own output at timesteps as it is told them, float32 [n]."""
        spec = self.request.spec
        at = images.to(spec.device)
        labels = None if spec.labels is None else spec.labels[at]
        low_res = None if spec.low_res is None else spec.low_res[at]
        out = self.network.at(x_t, timesteps, labels, low_res)
        require_within_float16(spec, out)  # what is measured of it may be finite all the same
        return out

    def measure(self, rows: Rows) -> Tensor:
        """The columns of `MEASURED`, float32 [n, 4] on the CPU; NaN for v unless the variance is a range."""
        with undisturbed(self.request.spec.device.type):
            return self._measure(rows)

    def _measure(self, rows: Rows) -> Tensor:
        request, spec = self.request, self.request.spec
        x_0, x_t, out, t = self._outputs(rows)
        chain, channels = spec.diffusion, x_0.shape[1]
        bpd = ops.vlb_terms(
            out,
            x_0,
            x_t,
            t,
            self._table,
            clip=request.clip,
            exact=request.exact,
            backend=spec.backend,
        )
        predicted = chain.p_mean_variance(out, x_t, t, clip=request.clip).x_0
        x_0_mse = (predicted - x_0).square().flatten(1).mean(1)
        # eps is affine in x_0 for a given x_t.
        row = self._table[t]
        ratio = row[:, Column.SQRT_ALPHA_BAR] / row[:, Column.SQRT_ONE_MINUS_ALPHA_BAR]
        outside = torch.full_like(bpd, torch.nan)
        if chain.variance == "learned_range":
            outside = (out[:, channels:].abs() > 1).float().flatten(1).mean(1)
        measured = torch.stack([bpd, x_0_mse, ratio.square() * x_0_mse, outside], dim=1)
        return measured.float().cpu()


def progress_bar(total: int, done: int, shown: bool) -> Any:
    """A bar of evaluations, where stderr is a terminal."""
    from tqdm import tqdm

    # tqdm takes None for: disabled unless stderr is a terminal.
    disable = None if shown else True
    return tqdm(
        total=total, initial=done, desc="likelihood", unit="evaluation", leave=False,
        disable=disable,
    )  # fmt: skip

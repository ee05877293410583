"""One step of a sampler: the fused op, then classifier guidance and the terms of a multistep solver."""

from __future__ import annotations

import torch
from torch import Tensor

from iddpm_ext.diffusion.solvers import SolverWalk
from iddpm_ext.ops import reverse_step
from iddpm_ext.ops.columns import Column
from iddpm_ext.random import NoiseKey
from iddpm_ext.sampling.classifier_guidance import condition_mean, condition_score
from iddpm_ext.sampling.predict import Predictor
from iddpm_ext.sampling.request import Request


class SamplerStep:
    """x_{t-1} and x_0 from x_t and the network's output, for one run of the chain.

    Every sampler calls `reverse_step` with its own table; solvers add terms to DDIM's result.
    """

    def __init__(self, request: Request, predict: Predictor, dtype: torch.dtype) -> None:
        self._request, self._predict = request, predict
        self._own_table = request.table(request.spec.diffusion, dtype)
        self._table = self._own_table
        if request.denoised_fn is not None:
            # The replaced x_0 is passed on as the output of a network that predicts x_0.
            self._table = request.table(request.spec.diffusion.predicting("x_0"), dtype)
        # beta~_0 is 0, but the table's logarithm is clipped: as in the original, no guidance at that step.
        fixed = request.spec.diffusion.variance == "fixed_small" and request.variance != "analytic"
        self._last_is_fixed = request.sampler == "ddpm" and fixed
        solver = request.solver
        self._solver = None if solver is None else SolverWalk(request.spec.diffusion, solver)

    def __call__(
        self, x_t: Tensor, model_output: Tensor, i: int, noise: NoiseKey
    ) -> tuple[Tensor, Tensor]:
        """x_{t-1} and x_0, each [N, C, H, W], of step i of the chain; noise if the sampler adds any."""
        request = self._request
        if request.denoised_fn is not None:
            model_output = self._with_denoised(x_t, model_output, i)
        t = torch.full((len(x_t),), i, dtype=torch.int64, device=x_t.device)
        x_prev, x_0 = reverse_step(
            x_t,
            model_output,
            t,
            self._table,
            noise if request.noisy else None,
            clip=request.clip,
            backend=request.spec.backend,
        )
        if request.cond_fn is not None and not (i == 0 and self._last_is_fixed):
            gradient = self._gradient(x_t, i)
            if request.sampler == "ddpm":
                x_prev = condition_mean(x_prev, gradient, model_output, self._table[i])
            else:
                x_prev, x_0 = condition_score(x_prev, x_0, gradient, self._table[i])
        if self._solver is not None:
            x_prev = self._solver(i, x_t, x_prev, x_0)
        return x_prev, x_0

    def _with_denoised(self, x_t: Tensor, model_output: Tensor, i: int) -> Tensor:
        """The output with the predicted x_0, not yet clamped, replaced by `denoised_fn` of it."""
        denoised_fn = self._request.denoised_fn
        assert denoised_fn is not None
        channels, row = x_t.shape[1], self._own_table[i]
        out = model_output.to(x_t.dtype)
        x_0 = row[Column.X0_FROM_XT] * x_t + row[Column.X0_FROM_OUT] * out[:, :channels]
        changed = denoised_fn(x_0)
        if not isinstance(changed, Tensor) or changed.shape != x_t.shape:
            got = getattr(changed, "shape", type(changed).__name__)
            raise ValueError(
                f"{self._request.spec.who}: denoised_fn must return {list(x_t.shape)}, got {got}"
            )
        return torch.cat([changed.to(x_t.dtype), out[:, channels:]], dim=1)

    def _gradient(self, x_t: Tensor, i: int) -> Tensor:
        cond_fn = self._request.cond_fn
        assert cond_fn is not None
        named = {"y": self._predict.labels, "low_res": self._predict.low_res}
        kwargs = {name: value for name, value in named.items() if value is not None}
        gradient = cond_fn(x_t, self._predict.timesteps[i].expand(len(x_t)), **kwargs)
        if not isinstance(gradient, Tensor) or gradient.shape != x_t.shape:
            got = getattr(gradient, "shape", type(gradient).__name__)
            raise ValueError(
                f"{self._request.spec.who}: cond_fn must return {list(x_t.shape)}, got {got}"
            )
        return gradient.to(x_t.dtype)

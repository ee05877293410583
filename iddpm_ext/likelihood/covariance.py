"""A head that predicts the variance of every pixel, trained beside a frozen network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from iddpm_ext.diffusion import Diffusion
from iddpm_ext.diffusion.covariance import Covariance, mixed, shares_of
from iddpm_ext.diffusion.moments import spread_steps
from iddpm_ext.likelihood.evaluate import Evaluator, Rows, progress_bar
from iddpm_ext.likelihood.images import Data
from iddpm_ext.likelihood.request import LikelihoodRequest, make_likelihood_request
from iddpm_ext.networks.head import last_convolution, with_last_convolution
from iddpm_ext.ops.columns import Column
from iddpm_ext.random import STREAM_CHOICE, NoiseKey, integers
from iddpm_ext.sampling.variance import bare_network
from iddpm_ext.scalars import plain

_TIMESTEPS = 128
_IMAGES_FOR_MEANS = 32
_BATCH = 16
_RATE = 5e-3
_HEADS = 8
_LEAST_MEAN = 1e-12


def find_covariance(
    model: Callable[..., Tensor],
    data: Data,
    *,
    labels: Sequence[int] | Tensor | None = None,
    limit: int | None = 4096,
    updates: int = 2000,
    seed: int = 0,
    split: str = "train",
    diffusion: Diffusion | None = None,
    engine: bool = True,
    backend: str = "auto",
    progress: bool = True,
) -> Covariance:
    """Trains a head that predicts E[(x_0 - x_0(x_t))^2 | x_t] of every element, the network left as it is.

    The head is eight 3x3 convolutions of the features that the network's last one reads, for eight noise
    levels, interpolated between them. With r the squared error over its mean at the step, it minimises
    E r exp(-h) + h, whose minimum is exp(h) = E[r | x_t]. Costs 16 evaluations per update, and 4096 for the
    means.

    Args:
        model: a `UNet`.
        data, labels, seed, split, diffusion, engine, backend, progress: as of `nll`; images of training.
        limit: a random choice of so many images (of a tensor: the first); None takes all.
        updates: of Adam.

    Returns:
        `Covariance`; `extra["covariance"] = covariance.to_extra(weights_fingerprint(model))` makes
        `variance="optimal"` work.

    Raises: as `nll`; ValueError for a network that is more than a `UNet`.

    Source: Bao et al. 2022, "Estimating the Optimal Covariance with Imperfect Mean", section 4 (NPR-DPM).
    """
    updates = plain(updates)
    if isinstance(updates, bool) or not isinstance(updates, int) or updates < 1:
        raise ValueError(f"find_covariance: updates must be an int above 0, got {updates!r}")
    request = heads_request(
        model, data, labels=labels, limit=limit, seed=seed, split=split, diffusion=diffusion,
        engine=engine, backend=backend, progress=progress,
    )  # fmt: skip
    return train_heads(SquaredErrors(request), updates, progress)


def heads_request(
    model: Callable[..., Tensor], data: Data, *, limit: int | None, seed: int, **options: Any
) -> LikelihoodRequest:
    """The images, network and chain of `find_covariance`, checked; options: others of `nll`."""
    return make_likelihood_request(
        model, data, limit=limit, seed=seed, shuffle=True, who="find_covariance", batch_size=_BATCH,
        budget=None, steps=None, clip=True, exact=False, dtype=None,
        **{"labels": None, "low_res": None, "split": "train", "diffusion": None, "engine": True,
           "backend": "auto", "progress": True, **options},
    )  # fmt: skip


def train_heads(targets: SquaredErrors, updates: int, progress: bool) -> Covariance:
    """Heads whose exp(h) is the conditional mean of a target over its mean at the step, and these means."""
    request = targets.request
    chain, count, seed = request.spec.diffusion, len(request.x_0), request.seed
    steps = torch.tensor(spread_steps(chain, _TIMESTEPS), dtype=torch.int64, device="cpu")
    first = torch.arange(min(count, _IMAGES_FOR_MEANS), dtype=torch.int64, device="cpu")
    with progress_bar(len(steps) * len(first) + updates * _BATCH, 0, progress) as bar:
        means = []
        for step in steps.tolist():
            found = []
            for image in first.split(_BATCH):
                t = torch.full_like(image, step)
                found.append(targets(Rows(image, t, torch.zeros_like(t)))[0])
            means.append(float(torch.cat(found).double().mean()))
            bar.update(len(first))
        mean, known = targets.scale(torch.tensor(means, dtype=torch.float64, device="cpu"))
        places = torch.linspace(
            0, len(steps) - 1, min(_HEADS, len(steps)), dtype=torch.float64, device="cpu"
        )
        knots = steps[places.round().long()]
        shares = shares_of(chain, chain.timesteps[knots]).float()
        head = targets.head(len(knots))
        optimizer = torch.optim.Adam(head.parameters(), _RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
        for update in range(updates):
            image = _drawn(seed, 2 * update, count)
            place = _drawn(seed, 2 * update + 1, len(steps))
            rows = Rows(image, steps[place], torch.full_like(image, 1 + update))
            target, features = targets(rows)
            ratio = target / mean[place].float().to(target.device)[:, None, None, None]
            ratio[~known[place]] = 1
            share = shares[chain.timesteps[steps[place]]].to(target.device)
            with torch.inference_mode(False), torch.enable_grad():
                loss = targets.loss(mixed(head(features), share), ratio)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
            bar.update(_BATCH)
    weight, bias = (value.detach().cpu() for value in head.parameters())
    return Covariance(weight, bias, chain.timesteps[knots], chain.timesteps[steps], mean)


class SquaredErrors:
    """Squared errors of x_0, and the features that they are told from, of rows of a request's images."""

    def __init__(self, request: LikelihoodRequest) -> None:
        model = bare_network(request.spec)
        self.request = request
        self._channels, self._clip = model.config.in_channels, request.clip
        weight, bias = last_convolution(model, self._channels)
        self._width, self._device = weight.shape[1], weight.device
        # Convolutions whose middle is 1 pass the features on, so that engines return them too.
        passing = weight.new_zeros(self._width, self._width, 3, 3)
        passing[:, :, 1, 1].fill_diagonal_(1)
        network = with_last_convolution(
            model, torch.cat([weight, passing]), torch.cat([bias, bias.new_zeros(self._width)])
        )
        self._evaluator = Evaluator(
            replace(request, spec=replace(request.spec, model=network)), _BATCH
        )

    def head(self, count: int) -> nn.Conv2d:
        """As many untrained heads: every variance is the mean."""
        options: dict[str, Any] = {"device": self._device, "dtype": torch.float32}
        head = nn.Conv2d(self._width, count * self._channels, 3, padding=1, **options)
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
        return head

    def scale(self, means: Tensor) -> tuple[Tensor, Tensor]:
        """What targets are divided by, positive, and at which steps they say something; float64, bool [G]."""
        return means.clamp(min=_LEAST_MEAN), torch.ones_like(means, dtype=torch.bool)

    def loss(self, h: Tensor, ratio: Tensor) -> Tensor:
        """Least where exp(h) is the conditional mean of the ratio: that of a normal error."""
        return (ratio * torch.exp(-h) + h).mean()

    def __call__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(x_0 - x_0(x_t))^2 [n, C, H, W] and features [n, width, H, W]."""
        x_0, x_t, out, t = self._evaluator.outputs(rows)
        found = self._x_0(x_t, out, t)
        found = found.clamp(-1, 1) if self._clip else found
        return (found - x_0).square(), self._features(out)

    def _x_0(self, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
        """The network's x_0, not clamped."""
        row = self.request.spec.diffusion.table(t.device)[t][:, :, None, None, None]
        model_output = out[:, : self._channels]
        return row[:, Column.X0_FROM_XT] * x_t + row[:, Column.X0_FROM_OUT] * model_output

    def _features(self, out: Tensor) -> Tensor:
        return out[:, self._channels :].float()


def _drawn(seed: int, draw: int, most: int) -> Tensor:
    """Integers below `most`, int64 [_BATCH]."""
    rows = torch.arange(_BATCH, dtype=torch.int64, device="cpu")
    return integers(NoiseKey(seed, STREAM_CHOICE, rows, 0, draw), most, (_BATCH, 1))[:, 0]

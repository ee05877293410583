"""One optimiser step. Its randomness is a function of the seed and the images' positions alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm_ext.data import Batch
from iddpm_ext.engines.cuda.graphs import Graphs
from iddpm_ext.networks.unet import UNet
from iddpm_ext.random import STREAM_CHOICE, STREAM_FORWARD, NoiseKey, uniform

from .captured import CapturedPass, Inputs, why_not_captured, why_not_fused
from .config import TrainConfig
from .fused import FusedTraining
from .parallel import Parallel, whole
from .rates import learning_rate
from .state import TrainState

_CHOICE_DRAW = 2
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_QUARTILES = 4

# Name in the log -> key in the losses of a step.
_LOSSES = {"loss": "loss", "mse": "mse", "vlb_bpd": "vlb"}
_CLASSIFIER_LOSSES = {"loss": "loss", "accuracy": "accuracy"}
_BY_T = ("loss", "accuracy")
_OF_GRADIENT = ("grad_norm", "noise_small", "noise_big")
# What a step returns, in this order (with other losses for a classifier); then, for each quartile of t, the
# sums of the quantities that are split by t and of the weights.
MEASURES = (*_LOSSES, *_OF_GRADIENT)


def positions_of(config: TrainConfig, images: int, rank: int, size: int) -> Iterator[list[int]]:
    """An endless iterator over the positions of the parts that process `rank` of `size` computes.

    images: the position to start from. Every process computes one contiguous share of a batch, in the order
    of the ranks.
    """
    share = config.batch_size // size
    part = share // config.accumulate
    while True:
        first = images + rank * share
        for start in range(first, first + share, part):
            yield list(range(start, start + part))
        images += config.batch_size


def train_step(
    config: TrainConfig, state: TrainState, batches: Iterator[Batch], parallel: Parallel
) -> tuple[Tensor, list[str]]:
    """One step over the next `accumulate` batches.

    Returns this process's measures (`MEASURES` and the loss by quartile of t) and messages on unreadable
    images. If a gradient is not finite, weights, moments and averages are unchanged. Nothing here makes the
    host wait.
    """
    optimizer = state.optimizer
    rate = learning_rate(
        state.step,
        peak=config.lr,
        warmup=config.lr_warmup,
        decay_to=config.steps if config.lr_decay else None,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    parts, complaints = [], []
    small = torch.zeros((), dtype=torch.float32, device=parallel.device)
    for number in range(config.accumulate):
        batch = next(batches)
        complaints += batch.complaints
        if config.dropout:
            # Dropout draws from the global generator; seeded by the position, its state need not be saved.
            torch.manual_seed((config.seed << 40) + int(batch.positions[0]))
        last = number == config.accumulate - 1
        inputs = _inputs(config, state, batch, parallel.device)
        with parallel.accumulating(state.module, last):
            losses = _forward_backward(config, state, inputs)
        parts.append({**losses, "weight": inputs.weight, "t": inputs.t})
        if number == 0 and config.noise_scale:
            # The gradient of a single part, 1 / accumulate of which is accumulated.
            small = (_gradient_norm(state) / state.scaler.get_scale() * config.accumulate) ** 2

    if state.fused is not None:  # it has no wrapper that averages gradients
        parallel.average([p.grad for p in state.model.parameters() if p.grad is not None])
    state.scaler.unscale_(optimizer)
    norm = _gradient_norm(state)
    bad = (~norm.isfinite()).float()
    state.scaler.step(
        optimizer,
        decays=state.decays(config),
        bad=bad,
        factor=_clip_factor(norm, config.grad_clip),
    )
    state.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    state.skipped = (state.skipped + 1) * bad
    whole_step = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    state.timestep_sampler.update(
        whole_step["t"], whole_step["loss"], capacity=config.batch_size // parallel.size
    )
    state.step += 1
    state.images += config.batch_size
    return _measures(config, state, whole_step, norm, small), complaints


def _forward_backward(config: TrainConfig, state: TrainState, inputs: Inputs) -> dict[str, Tensor]:
    """loss, mse and vlb of each image, [N]; adds the gradient of the mean to the parameters'."""
    device = inputs.x_0.device
    if state.fused is None and why_not_fused(config, device) is None:
        assert isinstance(state.model, UNet)
        state.fused = FusedTraining(state.model, _DTYPES[config.dtype])
        state.optimizer.copies = state.fused.copies
    if why_not_captured(config, device) is not None:
        return _pass(config, state, inputs)
    if state.captured is None:
        state.captured = CapturedPass(
            partial(_pass, config, state), state.model.parameters(), Graphs(device)
        )
    return state.captured(inputs)


def _pass(config: TrainConfig, state: TrainState, inputs: Inputs) -> dict[str, Tensor]:
    losses = _losses(config, state, inputs)
    mean = (losses["loss"] * inputs.weight).mean() / config.accumulate
    state.scaler.scale(mean).backward()
    if state.fused is not None:
        state.fused.collect()
    return {name: value.detach() for name, value in losses.items()}


def _inputs(config: TrainConfig, state: TrainState, batch: Batch, device: torch.device) -> Inputs:
    # Drawn on the host, where hundreds of operations on a few numbers need no kernel launches.
    key = NoiseKey(config.seed, STREAM_CHOICE, batch.positions, 0, _CHOICE_DRAW)
    choice = uniform(key, (len(batch.positions), 2))
    positions = _moved(batch.positions, device)
    at_hand = batch.positions if config.timestep_sampler == "uniform" else positions
    t, weight = (_moved(value, device) for value in state.timestep_sampler.sample(at_hand))
    x_0 = _moved(batch.images, device)
    if config.flip:
        mirrored = _moved(choice[:, 0] < 0.5, device)
        x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(3), x_0)
    if config.channels_last or device.type == "cuda":
        x_0 = x_0.contiguous(memory_format=torch.channels_last)
    labels = None
    if state.model.config.num_classes is not None:
        assert batch.labels is not None
        chosen = batch.labels
        if config.label_dropout:
            chosen = torch.where(choice[:, 1] < config.label_dropout, -1, chosen)
        labels = _moved(chosen, device)
    low_res = None if state.low_res is None else reduced(x_0, state.low_res)
    return Inputs(x_0, positions, t, weight, labels, low_res)


def reduced(images: Tensor, side: int) -> Tensor:
    """[N, C, H, W] resized so that the longer side is `side`, each pixel the mean of those that it covers."""
    longer = max(images.shape[2:])
    height, width = (pixels * side // longer for pixels in images.shape[2:])
    return F.interpolate(images, (height, width), mode="area")


def _moved(values: Tensor, device: torch.device) -> Tensor:
    # From pinned memory: a copy from pageable memory would wait for all work on the device.
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def _losses(config: TrainConfig, state: TrainState, inputs: Inputs) -> dict[str, Tensor]:
    diffusion = state.model.diffusion
    assert diffusion is not None

    def network(x_t: Tensor, timesteps: Tensor, **kwargs: Tensor) -> Tensor:
        if state.fused is not None:
            return state.fused(x_t, timesteps, **kwargs)
        dtype = _DTYPES[config.dtype]
        with torch.autocast(x_t.device.type, dtype, enabled=dtype != torch.float32):
            return state.module(x_t, timesteps, **kwargs)

    key = NoiseKey(config.seed, STREAM_FORWARD, inputs.positions, inputs.t)
    if config.classifier:
        assert inputs.labels is not None
        x_t = diffusion.q_sample(inputs.x_0, inputs.t, key)
        logits = network(x_t, diffusion.model_timesteps(inputs.t)).float()
        return {
            "loss": F.cross_entropy(logits, inputs.labels, reduction="none"),
            "accuracy": (logits.argmax(dim=1) == inputs.labels).float(),
        }
    named = {"y": inputs.labels, "low_res": inputs.low_res}
    return diffusion.training_losses(
        network,
        inputs.x_0,
        inputs.t,
        key,
        objective=config.objective,
        vlb_weight=config.vlb_weight,
        min_snr=config.min_snr,
        model_kwargs={name: value for name, value in named.items() if value is not None},
    )


def _gradient_norm(state: TrainState) -> Tensor:
    """The norm of the gradient as it is, including the loss scale if it has not been divided out."""
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    return whole(torch.nn.utils.get_total_norm(gradients))


def _clip_factor(norm: Tensor, largest: float | None) -> Tensor | None:
    """The factor for a gradient of this norm, as in `torch.nn.utils.clip_grad_norm_`."""
    return None if largest is None else (largest / (norm + 1e-6)).clamp(max=1.0)


def _measures(
    config: TrainConfig, state: TrainState, losses: dict[str, Tensor], norm: Tensor, small: Tensor
) -> Tensor:
    # Weighted, since the importance sampler draws steps of large losses more often.
    weight = losses["weight"].float()
    assert state.model.diffusion is not None
    quartile = losses["t"] * _QUARTILES // state.model.diffusion.num_timesteps
    zeros = torch.zeros(_QUARTILES, dtype=torch.float32, device=norm.device)
    logged = _logged(config)
    sums = [
        zeros.index_add(0, quartile, losses[logged[name]].float() * weight)
        for name in _BY_T
        if name in logged
    ]
    counts = zeros.index_add(0, quartile, weight)
    means = [(losses[name].float() * weight).mean() for name in logged.values()]
    return torch.cat([torch.stack([*means, norm, small, norm**2]), *sums, counts])


def _logged(config: TrainConfig) -> dict[str, str]:
    return _CLASSIFIER_LOSSES if config.classifier else _LOSSES


def summarise(config: TrainConfig, measures: Tensor, size: int) -> dict[str, float]:
    """The values to log, from the measures' mean over steps and processes.

    All are means over uniform t: the importance sampler's weights are applied.

    `loss_q0` .. `loss_q3` are the mean losses in the quarters of the chain, `accuracy_q0` .. a classifier's
    accuracy there, `grad_noise_scale` the simple noise scale tr(S) / |G|^2 in images (McCandlish et al. 2018,
    appendix A.1).
    """
    values = measures.tolist()
    logged = _logged(config)
    names = (*logged, *_OF_GRADIENT)
    named = dict(zip(names, values, strict=False))
    small, big = named.pop("noise_small"), named.pop("noise_big")
    begin, counts = len(names), values[-_QUARTILES:]
    for name in (name for name in _BY_T if name in logged):
        for i, (total, count) in enumerate(zip(values[begin:], counts, strict=False)):
            if count:
                named[f"{name}_q{i}"] = total / count
        begin += _QUARTILES
    if config.noise_scale:
        n_big, n_small = config.batch_size, config.batch_size // (config.accumulate * size)
        signal = (n_big * big - n_small * small) / (n_big - n_small)
        noise = (small - big) / (1 / n_small - 1 / n_big)
        named["grad_noise_scale"] = noise / signal if signal > 0 else float("inf")
    return named

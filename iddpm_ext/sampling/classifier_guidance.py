"""Classifier guidance: every step of the chain is shifted along the gradient of log p(y | x_t)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from iddpm_ext.diffusion import Diffusion
from iddpm_ext.networks.classifier import Classifier
from iddpm_ext.networks.unet import UNet
from iddpm_ext.ops.columns import Column
from iddpm_ext.scalars import plain

#: (x_t [N, C, H, W], timesteps float32 [N], y= and low_res= where the call has them) -> like x_t
CondFn = Callable[..., Tensor]


def classifier_gradient(classifier: Callable[..., Tensor], scale: float = 1.0) -> CondFn:
    """The `cond_fn` of a classifier: scale * gradient of log p(y | x_t) with respect to x_t.

    Args:
        classifier: (x_t [N, C, H, W], timesteps float32 [N]) -> logits [N, classes],
            differentiable in x_t. It should have been trained on noisy images.
        scale: above 1 sharpens p(y | x_t).

    Returns:
        what `sample` takes as `cond_fn`; an image labelled -1 is not guided.

    Source: Dhariwal & Nichol 2021, algorithms 1 and 2.
    """
    scale = plain(scale)

    def gradient(x_t: Tensor, timesteps: Tensor, *, y: Tensor, **_: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            # Copies, since autograd refuses tensors that were made in inference mode.
            x, timesteps, y = x_t.clone().requires_grad_(), timesteps.clone(), y.clone()
            log_p = classifier(x, timesteps).log_softmax(dim=-1)
            chosen = log_p.gather(1, y.clamp(min=0)[:, None])[:, 0]
            (grad,) = torch.autograd.grad((chosen * (y >= 0)).sum(), x)
        return scale * grad

    return gradient


def require_same_noise(classifier: Classifier, model: UNet) -> None:
    """Raises ValueError if the classifier was trained on other noise than the network.

    That is, if their schedules differ, or the timestep values that they get for the same step. A classifier
    or network that does not say how it was trained passes.
    """
    if classifier.diffusion is None or model.diffusion is None:
        return
    if _noise(classifier.diffusion) != _noise(model.diffusion):
        raise ValueError(
            f"classifier must be one for the network's noise, {model.diffusion!r}, got one for "
            f"{classifier.diffusion!r}, or only one of them takes rescaled timesteps"
        )


def _noise(diffusion: Diffusion) -> dict[str, object]:
    """The settings that determine x_t at a step of training, and the network's timestep input there."""
    described = diffusion.to_dict()
    steps = described["num_timesteps"]
    return {
        **{name: described[name] for name in ("schedule", "num_timesteps", "betas")},
        "told": _told(diffusion, steps),
    }


def _told(diffusion: Diffusion, steps: int) -> object:
    if diffusion.prediction == "edm":
        return "log sigma"
    return 1000 if diffusion.rescale_timesteps else steps


def condition_mean(x_prev: Tensor, gradient: Tensor, model_output: Tensor, row: Tensor) -> Tensor:
    """Ancestral: mean + variance * gradient, so x_prev moves by exp(log_variance) * gradient.

    Args:
        x_prev: [N, C, H, W], drawn without guidance.
        gradient: of log p(y | x_t), like x_prev.
        model_output: [N, C or 2C, H, W].
        row: [16], the step's row of the coefficient table of "ddpm".
    """
    log_variance = row[Column.LOG_VARIANCE_BIAS]
    channels = x_prev.shape[1]
    if model_output.shape[1] > channels:
        v = model_output[:, channels:].to(x_prev.dtype)
        log_variance = log_variance + row[Column.LOG_VARIANCE_SCALE] * v
    return x_prev + log_variance.exp() * gradient


def condition_score(
    x_prev: Tensor, x_0: Tensor, gradient: Tensor, row: Tensor
) -> tuple[Tensor, Tensor]:
    """DDIM: eps - sqrt(1 - ab) * gradient, so x_0 moves by (1 - ab) / sqrt(ab) * gradient.

    x_0 is not clamped again, as in the original.

    Args:
        x_prev, x_0: [N, C, H, W], of a step without guidance.
        gradient: of log p(y | x_t), like x_0.
        row: [16], the step's row of the coefficient table of "ddim".

    Returns:
        x_prev and x_0 with guidance.
    """
    moved = row[Column.SQRT_ONE_MINUS_ALPHA_BAR] ** 2 / row[Column.SQRT_ALPHA_BAR] * gradient
    return x_prev + row[Column.MEAN_X0] * moved, x_0 + moved

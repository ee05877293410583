"""The operation sequences of the original implementation, in PyTorch, which the ops replace.

They take the arguments of the ops. Tables are float64, as in the original, and on the images' device. (The
original copies a whole NumPy array to the device at every look-up, which a CUDA graph cannot contain; so on a
GPU this is faster than the original.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iddpm_ext.networks import plain
from iddpm_ext.ops.columns import Column


class Tables:
    """The original's named arrays, from the columns of our table."""

    def __init__(self, table: Tensor) -> None:
        rows = table.double()
        bias, scale = rows[:, Column.LOG_VARIANCE_BIAS], rows[:, Column.LOG_VARIANCE_SCALE]
        self.x_0_from_x_t = rows[:, Column.X0_FROM_XT].contiguous()
        self.x_0_from_eps = -rows[:, Column.X0_FROM_OUT]
        self.mean_x_0 = rows[:, Column.MEAN_X0].contiguous()
        self.mean_x_t = rows[:, Column.MEAN_XT].contiguous()
        self.log_beta = bias + scale
        self.posterior_log_variance = rows[:, Column.POSTERIOR_LOG_VARIANCE].contiguous()
        self.posterior_variance = self.posterior_log_variance.exp()
        self.signal = rows[:, Column.SQRT_ALPHA_BAR].contiguous()
        self.deviation = rows[:, Column.SQRT_ONE_MINUS_ALPHA_BAR].contiguous()


def _look_up(array: Tensor, t: Tensor, shape: torch.Size) -> Tensor:
    values = array[t].float()
    while values.dim() < len(shape):
        values = values[..., None]
    return values.expand(shape)


def _posterior_mean(tables: Tables, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    first = _look_up(tables.mean_x_0, t, x_t.shape) * x_0
    return first + _look_up(tables.mean_x_t, t, x_t.shape) * x_t


def _model_distribution(
    tables: Tables, out: Tensor, x_t: Tensor, t: Tensor, clip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, log-variance and predicted x_0, for a learned variance between the two bounds."""
    eps, v = torch.split(out, x_t.shape[1], dim=1)
    low = _look_up(tables.posterior_log_variance, t, x_t.shape)
    high = _look_up(tables.log_beta, t, x_t.shape)
    share = (v + 1) / 2
    log_variance = share * high + (1 - share) * low
    torch.exp(log_variance)  # the original computes the variance too
    x_0 = _look_up(tables.x_0_from_x_t, t, x_t.shape) * x_t
    x_0 = x_0 - _look_up(tables.x_0_from_eps, t, x_t.shape) * eps
    if clip:
        x_0 = x_0.clamp(-1, 1)
    mean = _posterior_mean(tables, x_0, x_t, t)
    _look_up(tables.posterior_variance, t, x_t.shape)
    _look_up(tables.posterior_log_variance, t, x_t.shape)
    return mean, log_variance, x_0


def q_sample(x_0: Tensor, t: Tensor, table: Tensor, noise: Tensor, *, tables: Tables) -> Tensor:
    """x_t from x_0 and noise."""
    signal = _look_up(tables.signal, t, x_0.shape)
    return signal * x_0 + _look_up(tables.deviation, t, x_0.shape) * noise


def reverse_step(
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor,
    *,
    tables: Tables,
    clip: bool = True,
) -> tuple[Tensor, Tensor]:
    """One ancestral step."""
    mean, log_variance, x_0 = _model_distribution(tables, model_output, x_t, t, clip)
    nonzero = (t != 0).float().view(-1, *([1] * (x_t.dim() - 1)))
    return mean + nonzero * torch.exp(0.5 * log_variance) * noise, x_0


def _tanh_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def _decoder_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    centred = x - mean
    inverse = torch.exp(-log_scale)
    right = _tanh_cdf(inverse * (centred + 1.0 / 255.0))
    left = _tanh_cdf(inverse * (centred - 1.0 / 255.0))
    log_right = torch.log(right.clamp(min=1e-12))
    log_left_open = torch.log((1.0 - left).clamp(min=1e-12))
    log_between = torch.log((right - left).clamp(min=1e-12))
    inner = torch.where(x > 0.999, log_left_open, log_between)
    return torch.where(x < -0.999, log_right, inner)


def vlb_terms(
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    tables: Tables,
    clip: bool = True,
) -> Tensor:
    """Both the KL term and the decoder's likelihood for every example, then a choice."""
    true_mean = _posterior_mean(tables, x_0, x_t, t)
    _look_up(tables.posterior_variance, t, x_t.shape)
    true_log_variance = _look_up(tables.posterior_log_variance, t, x_t.shape)
    mean, log_variance, _ = _model_distribution(tables, model_output, x_t, t, clip)
    kl = 0.5 * (
        -1.0
        + log_variance
        - true_log_variance
        + torch.exp(true_log_variance - log_variance)
        + (true_mean - mean) ** 2 * torch.exp(-log_variance)
    )
    kl = kl.mean(dim=(1, 2, 3)) / math.log(2.0)
    nll = -_decoder_log_likelihood(x_0, mean, log_scale=0.5 * log_variance)
    return torch.where(t == 0, nll.mean(dim=(1, 2, 3)) / math.log(2.0), kl)


def hybrid_loss(
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    tables: Tables,
    vlb_weight: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """MSE, and the bound with the mean detached."""
    eps, v = torch.split(model_output, x_t.shape[1], dim=1)
    frozen = torch.cat([eps.detach(), v], dim=1)
    vlb = vlb_terms(frozen, x_0, x_t, t, table, tables=tables, clip=False)
    return ((noise - eps) ** 2).mean(dim=(1, 2, 3)), vlb


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """GroupNorm in float32, scale and shift, and SiLU as a product with a sigmoid."""
    h = torch.group_norm(x.float(), num_groups, weight.float(), bias.float(), eps).type(x.dtype)
    if scale is not None and shift is not None:
        h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return h * torch.sigmoid(h) if silu else h


def qkv_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Two einsums and a softmax in float32."""
    return plain.qkv_attention(qkv, num_heads)


def adamw_ema(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[list[Tensor]],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decays: tuple[float, ...],
) -> None:
    """PyTorch's fused AdamW, and its multi-tensor interpolation for each average."""
    steps = [torch.full((), float(step), dtype=torch.float32, device=p.device) for p in params]
    torch._fused_adamw_(
        params, grads, exp_avgs, exp_avg_sqs, [], steps,
        lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, eps=eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip
    for average, decay in zip(emas, decays, strict=True):
        torch._foreach_lerp_(average, params, 1 - decay)


#: PyTorch's own functions, where an op's equation would be a slow way to write it.
PLAIN: dict[str, Callable[..., Any]] = {
    "group_norm_silu": plain.group_norm_silu,
    "adamw_ema": adamw_ema,
}


def sequence(name: str, kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """The original's formulation of a call of op `name`, or None where it has none."""
    function = globals().get(name)
    if function is None or name not in _SERVED or not _serves(name, kwargs):
        return None
    if "table" not in kwargs:
        return function
    tables = Tables(kwargs["table"])
    return lambda **arguments: function(**arguments, tables=tables)


_SERVED = {
    "q_sample": {"x_0", "t", "table", "noise"},
    "reverse_step": {"x_t", "model_output", "t", "table", "noise", "clip"},
    "vlb_terms": {"model_output", "x_0", "x_t", "t", "table", "clip"},
    "hybrid_loss": {"model_output", "x_0", "x_t", "noise", "t", "table", "vlb_weight"},
    "group_norm_silu": {"x", "num_groups", "weight", "bias", "scale", "shift"},
    "qkv_attention": {"qkv", "num_heads"},
}


def _serves(name: str, kwargs: dict[str, Any]) -> bool:
    learned = "x_t" not in kwargs or kwargs["model_output"].shape[1] == 2 * kwargs["x_t"].shape[1]
    given = isinstance(kwargs.get("noise", torch.empty(0)), Tensor)
    return learned and given and set(kwargs) <= _SERVED[name]

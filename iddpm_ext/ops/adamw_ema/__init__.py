"""AdamW and the exponential moving averages of its result, in one pass over all tensors."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from iddpm_ext import _native
from iddpm_ext.ops import checks
from iddpm_ext.ops.adamw_ema import reference
from iddpm_ext.ops.adamw_ema.layout import Packed
from iddpm_ext.ops.arguments import DTYPE_CODES, check_launch, stream
from iddpm_ext.ops.operators import define
from iddpm_ext.ops.spec import OpSpec, register, resolve_backend
from iddpm_ext.scalars import plain

#: Most averages: a kernel has room for so many decays.
MAX_EMAS = 8


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Sequence[Tensor]],
    *,
    step: int | Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decays: Sequence[float],
    copies: Sequence[Tensor] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Updates every parameter by AdamW, then its moving averages, in place.

        g = grad_scale grad
        m = beta_1 m + (1 - beta_1) g,   v = beta_2 v + (1 - beta_2) g^2
        p = (1 - lr weight_decay) p - lr (m / (1 - beta_1^step)) / (sqrt(v / (1 - beta_2^step)) + eps)
        ema_k = decay_k ema_k + (1 - decay_k) p                            for every average k
        copy = p, rounded                                                  if there are copies

    step, grad_scale and found_inf may be tensors on the device, so that the host never waits. With
    grad_scale, unscaling and clipping of gradients need no pass of their own.

    Args:
        params: the master weights, tensors of float32 (for the reference also float64) of any shapes.
        grads: like params, of one floating dtype.
        exp_avgs, exp_avg_sqs: m and v, like params and of their dtype.
        emas: for each average a list like params, of their dtype; at most 8 averages.
        step: the number of this update, from 1 on: an int, or a tensor of one element.
        lr: learning rate, at least 0.
        betas: each in [0, 1).
        eps: at least 0.
        weight_decay: at least 0; decoupled from the gradient.
        decays: the decay of each average, in [0, 1].
        copies: like params, of one floating dtype: the model's own weights in mixed-precision training.
        grad_scale: a tensor of one element that multiplies the gradients: 1 / loss scale, times the
            factor that clips them.
        found_inf: a tensor of one element; if it is not 0, nothing is changed.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        TypeError, ValueError: for an argument of a wrong type, shape, device or value.
        RuntimeError: if an explicit backend does not support the call.

    Not differentiable. Results do not depend on the number of threads, nor on how tensors are grouped.

    Source: Loshchilov & Hutter 2019, algorithm 2; Nichol & Dhariwal 2021, appendix A.
    """
    params, grads = _tensor_list("params", params), _tensor_list("grads", grads)
    exp_avgs = _tensor_list("exp_avgs", exp_avgs)
    exp_avg_sqs = _tensor_list("exp_avg_sqs", exp_avg_sqs)
    averages = [_tensor_list(f"emas[{k}]", list_) for k, list_ in enumerate(_list("emas", emas))]
    copied = [] if copies is None else _tensor_list("copies", copies)
    dtype = _one_dtype("params", params, (torch.float32, torch.float64))
    _check_like("grads", grads, params, None)
    _check_like("exp_avgs", exp_avgs, params, dtype)
    _check_like("exp_avg_sqs", exp_avg_sqs, params, dtype)
    for k, values in enumerate(averages):
        _check_like(f"emas[{k}]", values, params, dtype)
        _check_writable(f"emas[{k}]", values)
    for name, values in (("params", params), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        _check_writable(name, values)
    step, lr, betas, eps, weight_decay, decays = plain((step, lr, betas, eps, weight_decay, decays))
    steps = _check_step(step, params)
    _check_number("lr", lr, 0.0, None)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"adamw_ema: betas must be two numbers, got {betas!r}")
    for beta in betas:
        _check_number("betas", beta, 0.0, 1.0)
    _check_number("eps", eps, 0.0, None)
    _check_number("weight_decay", weight_decay, 0.0, None)
    decays = _check_decays(decays, len(averages))
    if copies is not None:
        _check_like("copies", copied, params, None)
        _check_writable("copies", copied)
    _check_factor("grad_scale", grad_scale, params)
    _check_factor("found_inf", found_inf, params)
    if not params:
        return
    used = {dtype, grads[0].dtype, *(x.dtype for x in copied[:1])}
    widest = torch.float64 if torch.float64 in used else dtype
    chosen = resolve_backend("adamw_ema", backend, params[0].device, widest)
    arguments = (
        params, grads, exp_avgs, exp_avg_sqs, [x for values in averages for x in values], copied,
        steps, grad_scale, found_inf, 0.0 if steps is not None else float(step),
        float(lr), float(betas[0]), float(betas[1]), float(eps), float(weight_decay), decays,
    )  # fmt: skip
    with torch.no_grad():
        if chosen == "reference":
            reference.adamw_ema(*arguments)
        else:
            _op(*arguments, chosen)


def _list(name: str, values: Any) -> list[Any]:
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"adamw_ema: {name} must be a list, got {type(values).__name__}")
    return list(values)


def _tensor_list(name: str, values: Any) -> list[Tensor]:
    values = _list(name, values)
    for i, value in enumerate(values):
        if not isinstance(value, Tensor):
            raise TypeError(f"adamw_ema: {name}[{i}] must be a tensor, got {type(value).__name__}")
    return values


def _one_dtype(name: str, values: list[Tensor], allowed: tuple[torch.dtype, ...]) -> torch.dtype:
    """The common dtype of the tensors; the first of `allowed` if the list is empty."""
    dtype = values[0].dtype if values else allowed[0]
    for i, value in enumerate(values):
        if value.dtype not in allowed or value.dtype != dtype:
            names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
            raise TypeError(
                f"adamw_ema: {name} must all be of one dtype, {names}, got {value.dtype} at {i}"
            )
    return dtype


def _check_like(
    name: str, values: list[Tensor], params: list[Tensor], dtype: torch.dtype | None
) -> None:
    """Checks for as many tensors as params, of their shapes and device, of `dtype` or any floating dtype."""
    if len(values) != len(params):
        raise ValueError(f"adamw_ema: {name} must have {len(params)} tensors, got {len(values)}")
    _one_dtype(name, values, checks.FLOATS if dtype is None else (dtype,))
    for i, (value, param) in enumerate(zip(values, params, strict=True)):
        if value.shape != param.shape:
            raise ValueError(
                f"adamw_ema: {name}[{i}] must be of the shape of params[{i}] {list(param.shape)}, "
                f"got shape {list(value.shape)}"
            )
        if value.device != params[0].device or param.device != params[0].device:
            raise ValueError(
                f"adamw_ema: {name}[{i}] must be on {params[0].device} as params[0], "
                f"got {value.device} for a parameter on {param.device}"
            )


def _check_writable(name: str, values: list[Tensor]) -> None:
    for i, value in enumerate(values):
        if not value.is_contiguous() and any(
            stride == 0 and size > 1
            for stride, size in zip(value.stride(), value.shape, strict=True)
        ):
            raise ValueError(
                f"adamw_ema: {name}[{i}] must not overlap itself, got strides {value.stride()}"
            )


def _check_step(step: Any, params: list[Tensor]) -> Tensor | None:
    """Checks the step; returns it if it is a tensor, else None."""
    if isinstance(step, Tensor):
        _check_factor("step", step, params)
        return step
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"adamw_ema: step must be an int or a tensor, got {type(step).__name__}")
    if step < 1:
        raise ValueError(f"adamw_ema: step must be at least 1, got {step}")
    return None


def _check_number(name: str, value: Any, low: float, below: float | None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"adamw_ema: {name} must be a number, got {type(value).__name__}")
    if not low <= value < (float("inf") if below is None else below):
        upper = "finite" if below is None else f"below {below}"
        raise ValueError(f"adamw_ema: {name} must be at least {low} and {upper}, got {value}")


def _check_decays(decays: Any, count: int) -> list[float]:
    decays = _list("decays", decays)
    if len(decays) != count:
        raise ValueError(f"adamw_ema: decays must be one for each of {count} emas, got {decays!r}")
    if count > MAX_EMAS:
        raise ValueError(f"adamw_ema: decays must be at most {MAX_EMAS}, got {count}")
    for decay in decays:
        if not isinstance(decay, (int, float)) or not 0 <= decay <= 1:
            raise ValueError(f"adamw_ema: decays must lie in [0, 1], got {decay!r}")
    return [float(decay) for decay in decays]


def _check_factor(name: str, value: Any, params: list[Tensor]) -> None:
    """Checks for None, or a tensor of one element on the device of params."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"adamw_ema: {name} must be a tensor, got {type(value).__name__}")
    if value.numel() != 1 or value.is_complex():
        raise ValueError(
            f"adamw_ema: {name} must be a real tensor of one element, got {value.dtype} "
            f"of shape {list(value.shape)}"
        )
    if params:
        checks.same_device("adamw_ema", params[0], **{name: value})


def _run(
    launch: Any,
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    copies: list[Tensor],
    steps: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decays: list[float],
) -> int:
    """Packs the tensors, launches and unpacks; returns the launcher's code."""
    packed = Packed(params, grads, exp_avgs, exp_avg_sqs, emas, copies)
    code = launch(
        (len(params), len(decays)),
        packed.table,
        (DTYPE_CODES[grads[0].dtype], DTYPE_CODES[copies[0].dtype] if copies else 0),
        [None if x is None else x.reshape(()).float() for x in (steps, grad_scale, found_inf)],
        (step, lr, beta1, beta2, eps, weight_decay),
        decays,
    )
    packed.write_back()
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *emas, *copies])
    return code or 0


def _native_launch(name: str, last: int) -> Callable[..., int | None]:
    """The compiled launcher `name`, called with tensors; `last` is its number of threads, or the stream."""

    def launch(
        size: tuple[int, int],
        table: list[int],
        dtypes: tuple[int, int],
        factors: list[Tensor | None],
        numbers: tuple[float, ...],
        decays: list[float],
    ) -> int | None:
        rows, rates = array("q", table), array("d", decays)
        at = tuple(0 if x is None else x.data_ptr() for x in factors)
        return getattr(_native.native(), name)(
            size, rows.buffer_info()[0], dtypes, at, numbers, rates.buffer_info()[0], last
        )

    return launch


def _cpu(*inputs: Any) -> None:
    _run(_native_launch("adamw_ema_cpu", torch.get_num_threads()), *inputs)


def _cuda(*inputs: Any) -> None:
    first = inputs[0][0]
    with torch.cuda.device(first.device):
        code = _run(_native_launch("adamw_ema_cuda", stream(first)), *inputs)
    check_launch("adamw_ema", code)


def _triton(*inputs: Any) -> None:
    from iddpm_ext.ops.adamw_ema import triton

    _run(triton.launch_on(inputs[0][0].device), *inputs)


def _fake(*_: Any) -> None:
    return None


_KERNELS = {"cpu": _cpu, "cuda": _cuda, "triton": _triton}

SPEC = register(
    OpSpec(
        name="adamw_ema",
        summary="AdamW and every moving average in one pass over all tensors",
        public=adamw_ema,
        kernels={"reference": reference.adamw_ema, **_KERNELS},
    )
)

_op = define(
    "adamw_ema(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] emas, Tensor(e!)[] copies, Tensor? steps, Tensor? grad_scale, Tensor? found_inf, "
    "float step, float lr, float beta1, float beta2, float eps, float weight_decay, float[] decays, "
    "str backend) -> ()",
    _KERNELS,
    _fake,
)

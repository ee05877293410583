"""Calls of `adamw_ema` for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from iddpm_ext.ops import random_calls, synthetic
from iddpm_ext.ops.spec import BadCase, Case

# A scalar, odd lengths, a convolution's weights, more than one chunk, and nothing.
_SHAPES = ((), (7,), (6, 3, 3, 3), (5000,), (0, 4), (33, 130))


def _call(
    shapes: Sequence[tuple[int, ...]],
    device: str,
    grad_dtype: torch.dtype = torch.float32,
    decays: tuple[float, ...] = (0.9999, 0.5),
) -> dict[str, Any]:
    draw = synthetic.Tensors(4, device, torch.float32)

    def like(std: float = 1.0, mean: float = 0.0) -> list[Tensor]:
        return [draw.normal(shape, mean, std) for shape in shapes]

    return {
        "params": like(),
        "grads": [x.to(grad_dtype) for x in like()],
        "exp_avgs": like(),
        "exp_avg_sqs": [x.abs() for x in like()],
        "emas": [like() for _ in decays],
        "step": 3,
        "lr": 0.1,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "decays": list(decays),
    }


def _change(call: dict[str, Any], layout: Any) -> dict[str, Any]:
    """The same call with every tensor in the memory layout that `layout` makes."""
    changed = dict(call)
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        changed[name] = [layout(x) for x in call[name]]
    changed["emas"] = [[layout(x) for x in values] for values in call["emas"]]
    return changed


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[Case]:
    call = _call(_SHAPES, device)
    one = torch.ones((), device=device, dtype=torch.float32)
    yield Case("two averages", call)
    yield Case("no average", _call(_SHAPES, device, decays=()))
    yield Case(
        "eight averages", _call(((9,), (40,)), device, decays=tuple(k / 7 for k in range(8)))
    )
    for half in (torch.bfloat16, torch.float16):
        copies = [torch.zeros_like(x, dtype=half) for x in call["params"]]
        name = str(half).removeprefix("torch.")
        yield Case(f"{name} gradients", _call(_SHAPES, device, half))
        yield Case(f"{name} copies", {**call, "copies": copies})
        yield Case(f"{name} both", {**_call(_SHAPES, device, half), "copies": copies})
    yield Case("float32 copies", {**call, "copies": [torch.zeros_like(x) for x in call["params"]]})
    yield Case("first step", {**call, "step": 1, "exp_avgs": [x * 0 for x in call["exp_avgs"]]})
    yield Case("a million steps", {**call, "step": 1_000_000})
    yield Case("step on the device", {**call, "step": 3 * one})
    yield Case("integer step on the device", {**call, "step": (3 * one).long()})
    yield Case("scaled gradients", {**call, "grad_scale": one / 1024})
    yield Case("found no infinity", {**call, "found_inf": 0 * one})
    infinite = {**call, "grads": [x / 0 for x in call["grads"]]}
    yield Case("found an infinity", {**infinite, "found_inf": one[None]})
    yield Case("infinite gradients", infinite)
    yield Case("no decay, no momentum", {**call, "weight_decay": 0.0, "betas": (0.0, 0.0)})
    yield Case("one element", _call(((1,),), device))
    yield Case("more tensors than a launch takes", _call(((64,),) * 500, device, decays=()))
    yield Case("storage offset", _change(call, synthetic.LAYOUTS["storage offset"]))
    images = _call(((4, 5, 6, 7), (3, 2, 8, 8)), device)
    for label in ("channels_last", "sliced", "pitched", "cropped", "transposed"):
        yield Case(label, _change(images, synthetic.LAYOUTS[label]))
    last = synthetic.LAYOUTS["channels_last"]
    yield Case(
        "other layout of the gradient", {**images, "grads": [last(x) for x in images["grads"]]}
    )
    yield Case(
        "other layout of the parameter", {**images, "params": [last(x) for x in images["params"]]}
    )
    broadcast = [x[:1].expand(x.shape) for x in images["grads"]]
    yield Case("expanded gradient", {**images, "grads": broadcast})


def bad_inputs(device: str) -> Iterator[BadCase]:
    good = _call(((2, 3), (4,)), device)

    def bad(label: str, error: type[Exception], match: str, **change: Any) -> BadCase:
        return BadCase(label, {**good, **change}, error, match)

    params, grads = good["params"], good["grads"]
    yield bad("params a tensor", TypeError, "params must be a list", params=params[0])
    yield bad("params numbers", TypeError, r"params\[0\] must be a tensor", params=[1.0, 2.0])
    yield bad("params half", TypeError, "params must all be", params=[x.half() for x in params])
    mixed = [params[0], params[1].double()]
    yield bad("params mixed", TypeError, "params must all be of one dtype", params=mixed)
    yield bad("params expanded", ValueError, r"params\[1\] must not overlap",
              params=[params[0], params[1][:1].expand(4)])  # fmt: skip
    for name in ("grads", "exp_avgs", "exp_avg_sqs"):
        values = good[name]
        yield bad(f"{name} a tensor", TypeError, f"{name} must be a list", **{name: values[0]})
        yield bad(
            f"{name} too few", ValueError, f"{name} must have 2 tensors", **{name: values[:1]}
        )
        other = [values[0].T, values[1]]
        yield bad(
            f"{name} shape", ValueError, rf"{name}\[0\] must be of the shape", **{name: other}
        )
        integer = [x.long() for x in values]
        yield bad(f"{name} integer", TypeError, f"{name} must all be of one", **{name: integer})
    some = [grads[0], grads[1].half()]
    yield bad("grads mixed", TypeError, "grads must all be of one dtype", grads=some)
    halves = [x.half() for x in good["exp_avgs"]]
    yield bad("exp_avgs half", TypeError, "exp_avgs must all be of one", exp_avgs=halves)
    emas = good["emas"]
    yield bad("emas flat", TypeError, r"emas\[0\] must be a list", emas=emas[0])
    yield bad("emas too few", ValueError, r"emas\[1\] must have 2", emas=[emas[0], emas[1][:1]])
    yield bad("emas a tensor", TypeError, "emas must be a list", emas=grads[0])
    yield bad("step 0", ValueError, "step must be at least 1, got 0", step=0)
    yield bad("step float", TypeError, "step must be an int or a tensor", step=1.5)
    yield bad(
        "step shape",
        ValueError,
        "step must be a real tensor of one",
        step=torch.ones(2, dtype=torch.float32, device="cpu"),
    )
    yield bad("lr negative", ValueError, "lr must be at least 0", lr=-0.1)
    yield bad("lr text", TypeError, "lr must be a number", lr="fast")
    yield bad("lr NaN", ValueError, "lr must be at least 0", lr=float("nan"))
    yield bad("betas one", ValueError, "betas must be two numbers", betas=(0.9,))
    yield bad("betas 1", ValueError, "betas must be at least 0.0 and below 1", betas=(0.9, 1.0))
    yield bad("eps negative", ValueError, "eps must be at least 0", eps=-1e-8)
    yield bad("weight_decay negative", ValueError, "weight_decay must be", weight_decay=-1.0)
    yield bad("decays too few", ValueError, "decays must be one for each of 2", decays=[0.9])
    yield bad("decays a number", TypeError, "decays must be a list", decays=0.9)
    yield bad("decays above 1", ValueError, r"decays must lie in \[0, 1\]", decays=[0.9, 1.1])
    nine = {"emas": [emas[0]] * 9, "decays": [0.9] * 9}
    yield bad("nine averages", ValueError, "decays must be at most 8", **nine)
    yield bad("copies too few", ValueError, "copies must have 2", copies=params[:1])
    yield bad("copies integer", TypeError, "copies must all be", copies=[x.int() for x in params])
    yield bad("grad_scale number", TypeError, "grad_scale must be a tensor", grad_scale=0.5)
    yield bad(
        "grad_scale shape",
        ValueError,
        "grad_scale must be",
        grad_scale=torch.ones(3, dtype=torch.float32, device="cpu"),
    )
    yield bad("found_inf number", TypeError, "found_inf must be a tensor", found_inf=True)
    yield bad("backend", ValueError, "backend must be one of", backend="opencl")


def property_inputs(draw: random_calls.Draw, device: str, dtype: torch.dtype) -> dict[str, Any]:
    shapes = [random_calls.image_shape(draw) for _ in range(draw.integer(0, 3))]
    halves = (torch.float32, torch.bfloat16, torch.float16)

    def like(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        drawn = [random_calls.values(draw, shape, device, dtype) for shape in shapes]
        return [random_calls.relayout(draw, x, expand=False) for x in drawn]

    one = torch.ones((), device=device, dtype=torch.float32)
    decays = draw.choice(([0.9999], [], [0.0, 0.5, 1.0]))
    step = draw.choice((1, 2, 1000, 10**7))
    call: dict[str, Any] = {"params": like(), "grads": like(draw.choice(halves))}
    call |= {"exp_avgs": like(), "exp_avg_sqs": [x.abs() for x in like()]}
    call |= {"emas": [like() for _ in decays], "decays": decays}
    call |= {"step": draw.choice((step, step * one)), "lr": draw.choice((1e-3, 1.0, 0.0))}
    call |= {"betas": draw.choice(((0.9, 0.999), (0.0, 0.0), (0.5, 0.9999)))}
    call |= {"eps": draw.choice((1e-8, 1e-3)), "weight_decay": draw.choice((0.0, 0.1))}
    if draw.choice((False, True)):
        call["copies"] = like(draw.choice(halves))
    if draw.choice((False, True)):
        call["grad_scale"] = one * draw.choice((2.0**-16, 3.0, float("nan")))
    if draw.choice((False, True)):
        call["found_inf"] = one * draw.choice((0, 1))
    return call


def benchmark_inputs(device: str) -> Iterator[Case]:
    block = ((128, 128, 3, 3), (128,), (256, 512), (256,))
    yield Case(
        "16 blocks of the CIFAR-10 network, one average",
        _call(block * 16, device, decays=(0.9999,)),
    )


def minimum_bytes(kwargs: dict[str, Any]) -> int:
    """Each gradient is read, everything else read and written; copies are written."""
    kept = [*kwargs["params"], *kwargs["exp_avgs"], *kwargs["exp_avg_sqs"]]
    kept += [x for values in kwargs["emas"] for x in values]
    once = [*kwargs["grads"], *(kwargs.get("copies") or [])]
    return 2 * sum(x.nbytes for x in kept) + sum(x.nbytes for x in once)

"""The CUDA kernel of a chain's step, emulated: `reverse_step` with its numbers in memory, and guidance."""

from __future__ import annotations

import pytest
import torch
from cuda_emu import toolchain
from op_calls import assert_close

from iddpm_ext import _native
from iddpm_ext.ops import reverse_step, synthetic
from iddpm_ext.random import STREAM_REVERSE, NoiseKey
from iddpm_ext.sampling.cuda_chain import launch_step

REASON = toolchain.absence() or _native.cpu_absence()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no emulator: {REASON}")
SEEDS = (0, 12345678901234567890)
T = synthetic.NUM_TIMESTEPS


@pytest.fixture(autouse=True)
def emulated():
    from cuda_emu import emulator

    with emulator.emulated_cuda(1):
        yield


def call(
    shape=(3, 3, 8, 6), *, learned=True, guided=False, dtype=torch.float32, seed=SEEDS[1], t=40
):
    """Arguments of `launch_step` by name."""
    n, c, h, w = shape
    draw = synthetic.Tensors(4, "cpu", torch.float32)
    channels = 2 * c if learned else c
    outputs = [draw.normal((n, channels, h, w)).to(dtype) for _ in range(2)]
    return {
        "x": draw.normal(shape),
        "model_output": outputs[0],
        "unlabelled": outputs[1] if guided else None,
        "t": torch.tensor([t, -7]),
        "table": synthetic.table("cpu", learned=learned).float(),
        "seed": torch.tensor([seed - (seed >> 63 << 64)]),
        "samples": torch.arange(n) * 3 + 5,
        "scale": torch.tensor([2.5]),
        "clip": True,
    }


def expected(arguments, seed, dtype, backend="reference"):
    """By the op, in `dtype`."""
    x, out, plain = (arguments[k] for k in ("x", "model_output", "unlabelled"))
    if plain is not None:
        c = x.shape[1]
        out, plain = out.to(dtype), plain.to(dtype)
        guided = plain[:, :c] + arguments["scale"].to(dtype) * (out[:, :c] - plain[:, :c])
        out = torch.cat([guided, out[:, c:]], dim=1)
    step, samples = int(arguments["t"][0]), arguments["samples"]
    key = (
        samples
        if samples is None
        else NoiseKey(seed, STREAM_REVERSE, samples, int(arguments["table"][step, -1]))
    )
    exact = out.to(dtype) if dtype == torch.float64 else out
    t, table = torch.full((len(x),), step), arguments["table"].to(dtype)
    return reverse_step(
        x.to(dtype), exact, t, table, key, clip=arguments["clip"], backend=backend
    ).x_prev


def step_as_the_op(arguments, seed=SEEDS[1]):
    """Takes the step and compares it with the op's in float64."""
    exact, yardstick = (expected(arguments, seed, d) for d in (torch.float64, torch.float32))
    launch_step(**arguments)
    assert_close(arguments["x"], exact, yardstick, torch.float32)


CASES = {
    "learned variance": {},
    "fixed variance": {"learned": False},
    "guided": {"guided": True},
    "bfloat16": {"dtype": torch.bfloat16, "guided": True},
    "float16": {"dtype": torch.float16},
    "seed 0": {"seed": 0},
    "first step": {"t": T - 1},
    "last step": {"t": 0},
    "odd sizes": {"shape": (2, 3, 7, 5), "guided": True},
    "one element": {"shape": (1, 1, 1, 1)},
    "several blocks": {"shape": (2, 3, 40, 20)},
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CASES)
def test_step_is_that_of_the_op_in_float64(name, layout):
    arguments = call(**CASES[name])
    if layout == "channels_last":
        for key in ("model_output", "unlabelled"):
            if arguments[key] is not None:
                arguments[key] = arguments[key].contiguous(memory_format=torch.channels_last)
    step_as_the_op(arguments, CASES[name].get("seed", SEEDS[1]))


@pytest.mark.parametrize("change", [{}, {"clip": False}, {"samples": None}])
def test_step_has_the_bits_of_the_ops_kernel(change):
    arguments = {**call(), **change}
    wanted = expected(arguments, SEEDS[1], torch.float32, backend="cuda")
    launch_step(**arguments)
    assert torch.equal(arguments["x"], wanted)


def test_images_of_a_sample_do_not_depend_on_its_batch():
    whole, part = call(), call()
    launch_step(**whole)
    rows = {k: part[k][2:] for k in ("x", "model_output", "samples")}
    launch_step(**{**part, **rows})
    assert torch.equal(rows["x"], whole["x"][2:])


def test_noise_is_that_of_the_training_step_that_the_row_names():
    arguments = call()
    arguments["table"][:, -1] *= 80  # a chain of 50 of 4000 steps
    wanted = expected(arguments, SEEDS[1], torch.float32, backend="cuda")
    launch_step(**arguments)
    assert torch.equal(arguments["x"], wanted)


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, each image followed by as much NaN, rounded up to whole vectors."""
    n, size = len(tensor), tensor[0].numel()
    buffer = tensor.new_full((n, 4 * (size // 2 + 1)), torch.nan)
    buffer[:, :size] = tensor.reshape(n, size)
    return buffer[:, :size].view(tensor.shape)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (2, 3, 8, 6)])
def test_images_apart_in_memory_keep_what_lies_between_them(shape, learned):
    arguments = call(shape, learned=learned, guided=True)
    for name in ("x", "model_output", "unlabelled"):
        arguments[name] = apart(arguments[name])
    step_as_the_op(arguments)
    x = arguments["x"]
    between = x.as_strided((2, x.stride(0)), (x.stride(0), 1))[:, x[0].numel() :]
    assert between.isnan().all()


@pytest.mark.parametrize("name", ["x", "model_output", "unlabelled"])
def test_each_tensor_may_have_its_own_order(name):
    arguments = call(guided=True)
    arguments[name] = arguments[name].contiguous(memory_format=torch.channels_last)
    step_as_the_op(arguments)


@pytest.mark.parametrize("t", [-1, T, 2**40])
def test_a_step_that_the_table_has_not_gives_nan(t):
    arguments = call(t=t)
    launch_step(**arguments)
    assert arguments["x"].isnan().all()


def test_no_images_are_no_launch():
    launch_step(**call((0, 3, 8, 8)))

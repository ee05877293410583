"""Whole chains on the CUDA engine: one graph computes a step, and is replayed for every step.

The graph holds the network, guidance and the update of x with its noise. What differs between steps and
calls (t, the seed, coefficients, embeddings, the guidance scale) is in device memory, and the graph itself
moves on to the next step, so the host only replays it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from iddpm_ext import _native
from iddpm_ext.engines.base import upsampled
from iddpm_ext.engines.choosing import Network
from iddpm_ext.engines.cuda.engine import CUDAEngine
from iddpm_ext.engines.embedding import Schedule
from iddpm_ext.ops.arguments import NO_PLANE, check_launch, plane, stream
from iddpm_ext.ops.columns import NUM_COLUMNS
from iddpm_ext.ops.spec import resolve_backend
from iddpm_ext.random import STREAM_REVERSE
from iddpm_ext.sampling.predict import Predictor
from iddpm_ext.sampling.request import Request

_WINDOW_BYTES = 64 << 20  # of embeddings on the device at a time
_LEAST_STEPS = 64  # a graph has room for at least so many, so that most chains share one graph


def supports(request: Request, network: Network) -> bool:
    """Whether `prepare` can run this request: no function of the caller takes part in a step."""
    spec = request.spec
    return (
        isinstance(network, CUDAEngine)
        and request.solver is None
        and request.cond_fn is None
        and request.denoised_fn is None
        and spec.finish is None
        and (request.known is None or request.known.mask is None)
        and resolve_backend("reverse_step", spec.backend, spec.device, torch.float32) == "cuda"
    )


def prepare(
    request: Request, network: Network, samples: Tensor, x: Tensor
) -> Callable[[int], None]:
    """A function of i that takes step i of the chain of some images, called from T - 1 down to 0.

    samples: int64 [n], the images' indices. x: float32 [n, C, H, W], x_T; contiguous, overwritten by the
    last step.
    """
    assert isinstance(network, CUDAEngine)
    engine, chain = network, request.spec.diffusion
    predict = Predictor(request.spec, network, samples, request.guidance_scale)
    predict.begin()
    schedule, steps = engine.schedule, chain.num_timesteps
    noisy = request.noisy
    room = max(_LEAST_STEPS, 1 << (steps - 1).bit_length())
    guided, shared = request.guidance_scale != 1.0, schedule.labels is None
    low_res = None if predict.low_res is None else upsampled(predict.low_res, x)
    key = ("chain", *x.shape, room, guided, shared, low_res is not None, noisy, request.clip)
    task, replay = engine.task(
        key,
        lambda: _ChainTask(
            engine, x, room,
            guided=guided, shared=shared, noisy=noisy, clip=request.clip, low_res=low_res,
        ),
    )  # fmt: skip
    table = request.table()
    with engine.computing():
        task.x.copy_(x)
        if low_res is not None and task.low_res is not None:
            task.low_res.copy_(low_res)
        task.table[:steps].copy_(table)
        task.samples.copy_(samples)
        # fill_ passes the number as a kernel argument; a copy from the host would wait.
        task.seed.fill_(request.seed - (request.seed >> 63 << 64))
        task.scale.fill_(request.guidance_scale)
    lowest = steps

    def step(i: int) -> None:
        nonlocal lowest
        if i < lowest:
            with engine.computing():
                lowest = task.load(schedule, i)
        replay()
        if i == 0:
            x.copy_(task.x)

    return step


class _ChainTask:
    """A step of chains of one shape: replaces x_t by x_{t-1} and moves on t and the rows of embeddings."""

    def __init__(
        self,
        engine: CUDAEngine,
        x: Tensor,
        room: int,
        *,
        guided: bool,
        shared: bool,
        noisy: bool,
        clip: bool,
        low_res: Tensor | None,
    ):
        # Without a reference to the engine, which lives for one call: later calls reuse the task.
        self._network, self._guided, self._noisy, self._clip = engine.network, guided, noisy, clip
        device, n = engine.device, len(x)
        self._evaluated = 2 * n if guided else n
        rows = 1 if shared else self._evaluated
        floats = engine.network.floats
        self.x = torch.zeros_like(x)
        self.low_res = None if low_res is None else torch.zeros_like(low_res)
        self.table = torch.zeros(room, NUM_COLUMNS, dtype=torch.float32, device=device)
        self.samples = torch.zeros(n, dtype=torch.int64, device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.scale = torch.ones(1, dtype=torch.float32, device=device)
        room_for = max(rows, _WINDOW_BYTES // (4 * floats))
        self._window = torch.zeros(room_for, floats, dtype=torch.float32, device=device)
        # t, then the row of each evaluated image (or of all) in the window of embeddings; and what a
        # step subtracts from them: 0 during warm-up and capture.
        self._state = torch.zeros(1 + rows, dtype=torch.int64, device=device)
        self._stride = torch.zeros_like(self._state)

    def load(self, schedule: Schedule, i: int) -> int:
        """Loads embeddings for step i and as many below as there is room for; returns the lowest."""
        each = schedule.rows_a_step
        lowest = max(0, i + 1 - len(self._window) // each)
        rows = schedule.block(lowest, i + 1)
        torch.add(rows, self._network.embedding_bias, out=self._window[: len(rows)])
        self._state[1:].copy_(schedule.which + (i - lowest) * each)
        self._state[0].fill_(i)
        self._stride.fill_(each)
        self._stride[0].fill_(1)
        return lowest

    def work(self) -> None:
        """One step."""
        images = self.x if self.low_res is None else torch.cat([self.x, self.low_res], dim=1)
        if self._guided:
            images = images.repeat(2, 1, 1, 1)
        embeddings = self._window.index_select(0, self._state[1:])
        embeddings = embeddings.expand(self._evaluated, -1)
        out, n = self._network(images, embeddings), len(self.x)
        launch_step(
            self.x,
            out[:n],
            out[n:] if self._guided else None,
            t=self._state,
            table=self.table,
            seed=self.seed,
            samples=self.samples if self._noisy else None,
            scale=self.scale,
            clip=self._clip,
        )
        self._state.sub_(self._stride)


def launch_step(
    x: Tensor,
    model_output: Tensor,
    unlabelled: Tensor | None,
    *,
    t: Tensor,
    table: Tensor,
    seed: Tensor,
    samples: Tensor | None,
    scale: Tensor,
    clip: bool,
) -> None:
    """`reverse_step` in place, with guidance; reads everything that changes between replays on the device.

    x: float32 [N, C, H, W], x_t before and x_{t-1} after. model_output: [N, C or 2C, H, W], float32 or half
    precision; unlabelled: like it, the output without labels. The guided output is unlabelled + scale
    (model_output - unlabelled), with the variance of model_output. t, seed: int64, only the first element is
    read. table: float32 [T, 16]. samples: int64 [N], or None for no noise. scale: float32 [1].
    """
    n, c, height, width = x.shape
    labelled = plane(model_output)
    code = _native.native().chain_step_cuda(
        (n, c, height * width, len(table)),
        plane(x).view,
        labelled.view,
        NO_PLANE if unlabelled is None else plane(unlabelled).view,
        labelled.dtype_code,
        model_output.shape[1] > c,
        (
            t.data_ptr(),
            table.data_ptr(),
            seed.data_ptr(),
            0 if samples is None else samples.data_ptr(),
            scale.data_ptr(),
        ),
        STREAM_REVERSE,
        clip,
        stream(x),
    )
    check_launch("chain_step", code)

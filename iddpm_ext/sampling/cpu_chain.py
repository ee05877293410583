"""Whole chains on the CPU engine: what a step needs is worked out before the first one.

A step is then two calls of compiled code, the network and `reverse_step` in place, on the same
kernels and the same noise as step by step, so the images are the same to the bit. That is what
remains of about 0.4 ms of Python a step, which small networks are fast enough to notice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from iddpm_ext import _native
from iddpm_ext.engines.choosing import EngineNetwork, Network
from iddpm_ext.engines.cpu.engine import CPUEngine
from iddpm_ext.ops.native import NO_PLANE, noise_key, plane
from iddpm_ext.ops.spec import resolve_backend
from iddpm_ext.random import STREAM_REVERSE
from iddpm_ext.sampling.request import Request


def serves(request: Request, network: Network) -> bool:
    """Whether `prepare` takes this request: nothing but the network and the noise enters a step."""
    return (
        isinstance(network, EngineNetwork)
        and isinstance(network.engine, CPUEngine)
        and request.sampler in ("ddpm", "ddim")
        and request.guidance_scale == 1.0
        and request.cond_fn is None
        and request.low_res is None
        and resolve_backend("reverse_step", request.backend, request.device, torch.float32) == "cpu"
    )


def prepare(
    request: Request, network: Network, samples: Tensor, x: Tensor
) -> Callable[[int], None]:
    """A function that takes step i of the chain of some images, x <- x_{i-1}.

    samples: int64 [n], their numbers. x: float32 [n, C, H, W], x_T; contiguous, overwritten.
    """
    assert isinstance(network, EngineNetwork) and isinstance(network.engine, CPUEngine)
    engine, chain, n = network.engine, request.diffusion, len(samples)
    steps = torch.arange(chain.num_timesteps)
    labels = None if request.labels is None else request.labels[samples]
    network.begin(
        chain.model_timesteps(steps), labels if request.network_takes_labels else None, None
    )
    out = torch.empty(n, engine.out_channels, *engine.size)
    evaluate = engine.prepare(x, out)
    table = chain.table(request.device, sampler=request.sampler, eta=request.eta)
    noisy = request.sampler == "ddpm" or request.eta > 0
    t = steps[:, None].expand(-1, n).contiguous()
    timesteps = chain.timesteps[:, None].expand(-1, n).contiguous()
    x_0 = torch.empty_like(x)
    size = (n, x.shape[1], x.shape[2] * x.shape[3], len(table))
    learned = engine.out_channels > x.shape[1]
    planes = [plane(tensor) for tensor in (x, out, x_0)]
    threads, reverse_step_cpu = torch.get_num_threads(), _native.native().reverse_step_cpu

    def step(i: int) -> None:
        evaluate(i)
        reverse_step_cpu(
            *(size, planes[0].view, planes[1].view, planes[1].dtype_code, learned),
            *(t[i].data_ptr(), table.data_ptr(), NO_PLANE),
            noise_key(samples, timesteps[i] if noisy else None, request.seed, STREAM_REVERSE),
            *(request.clip, planes[0].view, planes[2].view, threads),
        )

    return step

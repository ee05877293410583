"""Which engine evaluates a network, and where it is kept.

An engine is told the chain's timesteps and the labels once, then called with a step's number.
Engines pack the weights, which takes longer than a step, so they are kept with the model.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iddpm_ext.networks.splice import Splice, joined
from iddpm_ext.networks.unet import UNet

if TYPE_CHECKING:
    from iddpm_ext.sampling.request import Request

_KEPT = 2


class Engine(Protocol):
    """Evaluates one network on batches of up to a fixed size."""

    def set_schedule(self, timesteps: Tensor, labels: Tensor | None, /) -> None:
        """timesteps: float32 [T], what the network is told; labels: int64 [n] of the next calls."""

    def __call__(self, x: Tensor, step: int, /) -> Tensor:
        """x: [n, C, H, W] -> the network's output at `timesteps[step]`."""

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None, /) -> Tensor:
        """x: [n, C, H, W] -> the output at timesteps float32 [n], one a sample, with labels [n]."""


class Network(Protocol):
    """The network as the chain sees it."""

    name: str

    def begin(self, timesteps: Tensor, labels: Tensor | None, low_res: Tensor | None) -> None:
        """Says what belongs to the calls to come."""

    def __call__(self, x: Tensor, step: int) -> Tensor:
        """The output for x [n, C, H, W] at `timesteps[step]`."""

    def at(
        self, x: Tensor, timesteps: Tensor, labels: Tensor | None, low_res: Tensor | None
    ) -> Tensor:
        """The output for x [n, C, H, W] at timesteps float32 [n], one a sample."""


class EngineNetwork:
    """A network run by an engine, which takes the upsampled low-resolution image as channels."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name = engine, name
        self._low_res: Tensor | None = None

    def begin(self, timesteps: Tensor, labels: Tensor | None, low_res: Tensor | None) -> None:
        self.engine.set_schedule(timesteps, labels)
        self._low_res = low_res

    def __call__(self, x: Tensor, step: int) -> Tensor:
        return self.engine(_with_low_res(x, self._low_res), step)

    def at(
        self, x: Tensor, timesteps: Tensor, labels: Tensor | None, low_res: Tensor | None
    ) -> Tensor:
        return self.engine.forward(_with_low_res(x, low_res), timesteps, labels)


def _with_low_res(x: Tensor, low_res: Tensor | None) -> Tensor:
    return x if low_res is None else torch.cat([x, upsampled(low_res, x)], dim=1)


def upsampled(low_res: Tensor, x: Tensor) -> Tensor:
    """low_res [N, C, h, w] in the size and dtype of x, as the network takes it."""
    return F.interpolate(low_res.to(x.dtype), x.shape[2:], mode="bilinear")


class PlainNetwork:
    """Any callable, evaluated as it is: a module in evaluation mode, under autocast for a dtype."""

    name = "plain"

    def __init__(self, request: Request) -> None:
        self.model, self.device, self.dtype = request.model, request.device, request.dtype
        self.plain_ops = request.backend == "reference"
        self._timesteps = torch.empty(0)
        self._kwargs: dict[str, Tensor] = {}

    def begin(self, timesteps: Tensor, labels: Tensor | None, low_res: Tensor | None) -> None:
        self._timesteps, self._kwargs = timesteps, _named(labels, low_res)

    def __call__(self, x: Tensor, step: int) -> Tensor:
        return self._evaluate(x, self._timesteps[step].expand(len(x)), self._kwargs)

    def at(
        self, x: Tensor, timesteps: Tensor, labels: Tensor | None, low_res: Tensor | None
    ) -> Tensor:
        return self._evaluate(x, timesteps, _named(labels, low_res))

    def _evaluate(self, x: Tensor, timesteps: Tensor, kwargs: dict[str, Tensor]) -> Tensor:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_evaluating(self.model))
            if self.plain_ops:
                stack.enter_context(_plain_backend(self.model))
            if self.dtype is not None:
                half = self.dtype != torch.float32
                stack.enter_context(
                    torch.autocast(self.device.type, self.dtype if half else None, half)
                )
            out = self.model(x, timesteps, **kwargs)
        if not isinstance(out, Tensor):
            raise TypeError(f"sample: model must return a tensor, got {type(out).__name__}")
        # The kernels read halves and float32 beside a float32 state.
        return out.to(x.dtype) if out.dtype == torch.float64 else out


def _named(labels: Tensor | None, low_res: Tensor | None) -> dict[str, Tensor]:
    named = {"y": labels, "low_res": low_res}
    return {name: value for name, value in named.items() if value is not None}


@contextlib.contextmanager
def _evaluating(model: object) -> Iterator[None]:
    training = isinstance(model, nn.Module) and model.training
    modes = [(m, m.training) for m in model.modules()] if training else []  # type: ignore[attr-defined]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _plain_backend(model: object) -> Iterator[None]:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    before = [(m, m.backend) for m in modules if isinstance(m, UNet)]
    for network, _ in before:
        network.backend = "plain"
    try:
        yield
    finally:
        for network, backend in before:
            network.backend = backend


def choose_network(request: Request, batch_size: int) -> Network:
    """The fastest network that serves the request, on batches of up to `batch_size` images."""
    if request.engine:
        for build in _BUILDERS:
            network = build(request, batch_size)
            if network is not None:
                return network
    return PlainNetwork(request)


def _cpu_network(request: Request, batch_size: int) -> Network | None:
    model, dtype = request.model, request.dtype or torch.float32
    state = torch.float32 if request.x_T is None else request.x_T.dtype
    if request.device.type != "cpu" or not isinstance(model, UNet) or state != torch.float32:
        return None
    if model.dtype != torch.float32 and request.dtype is None:
        return None
    from iddpm_ext.engines.cpu.engine import CPUEngine, NotServed

    size = request.image_shape[1:]
    threads = torch.get_num_threads()
    key = ("cpu", batch_size, size, dtype, request.exact, threads)
    try:
        engine = _kept(
            model,
            key,
            lambda: CPUEngine(
                model, batch_size, dtype=dtype, exact=request.exact, num_threads=threads, size=size
            ),
        )
    except NotServed as reason:
        if dtype == torch.bfloat16:
            # Autocast costs more than it brings on most CPUs.
            warnings.warn(
                f"sample: the module runs under autocast, without the engine: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
        return None
    return EngineNetwork(engine, "cpu engine")


def _cuda_network(request: Request, batch_size: int) -> Network | None:
    from iddpm_ext.engines.cuda.engine import CUDAEngine, NotServed, serves_device

    model = request.model
    state = torch.float32 if request.x_T is None else request.x_T.dtype
    if (
        not serves_device(request.device)
        or not isinstance(model, UNet)
        or state != torch.float32
        or torch.float64 in (model.dtype, request.dtype)
    ):
        return None
    dtype = request.dtype or model.dtype
    key = ("cuda", dtype, request.exact, request.device)
    try:
        engine = _kept(model, key, lambda: CUDAEngine(model, dtype=dtype, exact=request.exact))
    except NotServed as reason:
        warnings.warn(
            f"sample: the module runs without the engine: {reason}", RuntimeWarning, stacklevel=2
        )
        return None
    return EngineNetwork(engine, "cuda engine")


class SplicedNetwork:
    """The two networks of a `Splice`, each run as it is best run alone."""

    def __init__(self, splice: Splice, ends: Network, between: Network) -> None:
        self._splice, self._ends, self._between = splice, ends, between
        self.name = f"spliced {between.name}"
        self._at_ends: list[bool] = []

    def begin(self, timesteps: Tensor, labels: Tensor | None, low_res: Tensor | None) -> None:
        self._at_ends = self._splice.at_ends(timesteps).tolist()
        for network in (self._ends, self._between):
            network.begin(timesteps, labels, low_res)

    def __call__(self, x: Tensor, step: int) -> Tensor:
        return (self._ends if self._at_ends[step] else self._between)(x, step)

    def at(
        self, x: Tensor, timesteps: Tensor, labels: Tensor | None, low_res: Tensor | None
    ) -> Tensor:
        def run(network: Network, rows: Tensor) -> Tensor:
            given = [None if value is None else value[rows] for value in (labels, low_res)]
            return network.at(x[rows], timesteps[rows], *given)

        return joined(
            self._splice.at_ends(timesteps),
            lambda rows: run(self._ends, rows),
            lambda rows: run(self._between, rows),
        )


def _spliced_network(request: Request, batch_size: int) -> Network | None:
    splice = request.model
    if not isinstance(splice, Splice):
        return None
    ends, between = (
        choose_network(replace(request, model=network), batch_size)
        for network in (splice.ends, splice.between)
    )
    return SplicedNetwork(splice, ends, between)


_BUILDERS: tuple[Callable[[Request, int], Network | None], ...] = (
    _spliced_network,
    _cuda_network,
    _cpu_network,
)


class _Engines(dict[tuple[object, ...], Engine]):
    """A model's engines. They hold addresses: no copy of the model takes them along."""

    def __deepcopy__(self, memo: object) -> _Engines:
        return _Engines()

    def __reduce__(self) -> tuple[type[_Engines], tuple[()]]:
        return (_Engines, ())


def _kept(model: nn.Module, key: tuple[object, ...], build: Callable[[], Engine]) -> Engine:
    """The model's engine for these settings; the engine itself notices when weights change."""
    engines: _Engines = model.__dict__.setdefault("_engines", _Engines())
    engine = engines.pop(key, None) or build()
    engines[key] = engine
    while len(engines) > _KEPT:
        del engines[next(iter(engines))]
    return engine

"""Which engine evaluates a network.

A `Network` gets the chain's timesteps and the labels once, by `begin`, and is then called with the index
of a step. Every call of a public function chooses its own, so no state is shared between calls; its
weights are those that the model has at that moment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from iddpm_ext.diffusion import Diffusion
from iddpm_ext.engines.base import NotSupported, undisturbed
from iddpm_ext.engines.kept import kept_of
from iddpm_ext.engines.locks import Lock
from iddpm_ext.engines.spec import NetworkSpec, describing
from iddpm_ext.engines.structure import Structure, why_hooked
from iddpm_ext.engines.weights import content_of
from iddpm_ext.networks.blocks import plain_backend
from iddpm_ext.networks.splice import Splice, joined
from iddpm_ext.networks.unet import UNet


class Network(Protocol):
    """The network as the chain sees it."""

    name: str

    def begin(
        self, timesteps: Tensor, labels: Tensor | None = None, low_res: Tensor | None = None
    ) -> None:
        """Sets timesteps float32 [T], labels int64 [n] and low_res [n, C, h, w] of the calls that follow."""

    def __call__(self, x: Tensor, step: int, /) -> Tensor:
        """The output for x [n, C, H, W] at `timesteps[step]`."""

    def at(
        self,
        x: Tensor,
        timesteps: Tensor,
        labels: Tensor | None = None,
        low_res: Tensor | None = None,
    ) -> Tensor:
        """The output for x [n, C, H, W] at timesteps float32 [n], one per sample."""


def choose_network(spec: NetworkSpec, batch_size: int) -> Network:
    """The fastest network that supports the call, on batches of up to `batch_size` images."""
    network = _chosen(spec, batch_size)
    return Preconditioned(network, spec.diffusion) if spec.diffusion.scales_input else network


def _chosen(spec: NetworkSpec, batch_size: int) -> Network:
    if spec.engine:
        for build in (_spliced_network, _cuda_network, _cpu_network):
            network = build(spec, batch_size)
            if network is not None:
                return network
    return PlainNetwork(spec)


class Preconditioned:
    """A network that is given images of unit variance instead of x_t: one of EDM's."""

    def __init__(self, network: Network, chain: Diffusion) -> None:
        self._network, self._chain = network, chain
        self.name = network.name

    def begin(
        self, timesteps: Tensor, labels: Tensor | None = None, low_res: Tensor | None = None
    ) -> None:
        self._network.begin(timesteps, labels, low_res)

    def __call__(self, x: Tensor, step: int) -> Tensor:
        return self._network(self._chain.model_input(x, step), step)

    def at(
        self,
        x: Tensor,
        timesteps: Tensor,
        labels: Tensor | None = None,
        low_res: Tensor | None = None,
    ) -> Tensor:
        # Which step each row is at, the timesteps tell: they rise with the noise.
        steps = torch.arange(self._chain.num_timesteps, dtype=torch.int64, device=x.device)
        t = torch.searchsorted(self._chain.model_timesteps(steps), timesteps)
        return self._network.at(self._chain.model_input(x, t), timesteps, labels, low_res)


class PlainNetwork:
    """Any callable, run without an engine: modules in evaluation mode; under autocast for a half dtype."""

    name = "plain"

    def __init__(self, spec: NetworkSpec) -> None:
        self._spec = spec
        self._timesteps: Tensor | None = None
        self._kwargs: dict[str, Tensor] = {}

    def begin(
        self, timesteps: Tensor, labels: Tensor | None = None, low_res: Tensor | None = None
    ) -> None:
        self._timesteps, self._kwargs = timesteps, _named(labels, low_res)

    def __call__(self, x: Tensor, step: int) -> Tensor:
        assert self._timesteps is not None
        return self._evaluate(x, self._timesteps[step].expand(len(x)), self._kwargs)

    def at(
        self,
        x: Tensor,
        timesteps: Tensor,
        labels: Tensor | None = None,
        low_res: Tensor | None = None,
    ) -> Tensor:
        return self._evaluate(x, timesteps, _named(labels, low_res))

    def _evaluate(self, x: Tensor, timesteps: Tensor, kwargs: dict[str, Tensor]) -> Tensor:
        spec, half = self._spec, self._spec.dtype in (torch.bfloat16, torch.float16)
        with contextlib.ExitStack() as stack:
            stack.enter_context(undisturbed(spec.device.type))
            if isinstance(spec.model, nn.Module):
                stack.enter_context(EVALUATING.of(spec.model))
            if spec.backend == "reference":
                stack.enter_context(plain_backend())
            if half:
                stack.enter_context(torch.autocast(spec.device.type, spec.dtype))
            out = spec.model(x, timesteps, **kwargs)
        if not isinstance(out, Tensor):
            raise TypeError(f"{spec.who}: model must return a tensor, got {type(out).__name__}")
        # The kernels of the chain take half precision and float32 beside a float32 x_t, not float64.
        return out.to(x.dtype) if out.dtype == torch.float64 else out


def _named(labels: Tensor | None, low_res: Tensor | None) -> dict[str, Tensor]:
    named = {"y": labels, "low_res": low_res}
    return {name: value for name, value in named.items() if value is not None}


class _Evaluating:
    """Keeps modules in evaluation mode while any thread evaluates them, then restores their modes."""

    def __init__(self) -> None:
        self._users: dict[int, tuple[int, list[nn.Module]]] = {}
        self._lock = Lock()

    @contextlib.contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        with self._lock:
            count, switched = self._users.get(id(model), (0, []))
            training = [module for module in model.modules() if module.training]
            for module in training:
                module.training = False
            self._users[id(model)] = count + 1, [*switched, *training]
        try:
            yield
        finally:
            with self._lock:
                count, switched = self._users.pop(id(model))
                if count > 1:
                    self._users[id(model)] = count - 1, switched
                else:
                    for module in switched:
                        module.training = True


EVALUATING = _Evaluating()


def _cpu_network(spec: NetworkSpec, batch_size: int) -> Network | None:
    ours = describing(spec.model)
    if spec.device.type != "cpu" or not isinstance(ours, UNet) or spec.state != torch.float32:
        return None
    from iddpm_ext.engines.cpu.program import CPUProgram, why_not_supported

    dtype = spec.dtype or torch.float32
    structure = _structure(spec, lambda: why_not_supported(ours, dtype))
    if structure is None:
        return None
    if spec.dtype is None and {p.dtype for p in structure.parameters} != {torch.float32}:
        return None
    size, threads = spec.image_shape[1:], torch.get_num_threads()

    def build() -> CPUProgram:
        return CPUProgram(
            ours, batch_size, dtype=dtype, exact=spec.exact, num_threads=threads, size=size
        )

    try:
        kind = ("cpu", batch_size, size, dtype, spec.exact, threads)
        return kept_of(ours).engine(ours, kind, lambda: content_of(structure.parameters), build)
    except NotSupported as reason:
        if dtype == torch.bfloat16:
            # Worth a warning: on most CPUs autocast is slower than float32.
            kept_of(ours).say(
                f"{spec.who}: the module runs under autocast, without the engine: {reason}"
            )
        return None


def _cuda_network(spec: NetworkSpec, batch_size: int) -> Network | None:
    from iddpm_ext.engines.cuda import engine as cuda

    ours = describing(spec.model)
    if (
        not cuda.supports_device(spec.device)
        or not isinstance(ours, UNet)
        or spec.state != torch.float32
        or torch.float64 in (ours.dtype, spec.dtype)
    ):
        return None
    dtype = spec.dtype or ours.dtype
    structure = _structure(spec, lambda: cuda.why_not_supported(ours, dtype))
    if structure is None:
        return None

    def build() -> cuda.CUDAProgram:
        return cuda.CUDAProgram(ours, dtype=dtype, exact=spec.exact)

    try:
        kind = ("cuda", dtype, spec.exact, spec.device)
        return kept_of(ours).engine(ours, kind, lambda: content_of(structure.parameters), build)
    except NotSupported as reason:
        kept_of(ours).say(f"{spec.who}: the module runs without the engine: {reason}")
        return None


def _structure(spec: NetworkSpec, why_not_supported: Callable[[], str | None]) -> Structure | None:
    """The model's structure if it is a plain `UNet`; else None, with one warning per model of the reason."""
    assert isinstance(spec.model, nn.Module)
    kept = kept_of(spec.model)
    if isinstance(spec.model, UNet):
        found = kept.structure(spec.model)
    else:
        found = f"the network is wrapped by a {type(spec.model).__name__}"
    if isinstance(found, Structure):
        # Weights spread over several devices have no engine.
        together = {p.device for p in found.parameters} == {spec.device}
        return found if together else None
    if why_not_supported() is None:
        kept.say(f"{spec.who}: the module itself runs, without the engine: {found}")
    return None


class SplicedNetwork:
    """The two networks of a `Splice`, each run by the engine that is chosen for it."""

    def __init__(self, splice: Splice, ends: Network, between: Network) -> None:
        self._splice, self._ends, self._between = splice, ends, between
        self.name = f"spliced {between.name}"
        self._at_ends: list[bool] = []

    def begin(
        self, timesteps: Tensor, labels: Tensor | None = None, low_res: Tensor | None = None
    ) -> None:
        self._at_ends = self._splice.at_ends(timesteps).tolist()
        for network in (self._ends, self._between):
            network.begin(timesteps, labels, low_res)

    def __call__(self, x: Tensor, step: int) -> Tensor:
        return (self._ends if self._at_ends[step] else self._between)(x, step)

    def at(
        self,
        x: Tensor,
        timesteps: Tensor,
        labels: Tensor | None = None,
        low_res: Tensor | None = None,
    ) -> Tensor:
        def run(network: Network, rows: Tensor) -> Tensor:
            given = [None if value is None else value[rows] for value in (labels, low_res)]
            return network.at(x[rows], timesteps[rows], *given)

        return joined(
            self._splice.at_ends(timesteps),
            lambda rows: run(self._ends, rows),
            lambda rows: run(self._between, rows),
        )


def _spliced_network(spec: NetworkSpec, batch_size: int) -> Network | None:
    splice: Any = spec.model
    if not isinstance(describing(splice), Splice):
        return None
    if type(splice) is not Splice:
        around: str | None = f"is of the class {type(splice).__name__}"
    else:
        around = why_hooked(splice)
    if around is not None:
        kept_of(splice).say(
            f"{spec.who}: the module itself runs, without the engine: the splice {around}"
        )
        return None
    ends, between = (
        _chosen(replace(spec, model=network), batch_size)
        for network in (splice.ends, splice.between)
    )
    return SplicedNetwork(splice, ends, between)

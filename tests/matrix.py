"""Public functions that run a network, changes of a network, and settings of the process, for test_matrix.

`python matrix.py FILE ENTRY ...` writes the expected results of functions for changed networks, computed by
PyTorch's own modules in this fresh process: with all changes for the named functions, with those of
`EVERYWHERE` for the others.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Collection, Iterator
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import iddpm_ext
from iddpm_ext import Diffusion, Splice, UNet, UNetConfig
from iddpm_ext.engines.choosing import PlainNetwork
from iddpm_ext.likelihood.schedules import find_schedules
from iddpm_ext.networks.classifier import Classifier, ClassifierConfig
from iddpm_ext.networks.unet import ResBlock

SIZE, CLASSES = 8, 3


def _filled(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise / p[0].numel() ** 0.5 if p.dim() > 1 else p.round() + 0.1 * noise)
    return model.eval()


def _network(seed: int, **others: Any) -> UNet:
    config = {
        "image_size": SIZE, "in_channels": 1, "out_channels": 2, "model_channels": 32,
        "num_res_blocks": 1, "channel_mult": (1, 1), "attention_resolutions": (4,),
        "num_heads": 2, "num_classes": CLASSES,
    }  # fmt: skip
    model = _filled(UNet(UNetConfig(**{**config, **others})), seed)
    assert isinstance(model, UNet)
    # Predicted from noise, x_0 multiplies the network's rounding by a hundred at the first step.
    model.diffusion = Diffusion("cosine", 40, prediction="x_0")
    return model


@cache
def _base() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 1, SIZE, SIZE, generator=generator).clamp(-1, 1)
    return {
        "network": _network(0),
        "other": _network(1),
        "upsampler": _network(2, super_resolution=True),
        "classifier": _filled(
            Classifier(
                ClassifierConfig(
                    image_size=SIZE, in_channels=1, model_channels=32, num_classes=CLASSES,
                    num_res_blocks=1, channel_mult=(1, 1), attention_resolutions=(4,),
                    num_head_channels=16,
                )
            ),
            3,
        ),
        "images": ((x + 1) * 127.5).round() / 127.5 - 1,
        "noise": torch.randn(2, 1, SIZE, SIZE, generator=generator),
        "weights": torch.tensor([0.25, 0.75], dtype=torch.float64),
        "unet2d": iddpm_ext.to_diffusers(_network(4)),
        "t": torch.tensor([3, 30]),
        "labels": torch.tensor([2, 0]),
    }  # fmt: skip


class Case:
    """A network to change, and the other arguments of the functions."""

    def __init__(self, **engine: Any) -> None:
        self.given, self.engine = _base(), engine
        self.network: Any = copy.deepcopy(self.given["network"])

    def sample(self, model: Any = None, **options: Any) -> Tensor:
        return iddpm_ext.sample(
            self.network if model is None else model,
            options.pop("steps", 2),
            **{
                "labels": self.given["labels"],
                "seed": 5,
                "progress": False,
                **self.engine,
                **options,
            },
        )


def _progressive(case: Case) -> Tensor:
    steps = iddpm_ext.sample_progressive(
        case.network, 2, labels=case.given["labels"], seed=5, progress=False, **case.engine
    )
    return torch.stack([step.x for step in steps])


def _nll(case: Case) -> Tensor:
    found = iddpm_ext.nll(
        case.network, case.given["images"], labels=case.given["labels"], steps=2, progress=False,
        **case.engine,
    )  # fmt: skip
    return found.per_image_bpd


def _steps(case: Case) -> Tensor:
    found = find_schedules(
        case.network, case.given["images"], labels=case.given["labels"], candidates=4, most=3,
        progress=False, **case.engine,
    )  # fmt: skip
    return torch.tensor(list(found.bpd.values()), dtype=torch.float64, device="cpu")


def _invert(case: Case) -> Tensor:
    return iddpm_ext.invert(
        case.network, case.given["images"], 3, labels=case.given["labels"], progress=False,
        **case.engine,
    )  # fmt: skip


def _interpolate(case: Case) -> Tensor:
    between = iddpm_ext.interpolate(*case.given["noise"], case.given["weights"])
    return case.sample(x_T=between, sampler="ddim")


def _evaluate(case: Case) -> Tensor:
    scores = iddpm_ext.evaluate(
        case.network, case.given["noise"].clamp(-1, 1), extractor="pixels", metrics=("kid",), n=2,
        steps=2, resamples=0, cache="", progress=False,
    )  # fmt: skip
    return torch.tensor([scores["kd-pixels-8x8"]], dtype=torch.float64, device="cpu")


def _two_stage(case: Case) -> Tensor:
    both = iddpm_ext.sample_two_stage(
        case.network, case.given["upsampler"], 2, labels=case.given["labels"], progress=False,
        **case.engine,
    )  # fmt: skip
    return both.low_res


def _splice(case: Case) -> Tensor:
    return case.sample(Splice(case.network, case.given["other"], 14, 14), steps=3)


def _classifier(case: Case) -> Tensor:
    return case.sample(cond_fn=iddpm_ext.classifier_gradient(case.given["classifier"], 2.0))


def _training(case: Case) -> Tensor:
    chain = case.network.diffusion
    x = case.given["images"].clone().requires_grad_()
    losses = chain.training_losses(
        case.network, x, case.given["t"], case.given["noise"],
        model_kwargs={"y": case.given["labels"]},
    )["loss"]  # fmt: skip
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    return torch.cat([losses.detach(), gradient.flatten()])


def _diffusers(case: Case) -> Tensor:
    unet = case.given["unet2d"]
    return case.sample(unet, diffusion=case.given["network"].diffusion)


def _accelerate(case: Case) -> Tensor:
    unet, given = case.given["unet2d"], case.given
    x = given["images"].clone().requires_grad_()
    with (
        iddpm_ext.accelerate(unet) if case.engine.get("engine", True) else contextlib.nullcontext()
    ):
        out = unet(x, given["t"], given["labels"]).sample
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
    return torch.cat([out.detach().flatten(), gradient.flatten()])


def _scheduler(case: Case) -> Tensor:
    scheduler = iddpm_ext.IDDPMScheduler.from_diffusion(case.given["network"].diffusion)
    scheduler.set_timesteps(4)
    x = case.given["noise"]
    for t in scheduler.timesteps:
        out = torch.cat([0.5 * x, 0.1 * x], dim=1)
        generator = torch.Generator("cpu").manual_seed(3)
        x = scheduler.step(out, t, x, generator=generator).prev_sample
    return x


#: Functions that take a network, which tests change.
ENTRIES: dict[str, Callable[[Case], Tensor]] = {
    "sample": lambda case: case.sample(),
    "guidance": lambda case: case.sample(guidance_scale=2.0),
    "classifier": _classifier,
    "progressive": _progressive,
    "nll": _nll,
    "steps": _steps,
    "invert": _invert,
    "interpolate": _interpolate,
    "evaluate": _evaluate,
    "two-stage": _two_stage,
    "splice": _splice,
    "training": _training,
}

#: Other functions.
OTHERS: dict[str, Callable[[Case], Tensor]] = {
    "diffusers": _diffusers,
    "accelerate": _accelerate,
    "scheduler": _scheduler,
}

# ---- what is done to a network; a change may return what takes back more than the network's own state


class Adapted(nn.Module):
    """A layer with something added to it, as LoRA does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out = self.layer(*args, **kwargs)
        return out + 0.3 * out.flip(1)


class Subclass(UNet):
    """A network with a forward of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 0.5 * super().forward(*args, **kwargs)


def _assign(m: UNet) -> None:
    m.load_state_dict({k: v * 0.9 for k, v in m.state_dict().items()}, assign=True)


def _parameter(m: UNet) -> None:
    m.out[2].weight = nn.Parameter(m.out[2].weight.detach() * 0.5)


def _submodule(m: UNet) -> None:
    new = copy.deepcopy(m.middle_block[0])
    new.in_layers[2].weight.data.mul_(-1)
    m.middle_block[0] = new


def _ema(m: UNet) -> None:
    for p in m.parameters():
        p.data.mul_(0.9)


def _one_number(m: UNet) -> None:
    m.out[2].bias.data[0] += 0.25


def _data(m: UNet) -> None:
    for p in m.out[2].parameters():
        p.data = p.data * -1


def _strides(m: UNet) -> None:
    m.middle_block[0].in_layers[2].weight.data = (
        m.middle_block[0].in_layers[2].weight.data.transpose(0, 1)
    )


def _channels_last(m: UNet) -> None:
    m.to(memory_format=torch.channels_last)
    m.out[2].weight.data.mul_(-1)


def _frozen(m: UNet) -> None:
    m.requires_grad_(False)
    m.out[2].weight.mul_(-1)
    m.requires_grad_(True)


def _tied(m: UNet) -> None:
    m.middle_block[2].in_layers[2].weight = m.middle_block[0].in_layers[2].weight


def _tied_layers(m: UNet) -> None:
    m.middle_block[2] = m.middle_block[0]


def _layers_of_another(m: UNet) -> None:
    m.middle_block = copy.deepcopy(_base()["other"]).middle_block


def _time_embedding(m: UNet) -> None:
    m.time_embed[2].weight.data.mul_(-1)


def _labels(m: UNet) -> None:
    m.label_emb.weight.data.mul_(-1)


def _hook(m: UNet) -> None:
    m.middle_block[0].register_forward_hook(lambda module, args, out: 2 * out)


def _pre_hook(m: UNet) -> None:
    m.out[2].register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


def _hook_of_time(m: UNet) -> None:
    m.time_embed[2].register_forward_hook(lambda module, args, out: -out)


def _hook_of_qkv(m: UNet) -> None:
    m.middle_block[1].qkv.register_forward_hook(lambda module, args, out: -2 * out)


def _global_hook(m: UNet) -> Callable[[], None]:
    def halve(module: nn.Module, args: Any, out: Any) -> Any:
        return out * 0.5 if isinstance(module, ResBlock) else None

    return nn.modules.module.register_module_forward_hook(halve).remove


def _forward(m: UNet) -> None:
    block = m.middle_block[0]
    own = block.forward
    block.forward = types.MethodType(lambda self, x, emb: -own(x, emb), block)  # type: ignore[method-assign]


def _class_forward(m: UNet) -> Callable[[], None]:
    own = ResBlock.forward
    ResBlock.forward = lambda self, x, emb: 0.5 * own(self, x, emb)  # type: ignore[method-assign]

    def undo() -> None:
        ResBlock.forward = own  # type: ignore[method-assign]

    return undo


def _subclass(m: UNet) -> None:
    m.__class__ = Subclass


def _lora(m: UNet) -> None:
    m.out[2] = Adapted(m.out[2])


def _lora_of_time(m: UNet) -> None:
    m.time_embed[0] = Adapted(m.time_embed[0])


def _lora_of_first(m: UNet) -> None:
    m.input_blocks[0][0] = Adapted(m.input_blocks[0][0])  # type: ignore[index, operator]


def _lora_of_upsampling(m: UNet) -> None:
    for block in m.output_blocks:
        for layer in block:  # type: ignore[union-attr]
            if hasattr(layer, "conv"):
                layer.conv = Adapted(layer.conv)


def _lora_of_qkv(m: UNet) -> None:
    m.middle_block[1].qkv = Adapted(m.middle_block[1].qkv)


def _more_layers(m: UNet) -> None:
    m.middle_block.append(nn.Tanh())


def _weight_norm(m: UNet) -> None:
    conv = nn.utils.parametrizations.weight_norm(m.middle_block[0].in_layers[2])
    conv.parametrizations.weight.original0.data.mul_(-1)


def _spectral_norm(m: UNet) -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(9)
        nn.utils.parametrizations.spectral_norm(m.out[2])
    m.eval()


def _pruned(m: UNet) -> None:
    from torch.nn.utils import prune

    m.out[2].weight.data = m.out[2].weight.data.contiguous()  # the only layout that is pruned
    prune.l1_unstructured(m.out[2], "weight", amount=0.5)


def _other_layer(m: UNet) -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(9)
        m.out[2] = nn.Conv2d(32, 2, 3, padding=1)


def _old_weight_norm(m: UNet) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(m.time_embed[2]).weight_g.data.mul_(-1)


def _compiled_part(m: UNet) -> None:
    m.middle_block[0] = torch.compile(m.middle_block[0], backend="eager")
    m.middle_block[0].in_layers[2].weight.data.mul_(-1)


def _quantised(m: UNet) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m.time_embed = torch.ao.quantization.quantize_dynamic(m.time_embed, {nn.Linear})
    m.out[2].weight.data.mul_(-1)


def _buffer(m: UNet) -> None:
    m.register_buffer("steps_trained", torch.zeros(1, dtype=torch.float32, device="cpu"))
    m.out[2].weight.data.mul_(-1)


def _epsilon(m: UNet) -> None:
    m.out[0].eps = 10.0


def _training_mode(m: UNet) -> None:
    m.train()
    m.out[2].weight.data.mul_(-1)


CHANGES: dict[str, Callable[[UNet], Callable[[], None] | None]] = {
    "nothing": lambda m: None,
    "assigned": _assign,
    "parameter": _parameter,
    "submodule": _submodule,
    "averaged": _ema,
    "one number": _one_number,
    "data replaced": _data,
    "strides": _strides,
    "channels last": _channels_last,
    "frozen": _frozen,
    "tied": _tied,
    "tied layers": _tied_layers,
    "layers of another": _layers_of_another,
    "time embedding": _time_embedding,
    "label embedding": _labels,
    "training mode": _training_mode,
    "hook": _hook,
    "pre-hook": _pre_hook,
    "hook of time": _hook_of_time,
    "hook of qkv": _hook_of_qkv,
    "global hook": _global_hook,
    "forward": _forward,
    "class's forward": _class_forward,
    "subclass": _subclass,
    "lora": _lora,
    "lora of time": _lora_of_time,
    "lora of first": _lora_of_first,
    "lora of upsampling": _lora_of_upsampling,
    "lora of qkv": _lora_of_qkv,
    "other layer": _other_layer,
    "more layers": _more_layers,
    "weight norm": _weight_norm,
    "old weight norm": _old_weight_norm,
    "spectral norm": _spectral_norm,
    "pruned": _pruned,
    "compiled part": _compiled_part,
    "quantised": _quantised,
    "buffer": _buffer,
    "epsilon": _epsilon,
}  # fmt: skip

#: One change of each kind, for every function. All changes are found by one function, tested by `sample`.
EVERYWHERE = ("nothing", "averaged", "submodule", "hook of time", "lora")

#: Changes that the engine supports; with all others the module runs, and a warning names the first layer.
FOLLOWED = {
    "nothing", "assigned", "parameter", "submodule", "averaged", "one number", "data replaced",
    "strides", "channels last", "frozen", "tied", "tied layers", "layers of another", "time embedding",
    "label embedding", "training mode",
}  # fmt: skip


# ---- settings: a context manager, or a way to call a function


def _default_dtype(dtype: torch.dtype) -> Callable[[], contextlib.AbstractContextManager[None]]:
    @contextlib.contextmanager
    def setting() -> Iterator[None]:
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    return setting


@contextlib.contextmanager
def _default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _no_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "float16 by default": _default_dtype(torch.float16),
    "bfloat16 by default": _default_dtype(torch.bfloat16),
    "float64 by default": _default_dtype(torch.float64),
    "meta by default": _default_device,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic": _deterministic,
    "two threads": _two_threads,
    "no denormals": _no_denormals,
}


def in_a_thread(call: Callable[[], Tensor]) -> Tensor:
    """The result of a call in a thread of its own."""
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def in_a_fork(call: Callable[[], Tensor]) -> Tensor:
    """The result of a call in a forked process."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "result.pt")
        child = os.fork()
        if not child:
            status = 1
            try:
                torch.save(call(), path)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        assert status == 0, f"the forked process ended with {status}"
        return torch.load(path)


COPIES: dict[str, Callable[[UNet], UNet]] = {
    "deep copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


def expected(whole: Collection[str]) -> dict[tuple[str, str], Tensor]:
    """By (change, entry); all changes of the entries in `whole`."""
    results = {}
    with mock.patch("iddpm_ext.sampling.loop.choose_network", lambda spec, _: PlainNetwork(spec)):
        for change, apply in CHANGES.items():
            for entry, call in ENTRIES.items():
                if entry not in whole and change not in EVERYWHERE:
                    continue
                case = Case(engine=False)
                undo = apply(case.network)
                try:
                    results[change, entry] = call(case).detach().clone()
                finally:
                    if undo is not None:
                        undo()
        for entry, call in OTHERS.items():
            results["nothing", entry] = call(Case(engine=False)).detach().clone()
    return results


def here_and_in_a_fork(entry: str) -> tuple[Tensor, Tensor]:
    """A function's result in this process, and in a forked one with one thread.

    PyTorch, which it calls directly, would wait forever for OpenMP's threads, which a fork loses.
    """
    case = Case()

    def alone() -> Tensor:
        torch.set_num_threads(1)
        return (ENTRIES | OTHERS)[entry](case).detach().clone()

    return (ENTRIES | OTHERS)[entry](case).detach().clone(), in_a_fork(alone)


if __name__ == "__main__":
    if sys.argv[2] == "--forked":
        torch.save(here_and_in_a_fork(sys.argv[3]), sys.argv[1])
    else:
        torch.set_num_threads(1)
        torch.save(expected(sys.argv[2:]), sys.argv[1])

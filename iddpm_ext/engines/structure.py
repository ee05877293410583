"""Whether a network computes exactly what its configuration describes.

An engine reads weights and assumes what layers do with them. Whatever makes a module compute something
else (hooks, wrappers, replaced layers or methods, other settings) is found here; such a module is then
run itself, without an engine.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from iddpm_ext import _native
from iddpm_ext.networks.config import UNetConfig
from iddpm_ext.networks.foreign import unwrapped
from iddpm_ext.networks.unet import FORWARDS, UNet

# Attributes of modules that do not change what is computed in evaluation mode (p is dropout's).
_IGNORED = frozenset({"training", "backend", "config", "extra", "gradient_checkpointing", "p"})
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


class Structure:
    """The modules and parameters of a network that was found to match its configuration.

    `holds` finds out in some 0.05 ms whether it still does, by comparing references alone.
    """

    def __init__(self, model: UNet) -> None:
        self._modules = list(model.modules())
        self._types = list(map(type, self._modules))
        self.parameters = [
            p for module in self._modules for p in module._parameters.values() if p is not None
        ]
        self._entries = Entries(
            cast(dict[Any, Any], table)
            for module in self._modules
            for table in (
                module.__dict__,
                module._modules,
                module._parameters,
                module._buffers,
                module._forward_hooks,
                module._forward_pre_hooks,
            )
        )

    def holds(self, model: UNet) -> bool:
        """Whether nothing but the content of the parameters has changed since.

        False for a shallow copy of the model, which shares its layers but may have another method.
        """
        return (
            self._modules[0] is model
            and list(map(type, self._modules)) == self._types
            and self._entries.hold()
            and not _everywhere()
        )


class Entries:
    """What dictionaries hold at one moment, none of which has a dictionary as a key."""

    def __init__(self, tables: Iterable[dict[Any, Any]]) -> None:
        self._tables = list(tables)
        self._then = _flat(self._tables)

    def hold(self) -> bool:
        """Whether each has the same keys in the same order for the same objects, by identity."""
        if _native.cpu_absence() is None:
            return _native.native().entries_hold(self._then)
        now = _flat(self._tables)
        return len(now) == len(self._then) and all(map(operator.is_, now, self._then))


def _flat(tables: list[dict[Any, Any]]) -> list[Any]:
    """Every dictionary, followed by its keys and values in turn."""
    return [part for table in tables for part in (table, *chain.from_iterable(table.items()))]


def why_more(model: nn.Module) -> str | None:
    """None if a `UNet` matches its configuration, else what differs, naming the layer."""
    if type(model) is not UNet:
        return f"the network is of the class {type(model).__name__} instead of UNet"
    everywhere = _everywhere()
    return everywhere or _difference("", model, _expected(model.config))


def weights_alone(who: str, model: object) -> UNet:
    """The network inside PyTorch's wrappers, for a function that takes no more than its weights along.

    Raises TypeError if there is no `UNet`, ValueError if it is more than its configuration says.
    """
    inside = unwrapped(model)
    if not isinstance(inside, UNet):
        raise TypeError(f"{who}: model must be a UNet, got {type(inside).__name__}")
    more = why_more(inside)
    if more is not None:
        raise ValueError(
            f"{who}: model must be what its configuration says, as its weights alone are taken, "
            f"got one where {more}"
        )
    return inside


def why_hooked(model: nn.Module) -> str | None:
    """None if calling the module runs its class's `forward` alone, else why not; ignores its children."""
    if "forward" in model.__dict__:
        return "has a forward of its own"
    if model._forward_hooks or model._forward_pre_hooks:
        return "has forward hooks"
    if getattr(model, "_compiled_call_impl", None) is not None:
        return "was compiled in place"
    return None


def has_global_hooks() -> bool:
    """Whether global hooks run around the forward of every module."""
    return any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)


def _everywhere() -> str | None:
    if has_global_hooks():
        return "all modules have a global forward hook"
    for kind, forward in FORWARDS.items():
        if kind.forward is not forward:
            return f"the class {kind.__name__} has another forward"
    return None


@dataclass(frozen=True)
class _Module:
    """What a module must look like to match the configuration."""

    kind: type
    children: Mapping[str, _Module]
    shapes: Mapping[str, torch.Size]
    settings: Mapping[str, Any]


@lru_cache(maxsize=8)
def _expected(config: UNetConfig) -> _Module:
    with torch.device("meta"):
        return _described(UNet(config))


def _described(module: nn.Module) -> _Module:
    return _Module(
        type(module),
        {name: _described(child) for name, child in module.named_children()},
        {name: p.shape for name, p in module._parameters.items() if p is not None},
        _settings(module),
    )


def _settings(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in module.__dict__.items()
        if not name.startswith("_") and name not in _IGNORED
    }


def _difference(path: str, module: Any, expected: _Module) -> str | None:
    name = path or "the network"
    kind: type = type(module)
    if kind is not expected.kind:
        known = expected.kind.__name__
        got = kind.__name__ if kind.__name__ != known else f"{kind.__module__}.{known}"
        return f"{name} is of the class {got} instead of {known}"
    around = why_hooked(module)
    if around is not None:
        return f"{name} {around}"
    for attribute, value in module.__dict__.items():
        if attribute not in _IGNORED and callable(getattr(expected.kind, attribute, None)):
            return f"{name} has a {attribute} of its own"
        wanted = expected.settings.get(attribute, value)
        if value is not wanted and value != wanted:
            return f"{name} has {attribute}={value!r} instead of {wanted!r}"
    if module._buffers:
        return f"{name} has a buffer, {next(iter(module._buffers))}"
    if list(module._parameters) != list(expected.shapes):
        return _other_names(name, "parameters", module._parameters, expected.shapes)
    for key, parameter in module._parameters.items():
        if type(parameter) not in (nn.Parameter, Tensor) or parameter.layout != torch.strided:
            return f"{name}.{key} is a {type(parameter).__name__}"
        if parameter.shape != expected.shapes[key]:
            shapes = f"{list(parameter.shape)} instead of {list(expected.shapes[key])}"
            return f"{name}.{key} is {shapes}"
    if list(module._modules) != list(expected.children):
        return _other_names(name, "layers", module._modules, expected.children)
    for key, child in module._modules.items():
        found = _difference(f"{path}.{key}" if path else key, child, expected.children[key])
        if found is not None:
            return found
    return None


def _other_names(name: str, what: str, got: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    added = [key for key in got if key not in wanted] or list(got)
    return f"{name} has other {what}: {', '.join(added) or 'none'}"

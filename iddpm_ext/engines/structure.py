"""Whether a network computes exactly what its configuration describes.

An engine reads weights and assumes what layers do with them. Whatever makes a module compute something
else (hooks, wrappers, replaced layers or methods, other settings) is found here; such a module is then
run itself, without an engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from iddpm_ext.networks.config import UNetConfig
from iddpm_ext.networks.unet import FORWARDS, UNet

# Attributes of modules that do not change what is computed in evaluation mode (p is dropout's).
_IGNORED = frozenset({"training", "backend", "config", "extra", "gradient_checkpointing", "p"})
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


class Structure:
    """The modules and parameters of a network that was found to match its configuration.

    `holds` finds out in some 0.1 ms whether it still does, by comparing references alone.
    """

    def __init__(self, model: UNet) -> None:
        modules = list(model.modules())
        self._modules = modules
        self._types = list(map(type, modules))
        self._own = [module.__dict__ for module in modules]
        self._own_then = [dict(own) for own in self._own]
        self._children = [module._modules for module in modules]
        self._children_then = [dict(children) for children in self._children]
        self._tables = [module._parameters for module in modules if module._parameters]
        self.parameters = [p for table in self._tables for p in table.values() if p is not None]
        self._hooks = [
            added
            for module in modules
            for added in (module._forward_hooks, module._forward_pre_hooks, module._buffers)
        ]

    def holds(self, model: UNet) -> bool:
        """Whether nothing but the content of the parameters has changed since.

        False for a shallow copy of the model, which shares its layers but may have another method.
        """
        if self._modules[0] is not model:
            return False
        now = [p for table in self._tables for p in table.values()]
        try:
            return (
                list(map(type, self._modules)) == self._types
                and self._children == self._children_then
                and list(map(id, now)) == list(map(id, self.parameters))
                and self._own == self._own_then
                and not any(self._hooks)
                and not _everywhere()
            )
        except (RuntimeError, TypeError, ValueError):  # attributes that are tensors or arrays
            return False


def why_more(model: nn.Module) -> str | None:
    """None if a `UNet` matches its configuration, else what differs, naming the layer."""
    if type(model) is not UNet:
        return f"the network is of the class {type(model).__name__}, which no engine knows"
    everywhere = _everywhere()
    return everywhere or _difference("", model, _expected(model.config))


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

"""The arguments of one call of `nll`, checked in full before any work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iddpm_ext.data import match_classes
from iddpm_ext.diffusion import Diffusion
from iddpm_ext.engines.spec import (
    NetworkSpec,
    Steps,
    batch_size_of,
    check_flags,
    check_seed,
    count_of,
    default_batch_size,
    describing,
)
from iddpm_ext.likelihood.images import Data, Images, read_images
from iddpm_ext.networks.config import UNetConfig
from iddpm_ext.networks.splice import Splice
from iddpm_ext.networks.unet import UNet
from iddpm_ext.sampling.request import network_spec
from iddpm_ext.sampling.variance import with_variance
from iddpm_ext.scalars import plain

METHODS = ("bound", "full", "information", "ode")
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class LikelihoodRequest:
    """The arguments of `nll`, resolved.

    spec: the network, its chain and its inputs. x_0: float32 [N, C, H, W] on the CPU. batch_size: evaluations
    at once, at most. All else as in `nll`.
    """

    spec: NetworkSpec
    x_0: Tensor
    batch_size: int
    budget: float | None
    exact: bool
    clip: bool
    seed: int
    progress: bool
    method: str = "bound"
    tolerance: float = 1e-4

    def fingerprint(self, more: str = "") -> str:
        """sha256 of everything that the result depends on; not of batches and processes.

        more: text of what the caller adds.
        """
        spec, digest = self.spec, hashlib.sha256()
        facts = {
            "format": _FORMAT,
            "diffusion": spec.diffusion.to_dict(),
            "budget": self.budget,
            "more": more,
            "method": [self.method, self.tolerance],
            "exact": self.exact,
            "clip": self.clip,
            "seed": self.seed,
            "dtype": str(spec.dtype),
            "engine": spec.engine,
            "backend": spec.backend,
            "model": _describe(spec.model),
        }
        digest.update(json.dumps(facts, sort_keys=True).encode())
        state = spec.model.state_dict() if isinstance(spec.model, nn.Module) else {}
        tensors = {
            **state,
            " x_0": self.x_0,
            " labels": spec.labels,
            " low_res": spec.low_res,
        }
        for name, tensor in tensors.items():
            digest.update(name.encode())
            if tensor is not None:
                digest.update(repr((tensor.dtype, tensor.shape)).encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _describe(model: object) -> str:
    """What identifies a model besides its weights; for foreign models the name of its class alone."""
    kind = type(model)
    name = getattr(model, "__qualname__", kind.__qualname__)
    return f"{kind.__module__}.{name} {getattr(model, 'config', '')}"


def make_likelihood_request(
    model: Callable[..., Tensor],
    data: Data,
    *,
    labels: Sequence[int] | Tensor | None,
    low_res: Tensor | None,
    budget: float | None,
    steps: Steps,
    clip: bool,
    exact: bool,
    batch_size: int | None,
    seed: int,
    split: str,
    limit: int | None,
    diffusion: Diffusion | None,
    dtype: torch.dtype | None,
    engine: bool,
    backend: str,
    progress: bool,
    who: str = "nll",
    shuffle: bool = False,
    variance: str | None = None,
    method: str = "bound",
    tolerance: float = 1e-4,
) -> LikelihoodRequest:
    """Checks the arguments of `nll` and reads the images.

    who: the function that errors name. shuffle: `limit` images of opened data are a random choice.

    Raises ValueError, TypeError or RuntimeError as `nll` documents.
    """
    budget, tolerance, limit, batch_size, seed = plain((budget, tolerance, limit, batch_size, seed))
    _check_method(who, method, tolerance, budget)
    number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if budget is not None and not (number and budget >= 1 and budget < float("inf")):
        raise ValueError(
            f"{who}: budget must be at least 1 evaluation per image, or None for every step, "
            f"got {budget!r}"
        )
    if not isinstance(exact, bool):
        raise TypeError(f"{who}: exact must be True or False, got {exact!r}")
    ours = describing(model)
    config = None if ours is None else ours.config
    size = None if config is None else config.image_size
    images = read_images(data, who=who, split=split, limit=limit, size=size, shuffle=shuffle)
    shape = list(images.x_0.shape[1:])
    if config is not None and shape != [config.in_channels, *config.size]:
        height, width = config.size
        raise ValueError(
            f"{who}: data must be [N, {config.in_channels}, {height}, {width}] for this model, "
            f"got {list(images.x_0.shape)}"
        )
    if budget is not None and budget < 2 and len(images.x_0) == 1:
        raise ValueError(
            f"{who}: budget must be at least 2 for a single image, to estimate the error, got {budget}"
        )
    labels = _labels(who, ours, config, images, labels)
    check_flags(who, clip=clip, progress=progress)
    check_seed(who, seed)
    spec = network_spec(
        who, model, steps, diffusion=diffusion, image_shape=shape, dtype=dtype, engine=engine,
        exact=False, backend=backend, labels=labels, low_res=low_res,
    )  # fmt: skip
    spec = with_variance(spec, variance, sampling=False)
    n = len(images.x_0)
    count_of(who, n, n, labels=spec.labels, low_res=low_res)
    if batch_size is None:  # can exceed the number of images, each of which is evaluated many times
        batch_size = default_batch_size(spec.image_shape, spec.device)
    else:
        batch_size_of(who, batch_size, n, spec.image_shape, spec.device)
    return LikelihoodRequest(
        spec=spec,
        x_0=images.x_0,
        batch_size=batch_size,
        budget=budget,
        exact=exact,
        clip=clip,
        seed=seed,
        progress=progress,
        method=method,
        tolerance=float(tolerance),
    )


def _check_method(who: str, method: str, tolerance: float, budget: float | None) -> None:
    if method not in METHODS:
        raise ValueError(f"{who}: method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "full" and budget is not None:
        raise ValueError(f"{who}: budget must be None with method 'full', got {budget!r}")
    number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if not number or not 0 < tolerance < 1:
        raise ValueError(f"{who}: tolerance must be above 0 and below 1, got {tolerance!r}")


def _labels(
    who: str,
    ours: UNet | Splice | None,
    config: UNetConfig | None,
    images: Images,
    labels: Sequence[int] | Tensor | None,
) -> Sequence[int] | Tensor | None:
    """The given labels, else the data's, matched to the network's classes by their names."""
    if labels is not None:
        return labels
    classes = None if config is None else config.num_classes
    if classes is None:
        return None
    if images.labels is None:
        raise ValueError(
            f"{who}: labels must be given for a model of {classes} classes (-1 for unlabelled images), "
            f"as the data has none, got None"
        )
    names = (getattr(ours, "extra", None) or {}).get("class_names")
    own = images.class_names or ()
    return match_classes(who, own, images.used, names, classes)[images.labels]

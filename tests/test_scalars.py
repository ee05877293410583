"""NumPy's scalars are numbers in every public function that takes one."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import iddpm_ext
from iddpm_ext import (
    Diffusion,
    UNet,
    UNetConfig,
    checkpoint,
    data,
    diffusion,
    evaluation,
    likelihood,
    metrics,
    ops,
    random,
    report,
    sampling,
    training,
)
from iddpm_ext.scalars import plain
from iddpm_ext.training.averages import store

MODULES = [iddpm_ext, checkpoint, data, diffusion, evaluation, likelihood, metrics, ops, random, report,
           sampling, training]  # fmt: skip
Convert = Callable[[Any], Any]
SHAPE: dict[str, Any] = {"image_size": 8, "in_channels": 1, "model_channels": 32, "num_res_blocks": 1,
                         "channel_mult": (1,), "attention_resolutions": (8,), "num_heads": 2}  # fmt: skip
# What has numbers in its signature and is not called with a user's: results, and what the package hands on.
RESULTS = set(
    "SampleStep PictureSchedules Likelihood StepSchedules Evaluation Score FeatureStatistics InceptionScore "
    "Interval KernelDistance PrecisionRecall DataReport HybridLoss OpSpec FileData FileData.label ArrayData "
    "CachedData batches match_classes UniformTimestepSampler.update LossSecondMomentSampler.update "
    "TimestepSampler.update LogNormalTimestepSampler.update UNetConfig.channels UNetConfig.heads "
    "UNetConfig.has_attention philox_4x32 IDDPMUNet2DModel IDDPMUNet2DModel.forward".split()
)
# Takes minutes, or is what another one here begins with.
LONG = {"write_report", "tune", "export_program"}


@cache
def model() -> UNet:
    torch.manual_seed(0)
    network = UNet(UNetConfig(**SHAPE, out_channels=2, num_classes=3))
    torch.nn.init.normal_(network.out[2].weight, std=0.02)
    network.diffusion = Diffusion("cosine", 100)
    return network.eval()


@cache
def images() -> Tensor:
    levels = torch.randint(0, 256, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    return levels / 127.5 - 1


@cache
def features() -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(40, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))  # type: ignore[return-value]


def written(path: Any) -> bytes:
    return path.read_bytes()


def scheduler(n: Convert, **more: Any) -> Any:
    return iddpm_ext.IDDPMScheduler(
        n(100), "linear", n(0.0078125), n(0.25), sampler="ddim", eta=n(0.5),
        extrapolation_limit=n(0.5), **more,
    )  # fmt: skip


def walked(n: Convert) -> Any:
    made = scheduler(n)
    made.set_timesteps(n(4))
    generator = torch.Generator().manual_seed(0)
    made.step(images(), n(int(made.timesteps[1])), images(), eta=n(0.25), generator=generator)
    before = int(made.previous_timestep(n(int(made.timesteps[1]))))
    made.set_timesteps(timesteps=[n(50), n(0)])
    return made.timesteps, before, made.to_json_string()


def adamw(n: Convert) -> Any:
    p, g, m, v, e = (torch.full((3,), 0.5) for _ in range(5))
    ops.adamw_ema([p], [g], [m], [v], [[e]], step=n(2), lr=n(0.5), betas=(n(0.5), n(0.25)), eps=n(0.5),
                  weight_decay=n(0.25), decays=[n(0.5)])  # fmt: skip
    return p, e


def hybrid(n: Convert) -> Any:
    process, x, t = Diffusion("cosine", 100), images(), torch.tensor([3, 50])
    return ops.hybrid_loss(
        torch.cat([x, x], 1), x, x, x, t, process.table(), vlb_weight=n(0.5)
    ).loss


def losses(n: Convert) -> Any:
    noise, t = torch.ones_like(images()), torch.tensor([3, 50])
    process = Diffusion("cosine", 100)
    return process.training_losses(
        model(), images(), t, noise, vlb_weight=n(0.5), min_snr=n(5),
        model_kwargs={"y": torch.tensor([0, 1])},
    )["loss"]  # fmt: skip


def reversed_step(n: Convert) -> Any:
    process, t = Diffusion("cosine", 100), torch.tensor([3, 50])
    out = torch.cat([images(), images()], 1)
    return process.reverse_step(out, images(), t, images(), sampler="ddim", eta=n(0.5))


def stages(n: Convert) -> Any:
    torch.manual_seed(1)
    up = UNet(UNetConfig(**{**SHAPE, "image_size": 16, "in_channels": 1}, out_channels=2,
                         super_resolution=True)).eval()  # fmt: skip
    up.diffusion = Diffusion("cosine", 100)
    return sampling.sample_two_stage(
        model(), up, steps=n(2), upsampler_steps=n(2), n=n(2), seed=n(3), batch_size=n(2),
        labels=[n(0), n(1)], guidance_scale=n(1.5),
    )  # fmt: skip


def compared(n: Convert, folder: Any) -> Any:
    found = evaluation.evaluate(
        images(), images().flip(-1).repeat(2, 1, 1, 1), extractor=lambda x: x.flatten(1).float(),
        metrics=["precision_recall"], neighbours=[n(1)], n=n(2), reference_n=n(3), resamples=n(0),
        batch_size=n(2), cache="", seed=n(3), progress=False,
    )  # fmt: skip
    return found.scores


def exported(n: Convert, folder: Any) -> Any:
    pytest.importorskip("onnxscript")
    target = folder / "x.onnx"
    iddpm_ext.export_onnx(model(), target, image_size=n(8))
    return target.is_file()


def read(n: Convert, folder: Any) -> Any:
    np.save(folder / "x.npy", np.arange(256, dtype=np.uint8).reshape(4, 8, 8))
    opened = data.open_data(
        folder / "x.npy", image_size=n(4), channels=n(1), value_range=(n(0), n(255))
    )
    return opened.image_shape, opened.images(torch.arange(2))[0]


def checked(n: Convert, folder: Any) -> Any:
    np.save(folder / "x.npy", np.arange(256, dtype=np.uint8).reshape(4, 8, 8))
    return str(data.check_data(folder / "x.npy", value_range=(n(0), n(255))))


def averaged(n: Convert, folder: Any) -> Any:
    extra = json.dumps({"images": 8, "step": 4, "sigma_rel": 0.05, "ema_gamma": 0.0})
    for width in (0.05, 0.1):
        store(folder, 4, width, {"x": torch.full((2,), width)}, {"extra": extra})
    target = folder / "x.safetensors"
    fit = training.reconstruct_average(folder, target, n(0.0625), n(4))
    return fit.weights, written(target)


def painted(n: Convert, draw: Callable[..., Any]) -> Any:
    return draw(
        model(),
        n(4),
        x_0=images(),
        mask=torch.ones(1, 1, 8, 8),
        strength=n(0.5),
        repaint=n(2),
        **GUIDE,
    )


PROCESS = Diffusion("cosine", 100)
EDM = Diffusion("karras", 10, prediction="edm")
GUIDE: dict[str, Any] = {"labels": [0, 1], "progress": False}

# Name -> a call with every number through `n`. With the folder, where a file is written.
CALLS: dict[str, Callable[..., Any]] = {
    "UNetConfig": lambda n: json.dumps(
        UNetConfig(**plain_through(n, SHAPE), out_channels=n(2), num_classes=n(3), dropout=n(0.5)).to_dict()
    ),
    "ClassifierConfig": lambda n: json.dumps(
        iddpm_ext.ClassifierConfig(
            **plain_through(n, SHAPE), num_classes=n(3), num_head_channels=n(16), dropout=n(0.5)
        ).to_dict()
    ),
    "TrainConfig": lambda n: json.dumps(
        training.TrainConfig(
            data="x", out="y", steps=n(10), batch_size=n(4), lr=n(0.5), ema=(n(0.5),), seed=n(3),
            channel_mult=(n(1), n(2)), value_range=(n(0), n(1)), grad_clip=n(1.5), image_size=n(8),
        ).to_dict()
    ),
    "Diffusion": lambda n: json.dumps(
        [Diffusion("cosine", n(100)).to_dict(), Diffusion(prediction="edm", sigma_data=n(0.25)).to_dict()]
    ),
    "Diffusion.model_input": lambda n: EDM.model_input(images(), n(3)),
    "Diffusion.respace": lambda n: [
        PROCESS.respace(n(10)).timesteps, PROCESS.respace([n(1), n(9)]).timesteps
    ],
    "Diffusion.table": lambda n: PROCESS.table(sampler="ddim", eta=n(0.5)),
    "Diffusion.reverse_step": reversed_step,
    "Diffusion.training_losses": losses,
    "IDDPMScheduler": lambda n: scheduler(n, trained_betas=[n(0.25), n(0.5)]).to_json_string(),
    "IDDPMScheduler.set_timesteps": walked,
    "IDDPMScheduler.step": walked,
    "IDDPMScheduler.previous_timestep": walked,
    "Splice": lambda n: vars(iddpm_ext.Splice(model(), model(), low=n(2), high=n(3)))["high"],
    "classifier_gradient": lambda n: iddpm_ext.classifier_gradient(
        lambda x, t: x.flatten(1)[:, :3], scale=n(1.5)
    )(images(), torch.zeros(2), y=torch.tensor([0, 1])),
    "evaluate": compared,
    "export_onnx": exported,
    "invert": lambda n: sampling.invert(
        model(), images(), n(4), refinements=n(1), guidance_scale=n(1.5), batch_size=n(2), **GUIDE
    ),
    "nll": lambda n: likelihood.nll(
        model(), images(), budget=n(4), steps=n(10), batch_size=n(2), seed=n(3), limit=n(2),
        tolerance=n(0.5), **GUIDE,
    ).bpd,
    "EDMDenoiser": lambda n: iddpm_ext.EDMDenoiser(lambda x, sigma: x / 2, sigma_data=n(0.25))(
        images(), torch.zeros(2)
    ),
    "sample": lambda n: [
        sampling.sample(
            model(), n(4), n=n(2), sampler="ddim", eta=n(0.5), guidance_scale=n(1.5), seed=n(3),
            batch_size=n(2), image_shape=(n(1), n(8), n(8)), **GUIDE,
        ),
        painted(n, sampling.sample),
    ],
    "sample_progressive": lambda n: [
        step.x for step in sampling.sample_progressive(
            model(), n(3), n=n(2), sampler="ddim", eta=n(0.5), guidance_scale=n(1.5), seed=n(3),
            batch_size=n(2), image_shape=(n(1), n(8), n(8)), **GUIDE,
        )
    ],
    "sample_two_stage": stages,
    "save_images": lambda n, folder: written(
        iddpm_ext.save_images(
            images(), folder / "x.png", labels=[n(0), n(1)], columns=n(2), scale=n(2),
            recipe={"seed": n(3), "eta": n(0.5), "steps": [n(1), n(2)]},
        )
    ),
    "save_animation": lambda n, folder: written(
        iddpm_ext.save_animation(
            [images(), -images()], folder / "x.gif", columns=n(2), scale=n(2), frame_ms=n(40), last_ms=n(80),
            recipe={"seed": n(3)},
        )
    ),
    "find_picture_schedules": lambda n: sampling.find_picture_schedules(
        model(), n=n(2), candidates=n(6), most=n(3), seed=n(3), batch_size=n(2),
        image_shape=(n(1), n(8), n(8)), **GUIDE,
    ).to_extra(),
    "find_schedules": lambda n: likelihood.find_schedules(
        model(), images(), limit=n(2), candidates=n(6), most=n(3), batch_size=n(2), seed=n(3), **GUIDE
    ).to_extra(),
    "find_covariance": lambda n: likelihood.find_covariance(
        model(), images(), limit=n(2), updates=n(2), seed=n(3), **GUIDE
    ).to_extra(""),
    "reconstruct_average": averaged,
    "Neighbourhoods": lambda n: metrics.Neighbourhoods(features()[0], n(2)).contain(features()[1]),
    "precision_recall": lambda n: metrics.precision_recall(*features(), n(2)),
    "kernel_distance": lambda n: metrics.kernel_distance(
        *features(), subsets=n(3), subset_size=n(20), seed=n(3)
    ),
    "inception_score": lambda n: metrics.inception_score(
        features()[0].softmax(1), splits=n(2), seed=n(3)
    ),
    "half_sample_interval": lambda n: metrics.half_sample_interval(
        n(0.5), n(40), lambda chosen: float(chosen.double().mean()), resamples=n(4), seed=n(3)
    ),
    "Order": lambda n: data.Order(n(5), n(3)).at(torch.arange(10)),
    "open_data": read,
    "check_data": checked,
    "adamw_ema": adamw,
    "group_norm_silu": lambda n: ops.group_norm_silu(
        torch.ones(1, 4, 2, 2), n(2), torch.ones(4), torch.zeros(4), eps=n(0.5)
    ),
    "qkv_attention": lambda n: ops.qkv_attention(torch.ones(1, 12, 3), n(2)),
    "hybrid_loss": hybrid,
    "UniformTimestepSampler": lambda n: drawn(
        diffusion.UniformTimestepSampler(n(100), seed=n(3))
    ),
    "LossSecondMomentSampler": lambda n: drawn(
        diffusion.LossSecondMomentSampler(n(100), seed=n(3), history=n(2), uniform_prob=n(0.5))
    ),
    "LogNormalTimestepSampler": lambda n: drawn(
        diffusion.LogNormalTimestepSampler(PROCESS.alphas_cumprod, seed=n(3), mean=n(-1.5), deviation=n(0.5))
    ),
    "make_timestep_sampler": lambda n: drawn(
        diffusion.make_timestep_sampler("uniform", n(100), seed=n(3))
    ),
    "betas_for_alpha_bar": lambda n: diffusion.betas_for_alpha_bar(
        n(10), lambda u: 1 - u, max_beta=n(0.75)
    ),
    "cosine_beta_schedule": lambda n: diffusion.cosine_beta_schedule(n(10), s=n(0.5), max_beta=n(0.75)),
    "karras_beta_schedule": lambda n: diffusion.karras_beta_schedule(
        n(10), sigma_min=n(0.0078125), sigma_max=n(64.5), rho=n(5.5)
    ),
    "linear_beta_schedule": lambda n: diffusion.linear_beta_schedule(n(50)),
    "sigmoid_beta_schedule": lambda n: diffusion.sigmoid_beta_schedule(
        n(10), start=n(-2.5), end=n(2.5), max_beta=n(0.75)
    ),
    "space_timesteps": lambda n: diffusion.space_timesteps(n(100), n(7)),
    "NoiseKey": lambda n: random.normal(
        random.NoiseKey(n(3), n(1), torch.arange(2), n(4), n(5)), (2, 3)
    ),
    "words": lambda n: noise(random.words, n),
    "normal": lambda n: noise(random.normal, n),
    "uniform": lambda n: noise(random.uniform, n),
    "interpolate": lambda n: sampling.interpolate(
        images()[0], images()[1], [n(0.25), n(0.5)]
    ),
    "multistep_update": lambda n: diffusion.multistep_update(
        images(), images(), -images(), n(0.5)
    ),
    "Diffusion.multistep_weights": lambda n: PROCESS.multistep_weights(n(0.5)),
    "find_moments": lambda n: likelihood.find_moments(
        model(), images(), limit=n(2), batch_size=n(2), seed=n(3), **GUIDE
    ).eps_square,
    "integers": lambda n: random.integers(
        random.NoiseKey(3, 1, torch.arange(2), 4), n(10), (2, 3)
    ),
}  # fmt: skip


def plain_through(n: Convert, values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(map(n, v)) if isinstance(v, tuple) else n(v) for k, v in values.items()}


def noise(draw: Any, n: Convert) -> Any:
    return draw(random.NoiseKey(3, 1, torch.arange(2), 4), (n(2), n(3)))


def drawn(sampler: Any) -> Any:
    return sampler.sample(torch.arange(6))


def numpy_scalar(value: Any) -> Any:
    return np.int64(value) if isinstance(value, int) else np.float64(value)


def narrow_scalar(value: Any) -> Any:
    return np.int16(value) if isinstance(value, int) else np.float32(value)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def numbered() -> Iterator[str]:
    """Public functions, classes and their methods that have a number among their arguments."""
    seen: set[int] = set()
    for module in MODULES:
        names = getattr(module, "__all__", None) or [n for n in vars(module) if n[0] != "_"]
        for name in names:
            value = getattr(module, name)
            own = str(getattr(value, "__module__", "")).startswith("iddpm_ext")
            if isinstance(value, types.ModuleType) or not callable(value) or not own:
                continue
            if id(value) in seen:
                continue
            seen.add(id(value))
            found = {name: value}
            if inspect.isclass(value):
                methods = [k for k in vars(value) if k[0] != "_" and callable(getattr(value, k))]
                found |= {f"{name}.{k}": getattr(value, k) for k in methods}
            for shown, function in found.items():
                try:
                    parameters = inspect.signature(function).parameters.values()
                except ValueError:
                    continue
                if any(
                    re.search(r"\b(int|float|Steps|ImageSize)\b", str(p.annotation))
                    for p in parameters
                ):
                    yield shown


def test_every_public_function_with_a_number_has_a_call_here():
    assert sorted(set(numbered()) - CALLS.keys() - RESULTS - LONG) == []
    assert sorted((CALLS.keys() | RESULTS | LONG) - set(numbered())) == []


@pytest.mark.parametrize("name", CALLS)
def test_numpy_scalars_are_numbers(name, tmp_path):
    call = CALLS[name]
    more = [tmp_path] if len(inspect.signature(call).parameters) > 1 else []
    if "Scheduler" in name:
        pytest.importorskip("diffusers")
    expected = call(lambda value: value, *more)
    assert same(call(numpy_scalar, *more), expected)
    assert same(call(narrow_scalar, *more), expected)


def test_facts_of_a_checkpoint_may_be_numpys(tmp_path):
    facts = {"step": np.int64(7), "rates": [np.float32(0.5)], "done": np.bool_(True)}
    checkpoint.save(model(), tmp_path / "x.safetensors", extra=facts)
    again = iddpm_ext.load(tmp_path / "x.safetensors").extra
    assert again == {"step": 7, "rates": [0.5], "done": True}


def test_plain_goes_into_tuples_lists_and_dicts_and_leaves_arrays():
    array = np.arange(3)
    given = {"a": (np.int64(1), [np.float32(0.5)]), np.int8(2): np.bool_(True), "b": array}
    made = plain(given)
    assert made == {"a": (1, [0.5]), 2: True, "b": array}
    assert [type(v) for v in (made["a"][0], made["a"][1][0], made[2])] == [int, float, bool]
    assert made["b"] is array

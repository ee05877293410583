"""The CUDA engine on a GPU where there is one, and without: graphs on a tape, kernels emulated.

`fake_graphs` replays graphs without a GPU. Everything else is the engine as it runs on a GPU, through
`sample`; its images are compared with those of the module on the CPU.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cuda_emu import toolchain
from engine_networks import CONFIGS, MORE_CONFIGS, SMALL, error, inputs, make, reference
from fake_graphs import Counted, FakeGraphs, HostSync, graphs_of_others, no_waiting

from iddpm_ext import Diffusion, _native, sample, sample_progressive
from iddpm_ext.engines.cuda import engine as cuda_engine
from iddpm_ext.engines.cuda.engine import CUDAEngine, CUDAProgram, NotSupported
from iddpm_ext.engines.cuda.network import FusedNetwork
from iddpm_ext.engines.embedding import Projections
from iddpm_ext.networks.unet import UNet, UNetConfig
from iddpm_ext.random import STREAM_INITIAL, NoiseKey, normal
from iddpm_ext.sampling import cuda_chain
from iddpm_ext.sampling.loop import network_of
from iddpm_ext.sampling.request import make_request

REASON = toolchain.absence() or _native.cpu_absence()
CHAIN = {"image_size": 8, "model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2)}
DRAW = {"backend": "cuda", "progress": False, "steps": 4, "n": 3}


class Gpu:
    """Where the engine runs in a test, and how often it captured and replayed."""

    def __init__(self, device: str, graphs: type[Counted]):
        self.device, self.graphs = device, graphs
        graphs.reset()

    @property
    def counts(self) -> tuple[int, int]:
        return self.graphs.captures, self.graphs.replays


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def gpu(request, monkeypatch):
    """The device; without a GPU, CPU tensors are treated like CUDA tensors."""
    graphs = Counted if request.param == "cuda" else FakeGraphs
    monkeypatch.setattr("iddpm_ext.engines.cuda.graphs.Graphs", graphs)
    # The bounds are float32's; TensorFloat32, PyTorch's default in convolutions, has a test of its own.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if request.param == "cuda":
        if _native.cuda_absence() is not None:
            pytest.skip(_native.cuda_absence())
        yield Gpu("cuda", graphs)
        return
    if REASON is not None:
        pytest.skip(f"no emulator: {REASON}")
    from cuda_emu import emulator

    monkeypatch.setattr(cuda_engine, "supports_device", lambda device: device.type == "cpu")
    with emulator.emulated_cuda():
        yield Gpu("cpu", graphs)


def network(gpu: Gpu, **config) -> UNet:
    model = make(**{**CHAIN, **config}).to(gpu.device)
    variance = "learned_range" if model.config.out_channels == 6 else "fixed_small"
    # Predicted from noise, x_0 multiplies the network's rounding by a hundred at the first step.
    model.diffusion = Diffusion(num_timesteps=100, prediction="x_0", variance=variance)
    return model


def plain(model: UNet, **options) -> torch.Tensor:
    """The module's images on the CPU."""
    own = {**DRAW, "backend": "auto", **options}
    own = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in own.items()}
    return sample(copy.deepcopy(model).cpu(), engine=False, **own)


def assert_images_agree(images, expected):
    assert (images.cpu() - expected.cpu()).abs().max() < 2e-4
    assert images.dtype == torch.float32 and images.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*CONFIGS, *MORE_CONFIGS])
def test_fused_network_is_the_network(name, dtype):
    model = make(**(CONFIGS | MORE_CONFIGS)[name])
    x, y = inputs(model, 3)
    t = torch.tensor([0.0, 500.0, 999.0])
    truth = reference(model, x, t, y)
    with torch.no_grad():
        fused, project = FusedNetwork(model, dtype), Projections(model)
        out = fused(x, project(t, y) + fused.embedding_bias)
        images, low_res = x.chunk(2, 1) if model.config.super_resolution else (x, None)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            yardstick = error(model(images, t, y, low_res), truth)
    assert fused.floats == project.floats and out.dtype == torch.float32
    assert error(out, truth) < 2 * yardstick


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 0.7, "clip": False},
        {"seed": (1 << 64) - 5},
    ],
)
def test_chain_on_graphs_gives_the_modules_images(gpu, options):
    model = network(gpu)
    assert_images_agree(sample(model, **DRAW, **options), plain(model, **options))
    assert gpu.counts == (1, 4)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"num_classes": 3}, {"labels": [2, -1, 2]}),
        ({"num_classes": 3}, {"labels": [2, 0, 1], "guidance_scale": 2.5}),
        ({"use_scale_shift_norm": False, "out_channels": 3}, {}),
        ({"super_resolution": True}, {"low_res": True}),
        ({"super_resolution": True, "num_classes": 2}, {"low_res": True, "guidance_scale": 1.5}),
    ],
)
def test_labels_guidance_and_low_resolution_images_enter_the_graph(gpu, config, options):
    model = network(gpu, **config)
    if options.get("low_res"):
        torch.manual_seed(3)
        options = {**options, "low_res": (torch.rand(3, 3, 4, 4) * 2 - 1).to(gpu.device)}
    assert_images_agree(sample(model, **DRAW, **options), plain(model, **options))
    assert gpu.counts == (1, 4)


def test_one_capture_serves_other_seeds_labels_scales_and_numbers_of_steps(gpu):
    model = network(gpu, num_classes=4)
    for options in (
        {"labels": [0, 1, 2], "guidance_scale": 2.0, "seed": 1},
        {"labels": [3, 3, 3], "guidance_scale": 0.5, "seed": 2, "steps": 3},
        {"labels": [1, 1, 0], "guidance_scale": 3.0, "seed": 1, "steps": [0, 10, 20, 60, 99]},
    ):
        assert_images_agree(sample(model, **{**DRAW, **options}), plain(model, **options))
    assert gpu.counts == (1, 4 + 3 + 5)


def test_a_graph_outlives_what_torch_compile_clears(gpu):
    model = network(gpu, attention_resolutions=(8, 4))
    before = sample(model, **DRAW)
    graphs_of_others(gpu.device)
    assert torch.equal(sample(model, **DRAW), before)
    assert gpu.counts == (1, 8)


def test_a_ragged_last_batch_has_a_graph_of_its_own(gpu):
    model = network(gpu)
    options = {"n": 5, "batch_size": 2}
    assert_images_agree(sample(model, **{**DRAW, **options}), plain(model, **options))
    assert gpu.counts == (2, 3 * 4)


def test_embeddings_that_do_not_fit_are_loaded_a_few_steps_at_a_time(gpu, monkeypatch):
    model = network(gpu, num_classes=3)
    options = {"labels": [2, 0, 1], "steps": 7}
    expected = plain(model, **options)
    floats = Projections(model).floats
    monkeypatch.setattr(cuda_chain, "_WINDOW_BYTES", 4 * floats * 8)  # two of the seven steps
    assert_images_agree(sample(model, **{**DRAW, **options}), expected)
    monkeypatch.setattr("iddpm_ext.engines.embedding._TABLE_BYTES", 0)
    assert_images_agree(sample(copy.deepcopy(model), **{**DRAW, **options}), expected)


def test_no_step_makes_the_host_wait(gpu):
    model = network(gpu, num_classes=3)
    request = make_request(
        "sample", model, 4, labels=[0, 1, 2], guidance_scale=2.0, backend="cuda", progress=False
    )
    x = torch.randn(3, 3, 8, 8, device=gpu.device)
    chosen = network_of(request)
    assert chosen.name == "cuda engine" and cuda_chain.supports(request, chosen)
    step = cuda_chain.prepare(request, chosen, torch.arange(3, device=gpu.device), x)
    with no_waiting():
        for i in (3, 2, 1, 0):
            step(i)
    with pytest.raises(HostSync), no_waiting():
        float(x.sum())
    with pytest.raises(HostSync), no_waiting():
        torch.tensor([1.0])  # to be copied from the host


def test_steps_that_are_looked_at_are_those_of_the_graph(gpu):
    model = network(gpu, num_classes=3)
    options = {"labels": [2, 0, 1], "guidance_scale": 2.0}
    whole = sample(model, **DRAW, **options)
    seen = list(sample_progressive(model, **DRAW, **options))
    assert_images_agree(seen[-1].x, whole)
    assert_images_agree(sample(model, **DRAW, **options, callback=lambda step: None), whole)
    assert gpu.counts[0] == 2  # the chain's, and the network's own


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "unipc"])
def test_given_images_and_edits_by_a_callback_are_those_of_the_module(gpu, sampler):
    model = network(gpu)
    g = torch.Generator().manual_seed(0)
    x_0 = (torch.rand(3, 3, 8, 8, generator=g) * 2 - 1).to(gpu.device)
    mask = (torch.arange(8, device=gpu.device) > 3).float()
    edit = {"callback": lambda step: step.x.mul_(0.5) if step.t == 2 else None}
    repaint = {"repaint": 2} if sampler != "unipc" else {}
    for options in ({"mask": mask, **repaint}, {"strength": 0.5}, {"mask": mask, "strength": 0.5}):
        options = {"x_0": x_0, "sampler": sampler, **options}
        assert_images_agree(sample(model, **DRAW, **options), plain(model, **options))
    options = {"sampler": sampler, **edit}
    edited = sample(model, **DRAW, **options)
    assert_images_agree(edited, plain(model, **options))
    assert (edited - sample(model, **DRAW, sampler=sampler)).abs().max() > 1e-3


@pytest.mark.parametrize("change", ["written", "data written", "replaced"])
def test_changed_weights_reach_the_graph_without_a_capture(gpu, change):
    model = network(gpu)
    before = sample(model, **DRAW)
    block = model.middle_block[0]
    for weight in (block.in_layers[2].weight, block.emb_layers[1].weight):
        if change == "written":
            weight.mul_(-1)
        elif change == "data written":
            weight.data.mul_(-1)
        else:
            weight.data = -weight.data
    after = sample(model, **DRAW)
    assert (after - before).abs().max() > 1e-2
    assert_images_agree(after, plain(model))
    assert gpu.counts[0] == 1


def test_where_capture_fails_kernels_are_launched_one_by_one_and_it_is_said_once(gpu):
    model = network(gpu)
    gpu.graphs.failure = "operation not permitted when stream is capturing"
    with pytest.warns(RuntimeWarning, match="without a CUDA graph: operation not permitted"):
        images = sample(model, **DRAW)
    assert_images_agree(images, plain(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(model, **{**DRAW, "n": 2})
    assert gpu.counts[0] == 0


def test_an_error_of_the_work_itself_is_not_taken_for_a_failed_capture(gpu, monkeypatch):
    monkeypatch.setattr(FusedNetwork, "__call__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(network(gpu), **DRAW)


def test_kernels_of_the_engine_run_emulated(gpu):
    model = network(gpu, num_classes=2, attention_resolutions=(4,))
    model.backend = "cuda"
    options = {"labels": [1, 0], "n": 2, "steps": 2, "dtype": torch.bfloat16}
    images = sample(model, **{**DRAW, **options})
    model.backend = "auto"
    expected = plain(model, **options)
    exact = plain(model, **{**options, "dtype": None})
    # Of all pixels together: the largest of a few hundred differences is a matter of chance.
    assert (images.cpu() - exact).norm() < 2 * (expected - exact).norm()


def test_engine_evaluates_any_timesteps_and_a_program_takes_new_weights(gpu):
    model = make(**SMALL, num_classes=3).to(gpu.device)
    x, y = (value.to(gpu.device) for value in inputs(model, 4))
    t = torch.tensor([0.0, 3.5, 500.0, 999.0], device=gpu.device)
    program = CUDAProgram(model)
    for _ in range(2):
        engine = program.engine()
        assert error(engine.at(x, t, y), reference(model, x, t, y)) < 1e-5
        model.time_embed[0].weight.data.mul_(1.5)
        assert not program.renew(model)  # not under the engine that is there
        del engine
        assert program.renew(model)
    assert program.engine().at(x[:0], t[:0], y[:0]).shape == (0, 6, 16, 16)
    assert gpu.counts[0] == 1


def test_chains_of_two_calls_do_not_meet(gpu):
    """Each has graphs and memory of its own, in whatever order they are replayed."""
    model = network(gpu, num_classes=3)
    seeds = (1, 2)
    alone = [sample(model, **DRAW, seed=seed, labels=[0, 1, seed]) for seed in seeds]
    calls = []
    for seed in seeds:
        options = {"backend": "cuda", "seed": seed, "labels": [0, 1, seed], "progress": False}
        request = make_request("sample", model, 4, **options)
        samples = torch.arange(3, device=gpu.device)
        x = normal(NoiseKey(seed, STREAM_INITIAL, samples, 0), (3, 3, 8, 8))
        step = cuda_chain.prepare(request, network_of(request), samples, x)
        calls.append((x, step))
    for i in (3, 2, 1, 0):
        for _, step in calls:
            step(i)
    for (x, _), expected in zip(calls, alone, strict=True):
        assert torch.equal(x, expected)


def test_calls_by_step_are_calls_by_timestep(gpu):
    model = make(**SMALL, num_classes=3).to(gpu.device)
    x, y = (value.to(gpu.device) for value in inputs(model, 4))
    engine, times = CUDAEngine(model), torch.tensor([5.0, 600.0], device=gpu.device)
    engine.begin(times, y)
    with no_waiting():  # the schedule is known by its tensors
        engine.begin(times, y)
    for step in (1, 0):
        expected = engine.at(x, times[step].expand(4), y)
        torch.testing.assert_close(engine(x, step), expected)
    torch.testing.assert_close(engine(x[:2], 1), engine.at(x[:2], times[1].expand(2), y[:2]))
    times.mul_(0.5)
    engine.begin(times, y)
    torch.testing.assert_close(engine(x, 1), engine.at(x, times[1].expand(4), y))


def test_engine_built_in_inference_mode_serves_outside_it(gpu):
    model = network(gpu)
    with torch.inference_mode():
        first = sample(model, **DRAW)
    assert torch.equal(sample(model, **DRAW), first)


def test_tensor_float32_is_used_as_pytorch_was_told_and_never_where_exact(gpu, monkeypatch):
    engine, exact = CUDAEngine(network(gpu)), CUDAEngine(network(gpu), exact=True)
    for convolutions, products in ((True, "highest"), (False, "high"), (True, "high")):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", convolutions)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(products)
        try:
            for each, expected in (
                (engine, (convolutions, products)),
                (exact, (False, "highest")),
            ):
                with each.computing():
                    assert cuda_engine._float32_settings() == expected
                assert cuda_engine._float32_settings() == (convolutions, products)
        finally:
            torch.set_float32_matmul_precision(before)


def test_tensor_float32_is_closer_than_bfloat16(gpu, monkeypatch):
    """It rounds operands to eleven bits, bfloat16 to eight. Without a GPU it is float32 itself."""
    model = network(gpu)
    exact, half = plain(model), plain(model, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    images = sample(model, **DRAW)
    assert (images.cpu() - exact).norm() < (half - exact).norm() / 2


def test_a_graph_is_not_replayed_under_other_settings_of_tensor_float32(gpu, monkeypatch):
    model = network(gpu)
    for allowed, captures in ((True, 1), (False, 2), (True, 2)):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        sample(model, **DRAW)
        assert gpu.counts[0] == captures


def test_what_cannot_be_served_runs_as_the_module_and_says_why(gpu, monkeypatch):
    model = network(gpu)
    expected = plain(model)
    monkeypatch.setattr(cuda_engine, "why_not_supported", lambda *_: "of a reason")
    with pytest.warns(RuntimeWarning, match="without the engine: CUDAEngine: of a reason"):
        assert_images_agree(sample(model, **DRAW), expected)


def test_reasons_not_to_serve_are_given():
    with pytest.raises(NotSupported, match="UNet, got Linear"):
        CUDAEngine(torch.nn.Linear(1, 1))
    with pytest.raises(NotSupported, match="weights on a CUDA device, got cpu"):
        CUDAEngine(make(**SMALL))
    with pytest.raises(NotSupported, match=r"float32, bfloat16 or float16, got torch\.float64"):
        CUDAEngine(UNet(UNetConfig(**SMALL)), dtype=torch.float64)


def test_bad_arguments_name_themselves(gpu):
    model = make(**SMALL, num_classes=3).to(gpu.device)
    x, y = (value.to(gpu.device) for value in inputs(model, 2))
    engine = CUDAEngine(model)
    with pytest.raises(RuntimeError, match="begin must be called"):
        engine(x, 0)
    engine.begin(torch.tensor([1.0, 2.0]), y)
    with pytest.raises(ValueError, match=r"step_index must lie in \[0, 1\], got 2"):
        engine(x, 2)
    with pytest.raises(ValueError, match=r"x must be \[n, 3, H, W\] with H and W multiples of 2"):
        engine(x[:, :, 1:], 0)
    with pytest.raises(TypeError, match="x must be float32"):
        engine(x.double(), 0)
    with pytest.raises(ValueError, match="at most the 2 samples"):
        engine(torch.cat([x, x]), 0)
    with pytest.raises(ValueError, match="labels must be given, as the network has 3 classes"):
        engine.begin(torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"labels must lie in \[-1, 2\], got -1 .. 3"):
        engine.begin(torch.tensor([1.0]), torch.tensor([3, -1]))
    with pytest.raises(ValueError, match=r"at: labels must be \[2\]"):
        engine.at(x, torch.zeros(2, device=gpu.device), y[:1])


@pytest.mark.parametrize("engine", [True, False])
def test_an_overflow_of_float16_is_told_and_no_image_returned(gpu, engine):
    model = network(gpu)
    with torch.no_grad():  # features of some 1e7, which normalisation brings back to one
        model.input_blocks[0][0].weight.mul_(1e8)
    options = {**DRAW, "engine": engine, "backend": "cuda" if engine else "auto"}
    with pytest.raises(RuntimeError, match=r"dtype must be bfloat16 or float32 .* got float16"):
        sample(model, **options, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"^sample_progressive: dtype must be"):
        list(sample_progressive(model, **options, dtype=torch.float16))
    assert sample(model, **options, dtype=torch.bfloat16).isfinite().all()

"""The CPU engine as a whole network: accuracy on every kind of configuration, and its contract."""

from __future__ import annotations

import pytest
import torch
from engine_networks import CONFIGS, SMALL, error, inputs, make, reference

from iddpm_ext import Diffusion, _native, sample
from iddpm_ext.engines.cpu.engine import CPUEngine, NotSupported, why_not_supported
from iddpm_ext.networks.unet import UNet, UNetConfig
from iddpm_ext.sampling.loop import network_of
from iddpm_ext.sampling.request import make_request

pytestmark = [
    pytest.mark.skipif(_native.cpu_absence() is not None, reason="needs iddpm_ext._C"),
    pytest.mark.skipif(
        _native.cpu_absence() is None and _native.native().build_info()["isa"] == "base",
        reason="the engine needs AVX2",
    ),
]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_engine_is_the_network_at_every_t(name, exact):
    model = make(**CONFIGS[name])
    timesteps = torch.tensor([0.0, 12.5, 500.0, 999.75])
    x, y = inputs(model, 4)
    engine = CPUEngine(model, 4, exact=exact, num_threads=2 if exact else 1)
    out, truth = engine.at(x, timesteps, y), reference(model, x, timesteps, y)
    for ours, expected in zip(out, truth, strict=True):
        assert error(ours, expected) < (3e-6 if exact else 1e-5)


def test_cifar_configuration_is_supported_within_1e_5():
    model = make(image_size=32, model_channels=128, num_res_blocks=3)
    x, _ = inputs(model, 1)
    engine = CPUEngine(model, 1)
    timesteps = torch.tensor([321.0])
    assert error(engine.at(x, timesteps), reference(model, x, timesteps, None)) < 1e-5


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_each_instruction_set_is_supported(isa):
    native = _native.native()
    if isa not in native.build_info()["isa_available"]:
        pytest.skip(f"this CPU has no {isa}")
    model = make(**SMALL)
    x, _ = inputs(model, 2)
    previous = native.set_isa(isa)
    try:
        out = CPUEngine(model, 2).at(x, torch.tensor([3.0, 700.0]))
    finally:
        native.set_isa(previous)
    assert error(out, reference(model, x, torch.tensor([3.0, 700.0]), None)) < 1e-5


needs_bf16 = pytest.mark.skipif(
    _native.cpu_absence() is None and not _native.native().build_info()["bf16"],
    reason="this CPU has no avx512_bf16",
)


@needs_bf16
@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_error_is_small_and_flat_in_t(name):
    model = make(**CONFIGS[name])
    x, y = inputs(model, 6)
    engine = CPUEngine(model, 6, dtype=torch.bfloat16, num_threads=2)
    timesteps = torch.tensor([37.0, 500.0, 999.0]).repeat_interleave(2)
    out, truth = engine.at(x, timesteps, y), reference(model, x, timesteps, y)
    errors = [error(out[i : i + 2], truth[i : i + 2]) for i in (0, 2, 4)]
    assert 5e-4 < min(errors) and max(errors) < 1.2e-2, errors


@needs_bf16
def test_bfloat16_is_refused_by_a_cpu_without_it_and_sample_says_so():
    model = make(**SMALL)
    model.diffusion = Diffusion()
    previous = _native.native().set_isa("avx2")
    try:
        with pytest.raises(NotSupported, match="avx512_bf16"):
            CPUEngine(model, 1, dtype=torch.bfloat16)
        with pytest.warns(RuntimeWarning, match=r"without the engine.*avx512_bf16"):
            sample(model, 2, n=1, dtype=torch.bfloat16, progress=False)
    finally:
        _native.native().set_isa(previous)


@needs_bf16
def test_sample_in_bfloat16_uses_the_engine():
    model = make(**SMALL)
    model.diffusion = Diffusion()
    request = make_request("sample", model, 2, n=2, dtype=torch.bfloat16)
    network = network_of(request)
    assert isinstance(network, CPUEngine) and network.dtype == torch.bfloat16
    x = sample(model, 2, n=2, dtype=torch.bfloat16, progress=False)
    assert x.dtype == torch.float32
    exact = sample(model, 2, n=2, engine=False, progress=False)
    assert 1e-5 < (x - exact).abs().mean() < 0.02


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 0.5, "clip": False},
        {"n": 5, "batch_size": 2, "seed": 2**63 + 5},
        {"guidance_scale": 1.5},
        {"sampler": "dpm++"},
    ],
)
def test_a_whole_chain_is_the_steps_to_the_bit(settings):
    model = make(**SMALL, num_classes=3)
    model.diffusion = Diffusion()
    common = {"n": 2, "progress": False, **settings}
    seen = []
    whole = sample(model, 4, **common)
    assert torch.equal(whole, sample(model, 4, callback=seen.append, **common))
    assert len(seen) == 4 * -(-common["n"] // common.get("batch_size", common["n"]))


def test_a_whole_chain_leaves_x_T_as_it_was_and_sees_changed_weights():
    model = make(**SMALL)
    model.diffusion = Diffusion()
    x_T = torch.randn(2, 3, 16, 16)
    before = x_T.clone()
    first = sample(model, 3, x_T=x_T, progress=False)
    assert torch.equal(x_T, before)
    assert torch.equal(sample(model, 3, x_T=x_T, progress=False), first)
    model.middle_block[0].in_layers[2].weight.mul_(-1)
    assert not torch.equal(sample(model, 3, x_T=x_T, progress=False), first)


def test_a_schedule_is_as_accurate_as_single_timesteps():
    """Its embeddings are rows of one product, which may be rounded differently than single products."""
    model = make(**CONFIGS["bundled"])
    x, y = inputs(model, 4)
    engine = CPUEngine(model, 4)
    timesteps = torch.tensor([0.0, 250.25, 999.75])
    engine.begin(timesteps, y)
    for step, t in enumerate(timesteps):
        truth = reference(model, x, t.expand(4), y)
        assert error(engine(x, step), truth) < 2 * error(engine.at(x, t.expand(4), y), truth)
    truth = reference(model, x[:2], timesteps[1].expand(2), y[:2])
    single = engine.at(x[:2], timesteps[1].expand(2), y[:2])
    assert error(engine(x[:2], 1), truth) < 2 * error(single, truth)


def test_a_schedule_too_large_for_a_table_is_computed_step_by_step(monkeypatch):
    model = make(**SMALL, num_classes=3)
    x, y = inputs(model, 4)
    engine = CPUEngine(model, 4)
    timesteps = torch.tensor([5.0, 600.0])
    engine.begin(timesteps, y)
    whole = [engine(x, step) for step in (0, 1, 0)]
    monkeypatch.setattr("iddpm_ext.engines.embedding._TABLE_BYTES", 0)
    engine = CPUEngine(model, 4)
    engine.begin(timesteps, y)
    for step, expected in zip((0, 1, 0), whole, strict=True):
        truth = reference(model, x, timesteps[step].expand(4), y)
        assert error(engine(x, step), truth) < 2 * error(expected, truth)


def test_out_is_written_in_place_and_fewer_samples_are_served():
    model = make(**SMALL)
    x, _ = inputs(model, 4)
    engine = CPUEngine(model, 4)
    engine.begin(torch.tensor([100.0]))
    out = torch.empty(3, 6, 16, 16)
    assert engine(x[:3], 0, out) is out
    assert error(out, reference(model, x[:3], torch.full((3,), 100.0), None)) < 1e-5
    assert engine(x[:0], 0).shape == (0, 6, 16, 16)


def test_result_repeats_and_does_not_depend_on_threads():
    model = make(**CONFIGS["four levels"])
    x, _ = inputs(model, 8)
    timesteps = torch.full((8,), 321.0)
    one = CPUEngine(model, 8, num_threads=1)
    first = one.at(x, timesteps)
    assert torch.equal(one.at(x, timesteps), first)
    assert torch.equal(CPUEngine(model, 8, num_threads=2).at(x, timesteps), first)


def test_other_sizes_and_strided_inputs_are_served():
    model = make(**SMALL)
    engine = CPUEngine(model, 2, size=(6, 10))
    x = torch.randn(2, 10, 6, 3).permute(0, 3, 2, 1)
    timesteps = torch.tensor([1.0, 2.0])
    out = engine.at(x, timesteps)
    assert error(out, reference(model, x, timesteps, None)) < 1e-5


def test_what_cannot_be_served_is_refused_with_its_reason():
    with pytest.raises(NotSupported, match="conv_resample=False"):
        CPUEngine(make(**SMALL, conv_resample=False), 1)
    with pytest.raises(NotSupported, match=r"float32 or bfloat16, got torch\.float16"):
        CPUEngine(make(**SMALL), 1, dtype=torch.float16)
    with pytest.raises(NotSupported, match="UNet, got Linear"):
        CPUEngine(torch.nn.Linear(1, 1), 1)
    with torch.device("meta"):
        absent = UNet(UNetConfig(**SMALL))
    with pytest.raises(NotSupported, match=r"needs weights on the CPU, and \S+ is on meta"):
        CPUEngine(absent, 1)
    native = _native.native()
    previous = native.set_isa("base")
    try:
        assert "AVX2" in (why_not_supported(make(**SMALL)) or "")
    finally:
        native.set_isa(previous)


def test_bad_arguments_name_themselves():
    model = make(**SMALL, num_classes=3)
    x, y = inputs(model, 2)
    engine = CPUEngine(model, 2)
    with pytest.raises(RuntimeError, match="begin must be called"):
        engine(x, 0)
    engine.begin(torch.tensor([1.0, 2.0]), y)
    with pytest.raises(ValueError, match=r"step_index must lie in \[0, 1\], got 2"):
        engine(x, 2)
    with pytest.raises(ValueError, match=r"x must be \[at most 2, 3, 16, 16\]"):
        engine(torch.randn(3, 3, 16, 16), 0)
    with pytest.raises(TypeError, match="x must be float32"):
        engine(x.double(), 0)
    with pytest.raises(ValueError, match="out must be contiguous float32"):
        engine(x, 0, torch.empty(2, 3, 16, 16))
    with pytest.raises(ValueError, match="labels must be given, as the network has 3 classes"):
        engine.begin(torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"labels must lie in \[-1, 2\], got -1 .. 3"):
        engine.begin(torch.tensor([1.0]), torch.tensor([3, -1]))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        CPUEngine(model, 0)
    with pytest.raises(ValueError, match="size must be multiples of 2"):
        CPUEngine(model, 1, size=(15, 16))

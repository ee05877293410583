"""The U-Net: OpenAI's keys, the original's outputs, odd sizes, precision, and clear errors."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from golden.make_unet import CASES, GOLDEN, config_of, fill_by_formula, inputs_of, summary

from iddpm_ext.networks.unet import UNet, UNetConfig, timestep_embedding

SMALL = UNetConfig(
    image_size=8,
    model_channels=32,
    num_res_blocks=1,
    channel_mult=(1, 2),
    attention_resolutions=(4,),
)
TINY = replace(SMALL, channel_mult=(1,))
GOLDENS = json.loads(GOLDEN.read_text())["cases"]


def filled(config: UNetConfig) -> UNet:
    model = UNet(config).eval()
    fill_by_formula(model)
    return model


def small_inputs(n: int = 2, size: tuple[int, int] = (8, 8), channels: int = 3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, channels, *size, generator=generator)
    return x, torch.linspace(0, 999, n)


@pytest.mark.parametrize("name", CASES)
def test_output_equals_the_original_network(name):
    case = CASES[name]
    config = UNetConfig.from_dict(config_of(case))
    for dtype in (torch.float32, torch.float64):
        inputs = inputs_of(case)
        inputs["x"] = inputs["x"].to(dtype)
        with torch.no_grad():
            got = summary(filled(config).to(dtype)(**inputs))
        assert got["shape"] == GOLDENS[name]["shape"]
        torch.testing.assert_close(
            torch.tensor(got["values"]), torch.tensor(GOLDENS[name]["values"]), rtol=2e-5, atol=2e-5
        )
        assert got["mean_square"] == pytest.approx(GOLDENS[name]["mean_square"], rel=1e-5)


def test_residual_branches_and_output_start_at_zero():
    model = UNet(SMALL)
    x, t = small_inputs()
    assert torch.count_nonzero(model(x, t)) == 0
    assert torch.count_nonzero(model.input_blocks[1][0].out_layers[3].weight) == 0
    assert torch.count_nonzero(model.middle_block[1].proj_out.weight) == 0


@pytest.mark.parametrize("size", [(8, 12), (14, 6), (2, 2)])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_divisible_size_and_any_channel_count(size, channels):
    model = filled(replace(SMALL, in_channels=channels, out_channels=channels))
    x, t = small_inputs(1, size, channels)
    assert model(x, t).shape == x.shape


def test_empty_batch_gives_an_empty_output():
    assert UNet(SMALL)(torch.zeros(0, 3, 8, 8), torch.zeros(0)).shape == (0, 6, 8, 8)


def test_resampling_without_convolution_works_and_has_no_weights():
    model = filled(replace(SMALL, conv_resample=False))
    x, t = small_inputs()
    assert model(x, t).isfinite().all()
    assert not any(".op." in k or k.endswith(".conv.weight") for k in model.state_dict())


def test_images_of_a_batch_do_not_influence_each_other():
    model = filled(SMALL).double()
    x, t = small_inputs(3)
    together = model(x.double(), t)
    for i in range(3):
        alone = model(x[i : i + 1].double(), t[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


def test_label_minus_one_adds_nothing_to_the_embedding():
    model = filled(replace(SMALL, num_classes=4))
    bare = filled(SMALL)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if k != "label_emb.weight"})
    x, t = small_inputs()
    with torch.no_grad():
        labelled = model(x, t, torch.tensor([3, -1]))
        unlabelled = bare(x, t)
    assert torch.equal(labelled[1], unlabelled[1])
    assert not torch.allclose(labelled[0], unlabelled[0])


def test_timestep_embedding_is_cosines_then_sines():
    t = torch.tensor([0.0, 7.5], dtype=torch.float64)
    got = timestep_embedding(t, 6)
    frequency = 10_000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    angle = t[:, None] * frequency
    torch.testing.assert_close(got, torch.cat([angle.cos(), angle.sin()], 1), rtol=0, atol=1e-14)


def test_bfloat16_weights_still_tell_neighbouring_steps_apart():
    model = filled(SMALL).bfloat16()
    near = model.embed(torch.tensor([999.0, 999.75]), None)
    exact = filled(SMALL).double().embed(torch.tensor([999.0, 999.75]), None)
    assert near.dtype == torch.float32
    difference = (near[0] - near[1]).double()
    assert (difference - (exact[0] - exact[1])).norm() < 0.02 * difference.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float64(dtype):
    x, t = small_inputs()
    with torch.no_grad():
        exact = filled(SMALL).double()(x.double(), t)
        half = filled(SMALL).to(dtype)(x, t)
        with torch.autocast("cpu", dtype):
            mixed = filled(SMALL)(x, t)
    assert half.dtype == x.dtype and mixed.dtype == x.dtype
    for got in (half, mixed):
        assert (got - exact).norm() < 8 * torch.finfo(dtype).eps * exact.norm()


def test_channels_last_gives_the_same_output():
    model = filled(SMALL).double()
    x, t = small_inputs()
    expected = model(x.double(), t)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    got = last(x.double().to(memory_format=torch.channels_last), t)
    torch.testing.assert_close(got, expected)


def test_gradient_checkpointing_changes_no_gradient():
    config = replace(SMALL, dropout=0.3)
    x, t = small_inputs()
    gradients = []
    for recompute in (False, True):
        model = filled(config).train()
        model.gradient_checkpointing = recompute
        calls = []
        model.middle_block[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(0)
        model(x, t).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
        assert len(calls) == (2 if recompute else 1)
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_dropout_acts_in_training_only():
    model = filled(replace(SMALL, dropout=0.5))
    x, t = small_inputs()
    with torch.no_grad():
        assert torch.equal(model(x, t), model(x, t))
        model.train()
        assert not torch.equal(model(x, t), model(x, t))


def test_config_survives_json():
    config = replace(SMALL, num_classes=10, num_heads_upsample=2, dropout=0.1)
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model_channels": 48}, ValueError, "model_channels must be a multiple of 32.*got 48"),
        ({"image_size": 7}, ValueError, "image_size must be a multiple of 2 .*got 7"),
        ({"num_heads": 5}, ValueError, "num_heads must divide the 64 channels.*got 5"),
        ({"num_heads_upsample": 3}, ValueError, "num_heads_upsample must divide the 64.*got 3"),
        ({"channel_mult": ()}, ValueError, "channel_mult must have at least one level"),
        ({"channel_mult": (1, 0)}, ValueError, "channel_mult must be above 0, got 0"),
        ({"channel_mult": "1,2"}, TypeError, "channel_mult must be a tuple of numbers"),
        ({"attention_resolutions": (4.0,)}, TypeError, "attention_resolutions must be an integer"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a number"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_res_blocks": True}, TypeError, "num_res_blocks must be an integer, got True"),
        ({"use_scale_shift_norm": 1}, TypeError, "use_scale_shift_norm must be a bool, got 1"),
    ],
)
def test_wrong_configuration_is_refused(change, error, says):
    with pytest.raises(error, match=f"UNetConfig: {says}"):
        replace(SMALL, **change)


def test_unknown_configuration_key_is_refused():
    with pytest.raises(ValueError, match=r"must be fields of UNetConfig, got \['num_channels'\]"):
        UNetConfig.from_dict({"num_channels": 128})


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x": torch.zeros(2, 1, 8, 8)}, ValueError, r"x must be \[N, 3, H, W\], got \[2, 1, 8"),
        ({"x": torch.zeros(3, 8, 8)}, ValueError, r"x must be \[N, 3, H, W\]"),
        (
            {"x": torch.zeros(2, 3, 8, 9)},
            ValueError,
            r"x must have .* multiples of 2, as its 2 levels.*8x9",
        ),
        ({"x": torch.zeros(2, 3, 8, 8).int()}, TypeError, "x must be floating point"),
        ({"x": [[0.0]]}, TypeError, "x must be a tensor, got list"),
        ({"timesteps": torch.zeros(3)}, ValueError, r"timesteps must be \[2\], got \[3\]"),
        ({"timesteps": 5}, TypeError, "timesteps must be a tensor, got int"),
        ({"y": None}, ValueError, "y must be given, as the network has num_classes=4, got None"),
        ({"y": torch.tensor([0, 4])}, ValueError, r"y must lie in \[-1, 3\], got 0 .. 4"),
        ({"y": torch.tensor([-2, 0])}, ValueError, r"y must lie in \[-1, 3\]"),
        ({"y": torch.tensor([0])}, ValueError, r"y must be \[2\], got \[1\]"),
        ({"y": torch.zeros(2)}, TypeError, "y must be int64, got torch.float32"),
        ({"low_res": None}, ValueError, "low_res must be given.*super_resolution=True"),
        ({"low_res": torch.zeros(2, 1, 4, 4)}, ValueError, r"low_res must be \[2, 3, h, w\]"),
    ],
)
def test_wrong_input_is_refused(change, error, says):
    model = UNet(replace(SMALL, num_classes=4, super_resolution=True))
    x, t = small_inputs()
    inputs = {"x": x, "timesteps": t, "y": torch.tensor([0, 3]), "low_res": x[:, :, ::2, ::2]}
    assert model(**inputs).shape == (2, 6, 8, 8)
    with pytest.raises(error, match=f"UNet: {says}"):
        model(**{**inputs, **change})


def test_labels_of_an_unconditional_network_are_refused():
    x, t = small_inputs()
    with pytest.raises(ValueError, match="y must be None, as the network has num_classes=None"):
        UNet(SMALL)(x, t, torch.tensor([0, 1]))


def output_and_gradients(
    config: UNetConfig, backend: str, dtype: torch.dtype, n: int = 2, autocast: bool = False
):
    model = filled(config).to(dtype)
    model.backend = backend
    size, channels = (config.image_size, config.image_size), config.in_channels
    x, t = small_inputs(n, size, channels)
    x = x.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(x, t)
    output.square().mean().backward()
    gradients = torch.cat([g.grad.flatten() for g in (x, *model.parameters())])
    return output.detach().double(), gradients.double()


@pytest.mark.parametrize("scale_shift", [True, False])
def test_fused_operators_are_as_exact_as_plain_ones(scale_shift):
    config = replace(SMALL, use_scale_shift_norm=scale_shift)
    exact = output_and_gradients(config, "plain", torch.float64)
    yardstick = output_and_gradients(config, "plain", torch.float32)
    fused = output_and_gradients(config, "auto", torch.float32)
    reference = output_and_gradients(config, "auto", torch.float64)
    for e, y, f, r in zip(exact, yardstick, fused, reference, strict=True):
        assert (f - e).norm() <= 2 * (y - e).norm()
        assert (r - e).norm() <= 1e-13 * e.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_training_on_the_cpu_is_as_exact_as_with_plain_convolutions(autocast):
    config = UNetConfig(
        image_size=28,
        in_channels=1,
        out_channels=2,
        model_channels=32,
        num_res_blocks=1,
        channel_mult=(1, 2, 2),
        attention_resolutions=(14, 7),
    )
    exact = output_and_gradients(config, "plain", torch.float64)
    yardstick = output_and_gradients(config, "plain", torch.float32, autocast=autocast)
    found = output_and_gradients(config, "auto", torch.float32, autocast=autocast)
    # Three times, not two: F(4x4, 3x3) has twice the error of the direct sum (`ops.conv3x3`).
    for e, y, f in zip(exact, yardstick, found, strict=True):
        assert (f - e).norm() <= 3 * (y - e).norm()


def operators_called(model, x, t, grad: bool = False) -> set[str]:
    with torch.set_grad_enabled(grad), torch.profiler.profile() as profile:
        output = model(x, t)
        if grad:
            output.sum().backward()
    return {event.name for event in profile.events() if event.name.startswith("iddpm_ext::")}


def test_own_convolutions_serve_where_gradients_are_recorded_and_not_else():
    model = filled(SMALL)
    x, t = small_inputs()
    own = {"iddpm_ext::conv3x3", "iddpm_ext::conv3x3_bwd"}
    assert own <= operators_called(model, x, t, grad=True)
    assert not own & operators_called(model, x, t)
    for backend in ("plain", "reference"):
        model.backend = backend
        assert not own & operators_called(model, x, t, grad=True)
    frozen = filled(SMALL).requires_grad_(False)
    assert not own & operators_called(frozen, x.requires_grad_(), t, grad=True)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_output_is_laid_out_like_the_input(memory_format):
    model = filled(SMALL)
    x, t = small_inputs()
    x = x.contiguous(memory_format=memory_format)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert model(x, t).is_contiguous(memory_format=memory_format)


def test_plain_backend_calls_no_registered_operator():
    model = filled(SMALL)
    x, t = small_inputs()
    fused = {"iddpm_ext::group_norm_silu", "iddpm_ext::qkv_attention"}
    assert operators_called(model, x, t) == fused
    model.backend = "plain"
    assert operators_called(model, x, t) == set()


def test_attention_takes_auto_for_a_backend_without_its_kernel():
    model = filled(SMALL)
    for backend, attention in (("triton", "auto"), ("reference", "reference"), ("plain", "plain")):
        model.backend = backend
        assert model.middle_block[1].backend == attention
        assert model.out[0].backend == backend


def test_attention_reads_what_autocast_and_channels_last_give_it():
    seen = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.iddpm_ext.qkv_attention.default:
                seen.append((args[0].dtype, args[0].stride(1) == 1))
            return func(*args, **(kwargs or {}))

    model = filled(SMALL).to(memory_format=torch.channels_last)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        seen.clear()
        block = model.middle_block[1]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Recorder():
            block(torch.randn(2, 64, 4, 4).to(memory_format=memory_format))
        assert seen == [(torch.bfloat16, memory_format == torch.channels_last)]


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"UNet: backend must be one of auto, plain.*got 'fast'"):
        UNet(SMALL).backend = "fast"


def test_networks_of_any_channels_trace_as_one_graph_one_after_the_other():
    """torch.compile leaves sizes free that differed between calls, those of the networks before included."""
    torch.compiler.reset()
    for n, channels in ((2, 3), (3, 3), (2, 4)):
        model = filled(replace(TINY, in_channels=channels, num_classes=4))
        x, t = small_inputs(n, channels=channels)
        x = x.to(memory_format=torch.channels_last)
        y = torch.tensor([3, -1, 0])[:n]
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, t, y), model(x, t, y))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_step_compiles_into_one_graph(memory_format):
    model = filled(TINY).to(memory_format=memory_format)
    x, t = small_inputs()
    x = x.to(memory_format=memory_format)
    gradients = []
    for network in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        network(x, t).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_plain_network_exports_with_a_free_batch_size():
    model = filled(TINY)
    model.backend = "plain"
    x, t = small_inputs()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(
        model, (x, t), dynamic_shapes={"x": {0: batch}, "timesteps": {0: batch}}
    )
    x, t = small_inputs(5)
    torch.testing.assert_close(exported.module()(x, t), model(x, t))

"""guided-diffusion's networks: the original's outputs, its options, and its classifiers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from golden.make_guided import CASES, GOLDEN, SMALL
from golden.make_unet import fill_by_formula, inputs_of, summary

import iddpm_ext
from iddpm_ext.engines.cpu.engine import CPUEngine, why_not_supported
from iddpm_ext.networks.classifier import Classifier, ClassifierConfig
from iddpm_ext.networks.unet import UNet, UNetConfig

GOLDENS = json.loads(GOLDEN.read_text())
TINY = ClassifierConfig(
    image_size=8,
    model_channels=32,
    num_classes=5,
    num_res_blocks=1,
    channel_mult=(1, 2),
    attention_resolutions=(4,),
    num_head_channels=32,
)


def network_of(case: dict) -> UNet | Classifier:
    values = {**SMALL, **{k: v for k, v in case.items() if k != "size"}}
    if "pool" in values:
        return Classifier(ClassifierConfig.from_dict(values)).eval()
    return UNet(UNetConfig.from_dict(values)).eval()


@pytest.mark.parametrize("name", CASES)
def test_output_equals_the_original_network(name):
    case, expected = CASES[name], GOLDENS["cases"][name]
    model, inputs = network_of(case), inputs_of({**SMALL, **case})
    fill_by_formula(model)
    if "pool" in case:
        inputs.pop("y")
    for dtype in (torch.float32, torch.float64):
        inputs["x"] = inputs["x"].to(dtype)
        with torch.no_grad():
            got = summary(model.to(dtype)(**inputs))
        assert got["shape"] == expected["shape"]
        torch.testing.assert_close(
            torch.tensor(got["values"]), torch.tensor(expected["values"]), rtol=5e-5, atol=5e-5
        )
        assert got["mean_square"] == pytest.approx(expected["mean_square"], rel=1e-5)


def test_attention_orders_share_their_tensors_and_differ_in_their_outputs():
    case = CASES["new_order_resblock_updown"]
    new, legacy = network_of(case), network_of({**case, "attention_order": "legacy"})
    fill_by_formula(new)
    legacy.load_state_dict(new.state_dict())
    inputs = inputs_of({**SMALL, **case})
    with torch.no_grad():
        assert (new(**inputs) - legacy(**inputs)).abs().max() > 0.01


@pytest.mark.parametrize("size", [128, 512])
def test_large_networks_of_the_paper_have_an_output(size):
    mult = {128: (1, 1, 2, 3, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}[size]
    with torch.device("meta"):
        model = UNet(
            UNetConfig(
                image_size=size, model_channels=256, num_res_blocks=2, channel_mult=mult,
                attention_resolutions=(32, 16, 8), num_head_channels=64, resblock_updown=True,
                num_classes=1000,
            )
        )  # fmt: skip
        labels = torch.zeros(1, dtype=torch.int64)
        assert model(torch.empty(1, 3, size, size), torch.empty(1), labels).shape[1:] == (
            6,
            size,
            size,
        )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attention_order": "newest"}, "attention_order must be one of legacy, new, got 'newest'"),
        ({"num_head_channels": 48}, "num_head_channels must divide the .* got 48"),
        ({"num_head_channels": 0}, "num_head_channels must be at least 1, got 0"),
        ({"channel_mult": (0.3, 1)}, "channel_mult must give every level a multiple of 32 .* 0.3"),
        ({"channel_mult": (float("nan"), 1)}, "channel_mult must be above 0, got nan"),
        ({"channel_mult": (float("inf"), 1)}, "channel_mult must be above 0, got inf"),
    ],
)
def test_wrong_options_are_refused(change, says):
    with pytest.raises(ValueError, match=f"UNetConfig: {says}"):
        UNetConfig(**{"image_size": 16, "channel_mult": (1, 2), **change})
    with pytest.raises(TypeError, match="UNetConfig: resblock_updown must be a bool, got 1"):
        UNetConfig(resblock_updown=1)


def test_configuration_with_options_survives_json():
    config = UNetConfig(
        image_size=64, channel_mult=(0.5, 1.0, 2), num_head_channels=32, attention_order="new",
        resblock_updown=True, attention_resolutions=(16,),
    )  # fmt: skip
    back = UNetConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert [type(m) for m in back.channel_mult] == [float, int, int]
    assert ClassifierConfig.from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY


def test_configuration_from_before_the_options_keeps_its_meaning():
    old = {
        k: v
        for k, v in UNetConfig().to_dict().items()
        if k not in ("num_head_channels", "attention_order", "resblock_updown")
    }
    assert UNetConfig.from_dict(old) == UNetConfig()


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"resblock_updown": True}, "resblock_updown=True"),
        ({"attention_order": "new"}, "the legacy order"),
    ],
)
def test_networks_that_the_engine_cannot_run_are_sampled_as_modules(option, says):
    config = UNetConfig(
        image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1, 2),
        attention_resolutions=(4,), **option,
    )  # fmt: skip
    model = UNet(config).eval()
    fill_by_formula(model)
    model.diffusion = iddpm_ext.Diffusion("linear", 50)
    assert says in (why_not_supported(model) or "")
    drawn = {}
    for engine in (True, False):
        drawn[engine] = iddpm_ext.sample(model, steps=2, n=2, engine=engine, progress=False)
    assert torch.equal(drawn[True], drawn[False])


def test_engine_runs_heads_of_a_given_width_and_fractional_levels():
    config = UNetConfig(
        image_size=16, model_channels=64, num_res_blocks=1, channel_mult=(0.5, 1, 2),
        attention_resolutions=(8,), num_head_channels=32,
    )  # fmt: skip
    model = UNet(config).eval()
    if why_not_supported(model) is not None:
        pytest.skip(why_not_supported(model))
    fill_by_formula(model)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 3.0])
    engine = CPUEngine(model, 2)
    engine.begin(t[:1], None)
    with torch.no_grad():
        torch.testing.assert_close(engine(x, 0), model(x, t), rtol=1e-4, atol=1e-4)


def test_classifier_starts_at_equal_odds_where_the_original_does():
    logits = Classifier(replace(TINY, pool="adaptive"))(torch.randn(2, 3, 8, 8), torch.ones(2))
    assert torch.count_nonzero(logits) == 0


def test_classifier_has_a_gradient_in_the_image():
    model = Classifier(TINY)
    fill_by_formula(model)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    log_p = model(x, torch.ones(2)).log_softmax(dim=1)
    (gradient,) = torch.autograd.grad(log_p[:, 1].sum(), x)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"x": torch.zeros(2, 3, 8, 8).long()}, TypeError, "x must be floating point"),
        ({"x": torch.zeros(2, 1, 8, 8)}, ValueError, r"x must be \[N, 3, H, W\]"),
        ({"x": torch.zeros(2, 3, 8, 7)}, ValueError, ".*multiples of 2, got 8x7"),
        ({"x": torch.zeros(2, 3, 16, 16)}, ValueError, ".*8x8 for pool 'attention', got 16x16"),
        ({"timesteps": torch.zeros(3)}, ValueError, r"timesteps must be \[2\], got \[3\]"),
        ({"timesteps": 3}, TypeError, "timesteps must be a tensor, got int"),
    ],
)
def test_wrong_input_of_a_classifier_is_refused(arguments, error, says):
    given = {"x": torch.zeros(2, 3, 8, 8), "timesteps": torch.zeros(2), **arguments}
    with pytest.raises(error, match=f"Classifier: {says}"):
        Classifier(TINY)(**given)


def test_wrong_classifier_configuration_is_refused():
    with pytest.raises(ValueError, match=r"pool must be one of attention, .* got 'mean'"):
        replace(TINY, pool="mean")
    with pytest.raises(ValueError, match="num_head_channels must be given for pool 'attention'"):
        replace(TINY, num_head_channels=None)
    with pytest.raises(ValueError, match=r"must be fields of ClassifierConfig, got \['width'\]"):
        ClassifierConfig.from_dict({"width": 3})
    with pytest.raises(TypeError, match="config must be a ClassifierConfig, got UNetConfig"):
        Classifier(UNetConfig())


def test_classifier_guides_a_network_of_its_family():
    config = UNetConfig(
        image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1, 2), num_classes=5,
        attention_resolutions=(4,), num_head_channels=32, attention_order="new",
        resblock_updown=True,
    )  # fmt: skip
    model, classifier = UNet(config).eval(), Classifier(replace(TINY, pool="adaptive")).eval()
    for network in (model, classifier):
        fill_by_formula(network)
    with torch.no_grad():
        model.out[2].weight.mul_(0.1)
    model.diffusion = iddpm_ext.Diffusion("linear", 50, rescale_timesteps=False)
    labels = torch.tensor([0, 1, 2, 3])
    chance = {}
    # These weights make an indifferent classifier: its gradient needs a large factor.
    for scale in (0.0, 3000.0):
        guide = iddpm_ext.classifier_gradient(classifier, scale)
        x = iddpm_ext.sample(model, 25, labels=labels, cond_fn=guide, progress=False)
        with torch.no_grad():
            log_p = classifier(x, torch.zeros(4)).log_softmax(dim=1)
        chance[scale] = log_p[torch.arange(4), labels].mean()
    assert chance[3000.0] > chance[0.0] + 0.01

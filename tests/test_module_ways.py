"""A `UNet` as any other module: the transforms of `torch.func`, parametrizations, wrappers, compilation."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from matrix import Case
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from iddpm_ext import UNet, sample
from iddpm_ext.engines.cpu.engine import CPUEngine
from iddpm_ext.sampling.loop import network_of
from iddpm_ext.sampling.request import make_request

OPTIONS = {"labels": [1, 2], "seed": 3, "progress": False}


@pytest.fixture
def model() -> UNet:
    network = Case().network
    assert isinstance(network, UNet)
    return network.requires_grad_(False)


@pytest.fixture
def given() -> tuple[Tensor, Tensor, Tensor]:
    return Case().given["noise"], torch.tensor([3.0, 30.0]), torch.tensor([2, -1])


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def truth(model: UNet, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    x, t, y = given
    return copy.deepcopy(model).double()(x.double(), t.double(), y)


def test_functional_call_computes_with_the_weights_that_it_is_given(model, given):
    halves = {name: p * 0.5 for name, p in model.named_parameters()}
    changed = copy.deepcopy(model)
    changed.load_state_dict(halves)
    assert torch.equal(functional_call(model, halves, given), changed(*given))


def test_vmap_over_samples_and_over_networks_is_the_network(model, given):
    wanted = truth(model, given)
    least = error(model(*given), wanted)
    single = vmap(lambda x, t, y: model(x[None], t[None], y[None])[0])(*given)
    assert error(single, wanted) < 4 * least
    other = copy.deepcopy(model)
    other.out[2].weight.data.mul_(-1)
    weights, buffers = stack_module_state([model, other])
    both = vmap(lambda p, b: functional_call(model, (p, b), given))(weights, buffers)
    assert error(both[0], wanted) < 4 * least
    assert error(both[1], truth(other, given)) < 4 * least


def test_jvp_and_grad_are_derivatives(model, given):
    x, t, y = given
    direction = torch.ones_like(x)
    value, along = jvp(lambda x: model(x, t, y), (x,), (direction,))
    exact = copy.deepcopy(model).double()

    def shifted(by: float) -> Tensor:
        return exact(x.double() + by * direction.double(), t.double(), y)

    wanted = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
    assert error(value, truth(model, given)) < 1e-5
    assert error(along, wanted) < 1e-4
    gradient = grad(lambda x: model(x, t, y).sum())(x)
    assert abs(float(gradient.sum()) / float(wanted.sum()) - 1) < 1e-3


@pytest.mark.parametrize(
    "path", ["input_blocks.0.0", "time_embed.0", "middle_block.1.qkv", "out.2"]
)
def test_weight_norm_leaves_the_output_and_its_scale_counts(path, model, given):
    normed = copy.deepcopy(model)
    layer = nn.utils.parametrizations.weight_norm(normed.get_submodule(path))
    assert error(normed(*given), truth(model, given)) < 1e-5
    layer.parametrizations.weight.original0.data.mul_(2)
    changed = copy.deepcopy(model)
    changed.get_submodule(path).weight.data.mul_(2)
    assert error(normed(*given), truth(changed, given)) < 1e-5


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda model: torch.compile(model, backend="eager"), "OptimizedModule"),
        (nn.DataParallel, "DataParallel"),
    ],
)
def test_a_wrapped_network_says_what_it_is_and_runs_itself(wrap, name, model):
    wanted = sample(model, 3, engine=False, **OPTIONS)
    with pytest.warns(RuntimeWarning, match=f"the network is wrapped by a {name}"):
        images = sample(wrap(model), 3, **OPTIONS)
    assert error(images, wanted) < 1e-5


def test_a_warning_comes_once_a_network_and_none_where_no_engine_could_run_it(model):
    handle = model.middle_block[0].register_forward_hook(lambda *_: None)
    with pytest.warns(RuntimeWarning, match=r"sample: .* middle_block\.0 has forward hooks"):
        sample(model, 2, **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(model, 2, **OPTIONS)
        handle.remove()
        sample(model, 2, **OPTIONS)
        model.double().middle_block[0].register_forward_hook(lambda *_: None)
        sample(model, 2, engine=False, **OPTIONS)


def test_what_is_added_and_taken_away_again_leaves_the_engine_in_use(model):
    request = make_request("sample", model, 2, **OPTIONS)
    for _ in range(2):
        assert isinstance(network_of(request), CPUEngine)
        handle = model.out[2].register_forward_hook(lambda *_: None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert not isinstance(network_of(request), CPUEngine)
        handle.remove()
    model.remark = "an attribute that nothing reads"
    model.out[2].register_full_backward_hook(lambda *_: None)
    assert isinstance(network_of(request), CPUEngine)


def test_looking_at_a_network_draws_no_random_numbers(model):
    from iddpm_ext.engines import structure

    structure._expected.cache_clear()
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    sample(model, 2, **OPTIONS)
    assert torch.equal(torch.rand(3), wanted)

"""`adamw_ema` against PyTorch's own AdamW and moving averages, over many steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_calls import same_bits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from iddpm_ext import _native, ops

BACKENDS = ["reference", *([] if _native.cpu_absence() else ["cpu"])]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
# An eps large enough to show whether it is added inside or outside of the root.
LR, BETAS, EPS, DECAY = 0.01, (0.9, 0.99), 1e-3, 0.05


def _state(model: nn.Module, decays: tuple[float, ...]) -> dict[str, Any]:
    params = [p.detach().clone() for p in model.parameters()]
    return {
        "params": params,
        "exp_avgs": [torch.zeros_like(p) for p in params],
        "exp_avg_sqs": [torch.zeros_like(p) for p in params],
        "emas": [[p.clone() for p in params] for _ in decays],
        "decays": list(decays),
        "lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY,
    }  # fmt: skip


def _model() -> nn.Module:
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 1, 1)).double().float()
    )


def _gradients(model: nn.Module, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn_like(p) for p in model.parameters()]


@each_backend
def test_fifty_steps_equal_torchs_adamw_and_averaged_model(backend):
    model, decays = _model(), (0.9, 0.999)
    state = _state(model, decays)
    optimizer = torch.optim.AdamW(model.parameters(), LR, BETAS, EPS, DECAY)
    averaged = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(d)) for d in decays]
    for average in averaged:
        average.n_averaged.fill_(1)  # so that theirs starts at the weights too
    for step in range(1, 51):
        grads = _gradients(model, step)
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad = grad
        optimizer.step()
        for average in averaged:
            average.update_parameters(model)
        ops.adamw_ema(**state, grads=grads, step=step, backend=backend)
    torch.testing.assert_close(state["params"], list(model.parameters()), rtol=1e-5, atol=1e-6)
    moments = [optimizer.state[p] for p in model.parameters()]
    torch.testing.assert_close(state["exp_avgs"], [m["exp_avg"] for m in moments])
    torch.testing.assert_close(state["exp_avg_sqs"], [m["exp_avg_sq"] for m in moments])
    for values, average in zip(state["emas"], averaged, strict=True):
        torch.testing.assert_close(values, list(average.parameters()), rtol=1e-5, atol=1e-6)


@each_backend
def test_scale_step_and_copies_on_the_device_change_nothing_but_where_numbers_come_from(backend):
    model = _model()
    plain, other = _state(model, (0.9,)), _state(model, (0.9,))
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in plain["params"]]
    for step in range(1, 5):
        grads = _gradients(model, step)
        ops.adamw_ema(**plain, grads=grads, step=step, backend=backend)
        ops.adamw_ema(
            **other,
            grads=[g * 1024 for g in grads],
            step=torch.tensor(step),
            grad_scale=torch.tensor(1 / 1024),
            found_inf=torch.zeros(1),
            copies=copies,
            backend=backend,
        )
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        assert all(same_bits(a, b) for a, b in zip(plain[name], other[name], strict=True))
    assert all(same_bits(c, p.bfloat16()) for c, p in zip(copies, plain["params"], strict=True))


@each_backend
def test_where_an_infinity_was_found_not_a_bit_changes(backend):
    model = _model()
    state = _state(model, (0.9,))
    copies = [p.half() for p in state["params"]]
    lists = [state["params"], state["exp_avgs"], state["exp_avg_sqs"], *state["emas"], copies]
    before = [[x.clone() for x in values] for values in lists]
    grads = [g * float("inf") for g in _gradients(model, 1)]
    found = torch.tensor(1.0)
    ops.adamw_ema(**state, grads=grads, step=1, found_inf=found, copies=copies, backend=backend)
    for values, old in zip(lists, before, strict=True):
        assert all(same_bits(a, b) for a, b in zip(values, old, strict=True))


@each_backend
def test_a_parameters_result_does_not_depend_on_the_tensors_beside_it(backend):
    model = _model()
    whole, alone = _state(model, (0.9,)), _state(model, (0.9,))
    grads = _gradients(model, 1)
    ops.adamw_ema(**whole, grads=grads, step=1, backend=backend)
    for i in range(len(grads)):
        lists = ("params", "exp_avgs", "exp_avg_sqs")
        one = {**alone, **{name: [alone[name][i]] for name in lists}}
        one["emas"] = [[alone["emas"][0][i]]]
        ops.adamw_ema(**one, grads=[grads[i]], step=1, backend=backend)
    assert all(same_bits(a, b) for a, b in zip(whole["params"], alone["params"], strict=True))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no C++ kernels here")
def test_threads_do_not_change_a_bit():
    results = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        state = _state(nn.Linear(300, 200), (0.9,))
        state["params"] = [torch.linspace(-1, 1, p.numel()).view(p.shape) for p in state["params"]]
        torch.set_num_threads(threads)
        ops.adamw_ema(**state, grads=[p.cos() for p in state["params"]], step=1, backend="cpu")
        results.append(state["params"])
    torch.set_num_threads(before)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@each_backend
def test_parameters_that_require_gradients_are_updated_and_count_a_new_version(backend):
    model = _model()
    state = _state(model, ())
    state["params"] = list(model.parameters())
    versions = [p._version for p in state["params"]]
    ops.adamw_ema(**state, grads=_gradients(model, 1), step=1, backend=backend)
    assert all(p._version > v for p, v in zip(state["params"], versions, strict=True))
    assert all(p.requires_grad and p.grad_fn is None for p in state["params"])


def test_no_parameters_are_no_work():
    state = {**_state(nn.Identity(), (0.9,)), "grads": []}
    assert ops.adamw_ema(**state, step=1) is None


@each_backend
def test_an_average_of_decay_0_is_the_weights_and_of_decay_1_stays(backend):
    model = _model()
    state = _state(model, (0.0, 1.0))
    state["emas"] = [[torch.randn_like(p) * 100 for p in state["params"]] for _ in range(2)]
    before = [x.clone() for x in state["emas"][1]]
    ops.adamw_ema(**state, grads=_gradients(model, 1), step=1, backend=backend)
    assert all(same_bits(a, p) for a, p in zip(state["emas"][0], state["params"], strict=True))
    assert all(same_bits(a, b) for a, b in zip(state["emas"][1], before, strict=True))

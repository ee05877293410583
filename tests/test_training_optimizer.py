"""The optimiser of the training loop against PyTorch's AdamW, clipping, averages and loss scaler."""

from __future__ import annotations

import pytest
import torch
from op_calls import same_bits
from torch import Tensor, nn

from iddpm_ext.training.optimizer import MOMENTS, AdamWEMA
from iddpm_ext.training.rates import ema_decay
from iddpm_ext.training.step import _clip_factor

DECAYS = (0.9, 0.999)


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3))


def _averages(model: nn.Module) -> dict[float, dict[str, Tensor]]:
    return {d: {n: p.detach().clone() for n, p in model.named_parameters()} for d in DECAYS}


def _loss(model: nn.Module, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return model(torch.randn(4, 5)).square().mean()


@pytest.mark.parametrize("grad_clip", [None, 0.05, 1e3])
def test_steps_equal_torchs_adamw_with_clipping_and_a_warmed_up_average(grad_clip):
    ours, theirs = _network(), _network()
    averages, expected = _averages(ours), _averages(theirs)
    optimizer = AdamWEMA(ours.parameters(), averages, lr=0.01, weight_decay=0.1)
    yardstick = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(20):
        for group in (*optimizer.param_groups, *yardstick.param_groups):
            group["lr"] = 0.01 / (1 + step / 10)
        optimizer.zero_grad()
        _loss(ours, step).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in ours.parameters()])
        decays = [ema_decay(40 * step, d) for d in DECAYS]  # alike at first, and then not
        bad = torch.zeros(())
        optimizer.step(decays=decays, bad=bad, factor=_clip_factor(norm, grad_clip))
        yardstick.zero_grad()
        _loss(theirs, step).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), grad_clip or float("inf"))
        yardstick.step()
        for decay, values in zip(decays, expected.values(), strict=True):
            for name, p in theirs.named_parameters():
                values[name].lerp_(p.detach(), 1 - decay)
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()))
    for decay, values in expected.items():
        torch.testing.assert_close(averages[decay], values)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        for moment in MOMENTS:
            torch.testing.assert_close(optimizer.state[p][moment], yardstick.state[q][moment])


def test_a_loss_scalers_infinity_skips_the_step_and_halves_the_scale():
    model = _network()
    averages = _averages(model)
    optimizer = AdamWEMA(model.parameters(), averages, lr=0.01, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(True))
    plain = _network()
    yardstick = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.1)
    for step, infinite in enumerate((False, True, False)):
        before = [x.clone() for x in (*model.parameters(), *averages[0.9].values())]
        optimizer.zero_grad()
        scaler.scale(_loss(model, step)).backward()
        if infinite:
            next(model.parameters()).grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        scaler.step(optimizer, decays=DECAYS, bad=torch.zeros(()))
        scaler.update()
        if infinite:
            after = [*model.parameters(), *averages[0.9].values()]
            assert all(same_bits(a, b.detach()) for a, b in zip(before, after, strict=True))
        else:
            yardstick.zero_grad()
            _loss(plain, step).backward()
            yardstick.step()
    assert float(optimizer.updates) == 2 and scaler.get_scale() == 512
    assert (
        len(called) == 3
    )  # the verdict is handed over, not read on the host, which would have to wait
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))


@pytest.mark.parametrize("scaled", [False, True], ids=["alone", "though the scaler found none"])
def test_a_gradient_that_is_called_bad_leaves_everything_alone(scaled):
    model = _network()
    averages = _averages(model)
    optimizer = AdamWEMA(model.parameters(), averages, lr=0.01, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    scaler.scale(_loss(model, 0)).backward()
    before = [x.detach().clone() for x in model.parameters()]
    scaler.unscale_(optimizer)
    scaler.step(optimizer, decays=DECAYS, bad=torch.ones(()))
    assert all(same_bits(a, b.detach()) for a, b in zip(before, model.parameters(), strict=True))
    assert float(optimizer.updates) == 0
    moments = [m for entry in optimizer.state.values() for m in entry.values()]
    assert all(not m.any() for m in moments)

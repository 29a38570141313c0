"""Loops that own forward and backward, and passes that were run in the wrong mode."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from kbfgs_ext import DirectionRule
from tests.optim.models import (
    METHODS,
    absolute,
    assert_same,
    assert_same_weights,
    closure_of,
    four_calls,
    problem,
    rows,
    snapshot,
)


@METHODS
@pytest.mark.parametrize("action", ["ema", "minibatch"])
@pytest.mark.parametrize(
    "every",
    [{}, {"pair_every": 2, "factors": absolute(update_every=3)}],
    ids=["1", "2, 3"],
)
def test_the_four_calls_are_a_step(method, action, every):
    """Bit for bit, with dropout, BatchNorm, a fallback and a scheduler that does not complain."""

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(7, 3)
        )
        opt = method(model, hessian_action=action, fallback=torch.optim.AdamW, lr=2.0, **every)
        x, target = rows(12, 5, torch.float32), rows(12, 3, torch.float32, seed=1)
        return model, opt, closure_of(model, opt, x, target)

    runs = []
    for step in (lambda opt, closure: opt.step(closure), four_calls):
        model, opt, closure = build()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            schedule = schedulers.CosineAnnealingLR(opt, 10)
            for _ in range(7):
                step(opt, closure)
                schedule.step()
        runs.append({**snapshot(model, opt), **dict(model.named_buffers()), **opt.counters()})
    assert_same(*runs)


def test_calls_out_of_order():
    _, opt, closure = problem()
    with pytest.raises(RuntimeError, match=r"descend\(loss\) is out of order: first_pass\(\)"):
        opt.descend(torch.ones(()))
    with opt.first_pass():
        with pytest.raises(RuntimeError, match=r"descend\(loss\) is out of order"):
            opt.descend(torch.ones(()))
        with pytest.raises(RuntimeError, match="inside the first pass"):
            opt.step(closure)
        loss = closure()
    with (
        pytest.raises(RuntimeError, match=r"second_pass\(\) is out of order: descend\(loss\)"),
        opt.second_pass(),
    ):
        pass
    opt.descend(loss)
    with pytest.raises(RuntimeError, match=r"finish\(loss\) is out of order: second_pass\(\)"):
        opt.finish(loss)
    opt.step(closure)  # the abandoned step has no pair, and nothing is stuck
    assert int(opt.counters()["steps"]) == 2
    assert int(opt.diagnostics()["0"]["accepted"]) + int(opt.diagnostics()["0"]["rejected"]) == 1


def test_an_error_in_the_second_pass_of_a_plain_loop_takes_the_step_back():
    model, opt, closure = problem()
    opt.step(closure)
    before = copy.deepcopy(model.state_dict())
    with opt.first_pass():
        loss = closure()
    opt.descend(loss)
    assert not torch.equal(before["0.weight"], model[0].weight)
    with pytest.raises(KeyboardInterrupt), opt.second_pass():
        raise KeyboardInterrupt
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value)
    assert not opt.second_pass_due and all(p.requires_grad for p in model.parameters())


def test_an_error_in_the_first_pass_of_a_plain_loop_changes_nothing():
    model, opt, closure = problem()
    opt.step(closure)
    before = snapshot(model, opt)
    with pytest.raises(KeyboardInterrupt), opt.first_pass():
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match=r"first_pass\(\) comes next"):
        opt.descend(torch.ones(()))
    assert_same(before, snapshot(model, opt))
    opt.step(closure)


def no_grad_closures(model, opt, x):
    def with_backward():
        opt.zero_grad()
        with torch.no_grad():
            loss = model(x).square().mean()
        loss.backward()
        return loss

    def without_backward():
        opt.zero_grad()
        with torch.no_grad():
            return model(x).square().mean()

    def inference():
        opt.zero_grad()
        with torch.inference_mode():
            loss = model(x).square().mean()
        loss.backward()
        return loss

    return {"backward": with_backward, "no backward": without_backward, "inference": inference}


@pytest.mark.parametrize("which", ["backward", "no backward", "inference"])
def test_a_closure_that_turns_gradients_off(which):
    model, opt, closure = problem()
    opt.step(closure)
    before = snapshot(model, opt)
    with pytest.raises(RuntimeError, match=r"covered layers ran under torch.no_grad\(\)"):
        opt.step(no_grad_closures(model, opt, rows(12, 5))[which])
    assert_same(before, snapshot(model, opt))
    opt.step(closure)


def test_a_step_under_no_grad_and_inference_mode():
    model, opt, closure = problem()
    twin, opt_twin, closure_twin = problem()
    with torch.no_grad():
        opt.step(closure)
    opt_twin.step(closure_twin)
    assert_same_weights(model, twin)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        opt.step(closure)


def test_reentrant_checkpointing_is_refused():
    from torch.utils.checkpoint import checkpoint

    model, opt, _ = problem()
    x = rows(12, 5).requires_grad_()

    def closure():
        opt.zero_grad()
        loss = checkpoint(model, x, use_reentrant=True).square().mean()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="layer '0'.*use_reentrant=False"):
        opt.step(closure)


@METHODS
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "direction": DirectionRule(step_length="direction", nesterov=False),
            "lr": 0.02,
            "pair_every": 2,
        },
        {"hessian_action": "ema"},
    ],
    ids=["paper", "spectral", "ema"],
)
def test_the_default_device_is_the_user_s_own(method, backend, options):
    """What `torch.set_default_device` says moves nothing of ours: with "meta" it would have no
    values."""
    runs = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        x, target = rows(12, 5, torch.float32), rows(12, 3, torch.float32, seed=1)
        with torch.device(device):
            opt = method(model, backend=backend, **options)
            closure = closure_of(model, opt, x, target)
            opt.warm_start([x[:6], x[6:]])
            for _ in range(3):
                opt.step(closure)
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
            for _ in range(3):
                opt.step(closure)
            opt.explain(), opt.summary(), opt.memory_usage(), opt.coverage()
        runs.append({**snapshot(model, opt), **opt.counters()})
    assert_same(*runs)

"""Gradients from before a step: every way to zero them, and those that are refused."""

import copy
import warnings

import pytest
import torch
from torch import nn

from tests.optim.loops import (
    assert_g_bar_is_the_bias_gradient,
    assert_one_run,
    backward_of,
    train,
)
from tests.optim.models import METHODS, four_calls, mlp, newton, rows


def each(act):
    return lambda opt, model: [act(p) for p in model.parameters() if p.grad is not None]


ZEROING = {
    "opt": lambda opt, model: opt.zero_grad(),
    "opt, in place": lambda opt, model: opt.zero_grad(set_to_none=False),
    "model": lambda opt, model: model.zero_grad(),
    "model, in place": lambda opt, model: model.zero_grad(set_to_none=False),
    "grad = None": each(lambda p: setattr(p, "grad", None)),
    "grad.zero_()": each(lambda p: p.grad.zero_()),
    "detach_().zero_()": each(lambda p: p.grad.detach_().zero_()),
    "grad = zeros": each(lambda p: setattr(p, "grad", torch.zeros_like(p))),
    "foreach": lambda opt, model: torch._foreach_zero_(
        [p.grad for p in model.parameters() if p.grad is not None] or [torch.zeros(())]
    ),
}


def with_and_without_bias():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 6, dtype=torch.float64), nn.Tanh(), nn.Linear(6, 3, bias=False).double()
    )


# Zeros from before the step cannot be told from other gradients without a read of the device,
# unless the optimizer has made them.
PLACES = [(how, where) for how in ZEROING for where in ("first", "before backward")]
PLACES += [(how, "outside") for how in ("opt", "opt, in place", "model", "grad = None")]


@pytest.mark.parametrize(("how", "where"), PLACES, ids=[" ".join(place) for place in PLACES])
@pytest.mark.parametrize("plain_loop", [False, True], ids=["closure", "plain loop"])
def test_every_way_to_zero_gradients(how, where, plain_loop):
    runs, x = [], rows(12, 5)
    for zero, at in ((ZEROING["opt"], "first"), (ZEROING[how], where)):
        model = with_and_without_bias()
        opt = newton(model)

        def closure(model=model, opt=opt, zero=zero, at=at):
            if at == "first":
                zero(opt, model)
            loss = (model(x) - 1).square().mean()
            if at == "before backward":
                zero(opt, model)
            loss.backward()
            return loss

        for _ in range(3):
            if at == "outside":
                zero(opt, model)
            four_calls(opt, closure) if plain_loop else opt.step(closure)
        runs.append((model, opt))
    assert_one_run(*runs)


@METHODS
@pytest.mark.parametrize("plain_loop", [False, True], ids=["closure", "plain loop"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_from_before_the_step_are_refused(method, plain_loop, bias):
    torch.manual_seed(0)
    model, x = mlp(5, 6, 3, bias=bias), rows(12, 5)
    opt, work = method(model), backward_of(lambda m: (m(x) - 1).square().mean())
    train(model, opt, work, steps=2)
    model.zero_grad()
    work(model)
    with pytest.raises(RuntimeError, match=r"gradients from before the step: that of layer '2'"):
        four_calls(opt, lambda: work(model)) if plain_loop else opt.step(lambda: work(model))
    assert_g_bar_is_the_bias_gradient(model, opt, work)


def test_heads_that_take_turns_and_zero_their_own_gradients():
    """A gradient that the step has not made moves nothing."""
    torch.manual_seed(0)
    model, x = nn.ModuleList([nn.Linear(4, 2).double() for _ in range(2)]), rows(8, 4)
    opt = newton(model)

    def closure_of_head(head):
        def closure():
            head.zero_grad()
            loss = (head(x) - 1).square().mean()
            loss.backward()
            return loss

        return closure

    for k in range(4):
        idle = model[1 - k % 2]
        before = copy.deepcopy(idle.state_dict())
        opt.step(closure_of_head(model[k % 2]))
        assert all(torch.equal(before[name], value) for name, value in idle.state_dict().items())
    assert all(int(opt.diagnostics()[name]["accepted"]) for name in "01")


# New zeros that a closure assigns look like any gradient: there a layer is named without need.
@pytest.mark.parametrize("zero", [how for how in ZEROING if how != "grad = zeros"])
def test_a_layer_that_is_not_used_in_every_step(zero):
    """Zeros in its gradient are no sign of a weight used by hand: nobody is warned."""
    torch.manual_seed(0)
    model, x = nn.ModuleList([nn.Linear(4, 2).double() for _ in range(2)]), rows(8, 4)
    opt = newton(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(4):

            def closure(head=model[k % 2]):
                ZEROING[zero](opt, model)
                loss = (head(x) - 1).square().mean()
                loss.backward()
                return loss

            opt.step(closure)
    assert all(int(opt.diagnostics()[name]["accepted"]) for name in "01")


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_the_gradient_that_a_frozen_half_still_has(name):
    """Nothing adds to it: who zeroes only what is trained is right."""
    model, x = mlp(4, 6, 3), rows(10, 4)
    opt = newton(model)

    def closure():
        for p in model.parameters():
            if p.requires_grad and p.grad is not None:
                p.grad.zero_()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    opt.step(closure)
    half = getattr(model[0], name).requires_grad_(False)
    before, gradient = half.detach().clone(), half.grad.clone()
    losses = [opt.step(closure).item() for _ in range(3)]
    assert torch.equal(half, before) and torch.equal(half.grad, gradient)
    assert losses[-1] < losses[0]


def test_zeros_of_the_optimizer_that_are_filled_before_the_step():
    model, x = mlp(4, 6, 3), rows(10, 4)
    opt, work = newton(model), backward_of(lambda m: (m(x) - 1).square().mean())
    train(model, opt, work, steps=2)
    opt.zero_grad(set_to_none=False)
    work(model)
    with pytest.raises(RuntimeError, match=r"gradients from before the step"):
        opt.step(lambda: work(model))

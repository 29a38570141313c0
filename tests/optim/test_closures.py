"""What closures do beside one forward and one backward: derivatives, penalties, clipping.

Every case trains as its plain twin does, to 1e-10 in float64.
"""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from tests.optim.loops import (
    assert_g_bar_is_the_bias_gradient,
    assert_one_run,
    assert_trains_as,
    backward_of,
    gradients_of,
    train,
)
from tests.optim.models import METHODS, absolute, rows

ACTIONS = pytest.mark.parametrize("action", ["ema", "minibatch"])
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
TARGET = rows(12, 3, seed=1)


def net(bias=True, d_out=3):
    torch.manual_seed(0)
    first = nn.Linear(4, 6, bias=bias, dtype=torch.float64)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(6, d_out, bias=bias, dtype=torch.float64))


def x_of():
    return rows(12, 4)


def error_of(out):
    return (out - TARGET).square().mean()


FULL = absolute(freeze_second_pass=False)
PLAIN = backward_of(lambda m: error_of(m(x_of())))


# ---------------------------------------------------------------------- derivatives of the model


def penalty(m):
    x = x_of().requires_grad_()
    out = m(x)
    (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return error_of(out), dx.square().mean()


def penalty_by_hand(m):
    x = x_of()
    h = torch.tanh(m[0](x))
    dx = (m[2].weight.sum(0) * (1 - h**2)) @ m[0].weight
    return error_of(m[2](h)), dx.square().mean()


@METHODS
@ACTIONS
@BIAS
def test_gradient_penalty(method, action, bias):
    assert_trains_as(
        net(bias),
        backward_of(lambda m: sum(penalty(m))),
        backward_of(lambda m: sum(penalty_by_hand(m))),
        lambda m: method(m, hessian_action=action),
    )


@METHODS
@BIAS
def test_a_loss_of_derivatives_alone(method, bias):
    """The last bias has no gradient: it stays, and its layer's g_bar is 0."""

    def plainly(m):
        error, derivatives = penalty_by_hand(m)
        loss = 0 * error + derivatives
        loss.backward()
        if bias:
            m[2].bias.grad = None
        return loss.detach()

    model, work = net(bias), backward_of(lambda m: penalty(m)[1])
    assert_trains_as(model, work, plainly, method)
    assert_g_bar_is_the_bias_gradient(model, method(model), work)


def jacobian_term(m):
    jacobian = torch.autograd.functional.jacobian(m, x_of()[:2], create_graph=True)
    return error_of(m(x_of())) + jacobian.square().sum()


def sobolev(m):
    """A physics-informed loss: an equation of u'' at some points, values at others."""
    x = x_of().requires_grad_()
    u = m(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
    return (ddu - u.sum(1, keepdim=True)).square().mean() + error_of(m(x_of() * 2))


@METHODS
@BIAS
@pytest.mark.parametrize("loss_of", [jacobian_term, sobolev])
def test_g_bar_under_derivatives(method, bias, loss_of):
    model = net(bias)
    assert_g_bar_is_the_bias_gradient(model, method(model), backward_of(loss_of))


@METHODS
@ACTIONS
@BIAS
def test_an_attack_is_no_use_of_the_layers(method, action, bias):
    """PGD: the same as with examples that a copy of the model has made."""

    def attack(m):
        moved = x_of()
        for _ in range(2):
            moved.requires_grad_()
            (dx,) = torch.autograd.grad(error_of(m(moved)), moved)
            moved = (moved + 0.1 * dx.sign()).detach()
        return moved

    def copied(m):
        twin = net(bias)
        twin.load_state_dict(m.state_dict())
        return attack(twin)

    assert_trains_as(
        net(bias),
        backward_of(lambda m: error_of(m(attack(m)))),
        backward_of(lambda m: error_of(m(copied(m)))),
        lambda m: method(m, hessian_action=action),
    )


def no_grad(m, x):
    with torch.no_grad():
        return m(x)


@METHODS
@BIAS
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("on_the_side", ["detached", "grad of x"])
def test_a_forward_without_part_in_the_loss(method, bias, when, on_the_side):
    """Targets made with gradients on are those made without."""
    other = rows(30, 4, seed=5)

    def side(m):
        if on_the_side == "grad of x":
            x = other.clone().requires_grad_()
            return torch.autograd.grad(m(x).sum(), x)[0][:12, :3]
        return m(other)[:12].detach()

    def loss_with(make):
        def loss_of(m):
            target = make(m) if when == "before" else None
            out = m(x_of())
            target = make(m) if target is None else target
            return (out - 0.5 * target.detach()).square().mean() + error_of(out)

        return backward_of(loss_of)

    def without(m):
        if on_the_side == "grad of x":
            twin = net(bias)
            twin.load_state_dict(m.state_dict())
            return side(twin)
        return no_grad(m, other)[:12]

    assert_trains_as(net(bias), loss_with(side), loss_with(without), method)


def maml(m, inner):
    fast = inner(m)
    return error_of(functional_call(m, fast, (x_of() * 0.5,)))


def inner_by_autograd(m):
    names, parameters = zip(*m.named_parameters(), strict=True)
    grads = torch.autograd.grad(error_of(m(x_of())), parameters, create_graph=True)
    return {n: p - 0.1 * g for n, p, g in zip(names, parameters, grads, strict=True)}


def inner_by_hand(m):
    x = x_of()
    error = 2 * (m(x) - TARGET) / TARGET.numel()
    return {"weight": m.weight - 0.1 * error.T @ x, "bias": m.bias - 0.1 * error.sum(0)}


@METHODS
def test_inner_steps_on_parameters(method):
    """MAML: the loss after a step of its own. Refused by name while the second pass is frozen."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, dtype=torch.float64)
    work = backward_of(lambda m: maml(m, inner_by_autograd))
    with pytest.raises(RuntimeError, match="freeze_second_pass=False"):
        train(model, method(model), work, 1)
    assert_trains_as(
        model,
        work,
        backward_of(lambda m: maml(m, inner_by_hand)),
        lambda m: method(m, factors=FULL),
    )


# ---------------------------------------------------------------------- ways to go backward


def twice(m):
    error, extra = error_of(m(x_of())), m(x_of() * 2).square().mean()
    error.backward()
    extra.backward()
    return (error + extra).detach()


def retained(m):
    out = m(x_of())
    error, extra = error_of(out), out.square().mean()
    error.backward(retain_graph=True)
    extra.backward()
    return (error + extra).detach()


def by_the_output(m):
    out = m(x_of())
    out.backward(gradient=2 * (out.detach() - TARGET) / TARGET.numel())
    return error_of(out).detach()


def with_graph(m):
    loss = error_of(m(x_of()))
    loss.backward(create_graph=True)
    return loss.detach()


def taken_and_filled(m):
    x = x_of().requires_grad_()
    loss = error_of(m(x))
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward()
    return loss


BACKWARDS = {
    "two": (twice, backward_of(lambda m: error_of(m(x_of())) + m(x_of() * 2).square().mean())),
    "retained": (
        retained,
        backward_of(lambda m: error_of(out := m(x_of())) + out.square().mean()),
    ),
    "of the output": (by_the_output, PLAIN),
    "create_graph": (with_graph, PLAIN),
    "taken and filled": (taken_and_filled, PLAIN),
}


@METHODS
@BIAS
@pytest.mark.parametrize("how", list(BACKWARDS))
@pytest.mark.filterwarnings("ignore:Using backward. with create_graph")
def test_ways_to_go_backward(method, bias, how):
    assert_trains_as(net(bias), *BACKWARDS[how], method)


def assigns(m):
    loss = error_of(m(x_of()))
    for p, g in zip(m.parameters(), torch.autograd.grad(loss, m.parameters()), strict=True):
        p.grad = g
    return loss


def fills_inputs(m):
    loss = error_of(m(x_of()))
    loss.backward(inputs=list(m.parameters()))
    return loss


def logs(norm_of):
    def work(m):
        loss = PLAIN(m)
        assert norm_of([p.grad for p in m.parameters()]) >= 0
        return loss

    return work


def penalises(m):
    loss = error_of(m(x_of()))
    loss.backward()
    l1 = 1e-2 * sum(p.abs().sum() for p in m.parameters() if p.dim() == 2)
    l1.backward()
    return (loss + l1).detach()


def l1(m):
    return error_of(m(x_of())) + 1e-2 * sum(p.abs().sum() for p in m.parameters() if p.dim() == 2)


def penalises_gradients(m):
    loss = error_of(m(x_of()))
    loss.backward(create_graph=True)
    extra = sum(p.grad.square().sum() for p in m.parameters())
    extra.backward()
    return (loss + extra).detach()


def gradients_penalised(m):
    loss = error_of(m(x_of()))
    grads = torch.autograd.grad(loss, list(m.parameters()), create_graph=True)
    return loss + sum(g.square().sum() for g in grads)


WEIGHT_GRADIENTS = {
    "assigns": (assigns, PLAIN),
    "backward(inputs=)": (fills_inputs, PLAIN),
    "norm": (logs(lambda grads: max(g.norm() for g in grads)), PLAIN),
    "stack": (logs(lambda grads: torch.stack([g.norm() for g in grads]).norm()), PLAIN),
    "foreach": (logs(lambda grads: torch._foreach_norm(grads)[0]), PLAIN),
    "penalty of its own": (penalises, backward_of(l1)),
    "penalty of gradients": (penalises_gradients, backward_of(gradients_penalised)),
}


@METHODS
@BIAS
@pytest.mark.parametrize("how", list(WEIGHT_GRADIENTS))
@pytest.mark.filterwarnings("ignore:Using backward. with create_graph")
def test_closures_that_use_weight_gradients(method, bias, how):
    """Refused by name while the second pass is frozen; the plain closure's run if it is not."""
    work, plainly = WEIGHT_GRADIENTS[how]
    model = net(bias)
    with pytest.raises(RuntimeError, match="freeze_second_pass=False"):
        train(model, method(model), work, 1)
    if not bias and how in ("assigns", "backward(inputs=)"):
        model = net(bias)
        opt = method(model, factors=FULL)
        with pytest.warns(UserWarning, match="curvature does not follow") as said:
            train(model, opt, work)  # a virtual bias gets no gradient: no pair, and no wrong one
        assert len([w for w in said if "does not follow" in str(w.message)]) == 1
        assert [int(d["accepted"] + d["rejected"]) for d in opt.diagnostics().values()] == [0, 0]
        return
    assert_trains_as(net(bias), work, plainly, lambda m: method(m, factors=FULL))


# ---------------------------------------------------------------------- clipping


@METHODS
@ACTIONS
@BIAS
def test_clipping_by_norm_is_max_grad_norm(method, action, bias):
    """The pair is made of unclipped gradients both ways."""

    def clips(m):
        loss = PLAIN(m)
        clip_grad_norm_(m.parameters(), 0.05)
        return loss

    options = dict(hessian_action=action, safeguard=False)
    runs = []
    for work, more in ((clips, {}), (PLAIN, {"max_grad_norm": 0.05})):
        model = net(bias)
        opt = method(model, **options, **more)
        train(model, opt, work)
        runs.append((model, opt))
    assert_one_run(*runs)


@METHODS
@BIAS
@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_])
def test_the_pair_is_of_unclipped_gradients(method, bias, clip):
    model = net(bias)
    opt = method(model, factors=absolute(freeze_second_pass=bias))

    def work(m):
        loss = PLAIN(m)
        if m is model:
            clip(m.parameters(), 1e-3)
        return loss

    assert_g_bar_is_the_bias_gradient(model, opt, work)
    assert max(p.grad.abs().max() for p in model.parameters()) <= 1e-3
    assert max(g.abs().max() for g in gradients_of(model, PLAIN).values()) > 1e-3

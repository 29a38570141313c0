"""Training loops that people write: whose parameters move, and what a pass may see and leave."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kbfgs_ext import KBFGS
from tests.optim.loops import (
    TIGHT,
    assert_g_bar_is_the_bias_gradient,
    assert_trains_as,
    backward_of,
    gradients_of,
    step_of,
    train,
)
from tests.optim.models import METHODS, assert_same_weights, mlp, rows

ACTIONS = pytest.mark.parametrize("action", ["ema", "minibatch"])


def unseen_layers(caught):
    """What the warnings of layers that were not called name."""
    said = [str(w.message) for w in caught if "no call of the layer" in str(w.message)]
    return [message.split("momentum alone: ")[1].split(". exclude=")[0] for message in said]


# ---------------------------------------------------------------------- a weight used by hand

BY_HAND = {
    "functional": lambda h, f: 10 * F.linear(F.normalize(h), F.normalize(f.weight)),
    "with its bias": lambda h, f: F.linear(h, f.weight, f.bias),
    "forward": lambda h, f: f.forward(h),
    "matmul": lambda h, f: h @ f.weight.T,
    "einsum": lambda h, f: torch.einsum("md,kd->mk", h, f.weight),
    "addmm": lambda h, f: torch.addmm(torch.zeros(3, dtype=h.dtype), h, f.weight.T),
}


class Holder(nn.Module):
    """A Linear that holds a weight and is not called, as in ArcFace."""

    def __init__(self, call, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 6, dtype=torch.float64)
        self.cls = nn.Linear(6, 3, bias=bias, dtype=torch.float64)
        self.call = call

    def forward(self, x):
        return self.call(torch.tanh(self.body(x)), self.cls)


def squared(model):
    return (model(rows(12, 4)) - rows(12, 3, seed=1)).square().mean()


@METHODS
@pytest.mark.parametrize("call", list(BY_HAND))
def test_a_weight_used_by_hand_takes_momentum_steps(method, call):
    """P = M for it, to the letter; one warning names it, and no other layer."""
    model = Holder(BY_HAND[call], bias=call == "with its bias")
    opt = method(model, safeguard=False, weight_decay=0.1)
    work, M = backward_of(squared), {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            gradients, wanted = gradients_of(model, work), {}
            for name, p in model.cls.named_parameters():
                D = gradients[f"cls.{name}"] + 0.1 * p.detach()
                M[name] = 0.9 * M.get(name, 0.0) + 0.1 * D
                wanted[name] = p.detach() - 0.3 * M[name]
            train(model, opt, work, steps=1)
            for name, p in model.cls.named_parameters():
                torch.testing.assert_close(p.detach(), wanted[name], **TIGHT)
    assert unseen_layers(caught) == ["cls"]
    assert int(opt.diagnostics()["body"]["accepted"]) > 0


@METHODS
@pytest.mark.parametrize("how", ["name", "pattern", "module"])
def test_an_excluded_weight_is_the_fallback_s_and_nothing_is_said(method, how):
    model = Holder(BY_HAND["matmul"])
    exclude = {"name": "cls", "pattern": "c*", "module": [model.cls]}[how]
    work = backward_of(squared)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = method(
            model, exclude=exclude, fallback=lambda ps: torch.optim.SGD(ps, lr=0.5), safeguard=False
        )
        for _ in range(3):
            wanted = model.cls.weight.detach() - 0.5 * gradients_of(model, work)["cls.weight"]
            train(model, opt, work, steps=1)
            torch.testing.assert_close(model.cls.weight.detach(), wanted, **TIGHT)
    reasons = {row.name: row.reason for row in opt.coverage() if not row.covered}
    assert reasons == {"cls.weight": "excluded"}


@METHODS
@ACTIONS
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_that_is_called_later_starts_its_factors_then(method, action, bias):
    """As those of an optimizer made at that moment. (Without momentum, which it would remember.)"""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3, bias=bias, dtype=torch.float64))
    options = dict(hessian_action=action, momentum=0.0, safeguard=False)
    opt = method(model, **options)
    x, target = rows(12, 5), rows(12, 3, seed=1)
    with pytest.warns(UserWarning, match="momentum alone: 0. exclude"):
        train(model, opt, backward_of(lambda m: (m[0].forward(x) - target).square().mean()), 2)
    assert not opt.layers[0].started
    twin = copy.deepcopy(model)
    fresh, called = method(twin, **options), backward_of(lambda m: (m(x) - target).square().mean())
    train(model, opt, called)
    train(twin, fresh, called)
    assert opt.layers[0].started
    assert_same_weights(model, twin)
    for name in ("H_a", "A", "H_g", "S", "Y", "s", "y"):
        if opt.layers[0].has(name):
            assert torch.equal(opt.layers[0][name], fresh.layers[0][name]), name


@METHODS
@ACTIONS
def test_a_weight_used_by_module_and_by_hand(method, action):
    """Both uses are in its gradient and its bias's, the rows of the call alone in A."""
    model, x, other = mlp(5, 3), rows(12, 5), rows(7, 5, seed=1)

    def loss_of(m):
        by_hand = F.linear(other, m[0].weight, m[0].bias).square().sum() / 7
        return m(x).square().sum() / 12 + by_hand

    opt, work = method(model, hessian_action=action), backward_of(loss_of)
    wanted = gradients_of(model, work)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt, work, steps=1)
    layer = opt.layers[0]
    D = torch.cat([wanted["0.weight"], wanted["0.bias"][:, None]], 1)
    torch.testing.assert_close(layer["M"], 0.1 * D, **TIGHT)
    torch.testing.assert_close(layer["a_bar"][:-1], x.mean(0), **TIGHT)
    assert_g_bar_is_the_bias_gradient(model, opt, work)


@METHODS
def test_a_loss_of_weights_used_by_hand_alone(method):
    """Behind parameters of the fallback: nothing else is left in the second pass's graph."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3, bias=False)).double()
    x, target = rows(12, 4), rows(12, 3, seed=1)
    opt = method(model, fallback=torch.optim.AdamW)
    work = backward_of(lambda m: (F.linear(m[0](x), m[1].weight) - target).square().mean())
    with pytest.warns(UserWarning, match="momentum alone: 1. exclude"):
        losses = train(model, opt, work)
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    assert not opt.layers[0].started


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 5, dtype=torch.float64)
        self.mix = nn.Linear(5, 5, dtype=torch.float64)
        self.out = nn.Linear(5, 7, bias=False, dtype=torch.float64)
        self.out.weight = self.embedding.weight


@METHODS
@ACTIONS
def test_a_weight_tied_to_an_embedding(method, action):
    """As a product with one-hot rows by hand; the embedding's rows are none of the layer's."""
    tokens = torch.arange(15) % 7
    one_hot = F.one_hot(tokens, 7).double()

    def loss_with(embedded):
        def loss_of(m):
            return (m.out(torch.tanh(m.mix(embedded(m)))) - one_hot.roll(1, 0)).square().mean()

        return backward_of(loss_of)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = [row.reason for row in method(Tied()).coverage()]
        assert said == ["", "tied to embedding, whose gradients its factors do not see"]
        assert_trains_as(
            Tied(),
            loss_with(lambda m: m.embedding(tokens)),
            loss_with(lambda m: one_hot @ m.out.weight),
            lambda m: method(m, hessian_action=action),
        )


# ---------------------------------------------------------------------- halves of layers

SCHEDULES = {
    "bias, then weight": [(), ("bias",), ("bias",), (), ("weight",), ("weight",), ()],
    "from the start": [("weight",), ("weight",), (), ("bias",), ()],
    "bias from the start": [("bias",), (), ("weight",), ("bias",)],
}


@METHODS
@ACTIONS
@pytest.mark.parametrize("when", list(SCHEDULES))
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_half_of_a_layer_that_is_frozen_for_a_while(method, action, when, decay):
    """It keeps its bits; the other half takes its part of H_g M H_a, frozen gradients being 0."""
    model, x, target = mlp(4, 6, 3), rows(10, 4), rows(10, 3, seed=1)
    opt = method(model, hessian_action=action, safeguard=False, weight_decay=decay, damping_a=0.5)
    work = backward_of(lambda m: (m(x) - target).square().mean())
    opt.state_dict()  # makes the tensors
    half, layer = model[0], opt.layers[0]
    for frozen in SCHEDULES[when]:
        for name, p in half.named_parameters():
            p.requires_grad_(name not in frozen)
        grads = gradients_of(model, work)
        D = [
            torch.zeros_like(p) if name in frozen else grads[f"0.{name}"] + decay * p.detach()
            for name, p in half.named_parameters()
        ]
        step = step_of(layer, x, 0.3, 0.5, torch.cat([D[0], D[1][:, None]], 1))
        parts = {"weight": step[:, :-1], "bias": step[:, -1]}
        before = {name: p.detach().clone() for name, p in half.named_parameters()}
        train(model, opt, work, steps=1)
        for name, p in half.named_parameters():
            assert p.requires_grad is (name not in frozen)
            if name in frozen:
                assert torch.equal(p, before[name])
            else:
                torch.testing.assert_close(p.detach(), before[name] - parts[name], **TIGHT)
    half.requires_grad_(True)
    assert_g_bar_is_the_bias_gradient(model, opt, work)


@METHODS
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_g_bar_while_a_half_is_frozen(method, name):
    model, x = mlp(4, 6, 3), rows(10, 4)
    opt, work = method(model), backward_of(lambda m: (m(x) - 1).square().mean())
    train(model, opt, work, steps=2)
    for i in (0, 2):
        getattr(model[i], name).requires_grad_(False)
    assert_g_bar_is_the_bias_gradient(model, opt, work)


@METHODS
def test_a_layer_frozen_as_a_whole_and_a_gradient_set_to_none(method):
    """Neither moves, nor does its momentum; the rest does."""
    model, x = mlp(4, 6, 5, 3), rows(10, 4)
    opt = method(model)
    plain = backward_of(lambda m: (m(x) - 1).square().mean())

    def drops(m):
        loss = plain(m)
        m[2].bias.grad = None
        m[4].weight.grad = m[4].bias.grad = None
        return loss

    train(model, opt, plain, steps=2)
    model[0].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    M = [layer["M"].clone() for layer in opt.layers]
    train(model, opt, drops, steps=2)
    same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert same == {"0.weight", "0.bias", "2.bias", "4.weight", "4.bias"}
    assert [torch.equal(layer["M"], m) for layer, m in zip(opt.layers, M, strict=True)] == [
        True,
        False,
        True,
    ]
    model.requires_grad_(True)
    train(model, opt, plain, steps=1)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("fallback", [torch.optim.AdamW, torch.optim.SGD])
def test_the_fallback_s_parameters_frozen_for_a_while(fallback):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    x = rows(10, 4)
    opt = KBFGS(model, fallback=lambda ps: fallback(ps, lr=0.1, weight_decay=0.1))
    work = backward_of(lambda m: (m(x) - 1).square().mean())
    train(model, opt, work, steps=2)
    model[1].weight.requires_grad_(False)
    weight, bias = model[1].weight.detach().clone(), model[1].bias.detach().clone()
    train(model, opt, work, steps=2)
    assert torch.equal(model[1].weight, weight) and not torch.equal(model[1].bias, bias)
    model[1].weight.requires_grad_(True)
    train(model, opt, work, steps=1)
    assert not torch.equal(model[1].weight, weight)

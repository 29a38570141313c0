"""State in torch's own form for the tools that look there, and errors that leave it as it was."""

import contextlib
import json
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.utils import clip_grad_value_

from kbfgs_ext import KBFGS
from tests.optim.loops import backward_of, everything, train
from tests.optim.models import METHODS, assert_same, closure_of, four_calls, mlp, rows
from tests.optim.test_closures import PLAIN, net

FALLBACKS = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9),
    None: None,
}


def build(method, fallback="AdamW", action="minibatch", **options):
    torch.manual_seed(1)
    norm = [nn.LayerNorm(6)] if fallback else []
    layers = nn.Linear(4, 6), *norm, nn.Tanh(), nn.Linear(6, 3, bias=False)
    model = nn.Sequential(*layers).double()
    fallback = FALLBACKS[fallback]
    return model, method(model, hessian_action=action, fallback=fallback, lr=0.5, **options)


def run(model, opt, steps):
    for k in steps:
        x, target = rows(12, 4, seed=k), rows(12, 3, seed=100 + k)
        train(model, opt, backward_of(lambda m, x=x, t=target: (m(x) - t).square().mean()), 1)


# ---------------------------------------------------------------------- ways to save


def by_state_dict_tools(model, opt, other_model, other, folder):
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other, get_optimizer_state_dict(model, opt))


def by_dcp(model, opt, other_model, other, folder):
    saved = {"model": model.state_dict(), "opt": get_optimizer_state_dict(model, opt)}
    template = {
        "model": other_model.state_dict(),
        "opt": get_optimizer_state_dict(other_model, other),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        dcp.save(saved, checkpoint_id=folder)
        dcp.load(template, checkpoint_id=folder)
    other_model.load_state_dict(template["model"])
    set_optimizer_state_dict(other_model, other, template["opt"])


def tensors_and_json(model, opt, other_model, other, folder):
    """As safetensors would have it: tensors in one flat dict, the rest text."""
    state = opt.state_dict()
    flat, rest = {}, {}
    for i, entry in state["state"].items():
        for name, value in entry.items():
            (flat if isinstance(value, torch.Tensor) else rest)[f"{i}/{name}"] = value
    flat = {name: t.detach().clone().contiguous() for name, t in flat.items()}
    text = json.dumps({"groups": state["param_groups"], "rest": rest})
    read = json.loads(text)
    loaded = {"state": {}, "param_groups": read["groups"]}
    for name, value in {**flat, **read["rest"]}.items():
        i, key = name.split("/")
        loaded["state"].setdefault(int(i), {})[key] = value
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(loaded)


WAYS = [(by_state_dict_tools, 2), (by_dcp, 0), (by_dcp, 2), (tensors_and_json, 2)]


@METHODS
@pytest.mark.parametrize(("way", "stepped"), WAYS)
@pytest.mark.parametrize("fallback", list(FALLBACKS), ids=str)
def test_a_resumed_run_goes_on_bit_for_bit(method, way, fallback, stepped, tmp_path):
    model, opt = build(method, fallback, action="ema" if stepped else "minibatch")
    run(model, opt, range(stepped))
    other_model, other = build(method, fallback, action="ema" if stepped else "minibatch")
    run(other_model, other, range(7, 8))  # what is loaded replaces what was there
    if way is by_dcp:
        other_model, other = build(method, fallback, action="ema" if stepped else "minibatch")
    way(model, opt, other_model, other, tmp_path)
    for m, o in ((model, opt), (other_model, other)):
        run(m, o, range(2, 5))
    assert_same(everything(model, opt), everything(other_model, other))


def test_a_checkpoint_of_the_old_format_is_refused_by_name():
    _, opt = build(KBFGS)
    old = {"kbfgs": {"about": {"format": 4}}, "state": {}, "param_groups": []}
    with pytest.raises(
        ValueError, match=r"format 4, of an older version of kbfgs_ext; this one reads format 6"
    ):
        opt.load_state_dict(old)
    with pytest.raises(ValueError, match="was not made by KBFGS or KBFGSL"):
        opt.load_state_dict(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0).state_dict())


# ---------------------------------------------------------------------- errors


def raises_in(which):
    def closure_with(model, opt, good):
        calls = []

        def closure():
            loss = good()
            calls.append(1)
            if len(calls) == which:
                raise KeyError("the user's own")
            return loss

        return closure

    return closure_with


def stale(model, opt, good):
    good()

    def closure():
        loss = (model(rows(12, 4)) - 1).square().mean()
        loss.backward()
        return loss

    return closure


def reads_weight_gradients(model, opt, good):
    def closure():
        loss = good()
        assert model[0].weight.grad.norm() >= 0
        return loss

    return closure


def bad_damping(model, opt, good):
    opt.param_groups[0]["damping"] = -1.0
    return good


def empty_batch(model, opt, good):
    return closure_of(model, opt, rows(0, 4), rows(0, 3))


def failing_fallback(model, opt, good):
    def fail(*args, **kwargs):
        with torch.no_grad():
            model[1].weight.add_(1.0)  # half of its work is done
        raise OSError("the fallback's own")

    opt.steps.fallback.optimizer.step = fail
    return good


def no_scalar(model, opt, good):
    return lambda: good().expand(3)


def in_the_dark(model, opt, good):
    def closure():
        with torch.no_grad():
            return good()

    return closure


ERRORS = {
    "first pass": (raises_in(1), KeyError, "the user's own"),
    "second pass": (raises_in(2), KeyError, "the user's own"),
    "stale": (stale, RuntimeError, "gradients from before the step"),
    "weight gradients": (reads_weight_gradients, RuntimeError, "freeze_second_pass=False"),
    "hyperparameter": (bad_damping, ValueError, "damping must be in"),
    "empty": (empty_batch, ValueError, "is empty: shape"),
    "fallback": (failing_fallback, OSError, "the fallback's own"),
    "no scalar": (no_scalar, TypeError, "real scalar"),
    "no gradients": (in_the_dark, RuntimeError, r"ran under torch.no_grad\(\)"),
    "no closure": (lambda *_: None, TypeError, "closure must be a function"),
}
LATE = ("second pass", "weight gradients")  # the step is taken back; its momentum and counts stay


@METHODS
@pytest.mark.parametrize("which", list(ERRORS))
@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "later"])
def test_an_error_leaves_everything_as_it_was(method, which, steps):
    model, opt = build(method, "momentum", "ema" if steps else "minibatch")
    model.append(nn.BatchNorm1d(3, affine=False).double())
    run(model, opt, range(steps))
    make, error, message = ERRORS[which]
    good = closure_of(model, opt, rows(12, 4), rows(12, 3, seed=1))
    opt.state_dict()  # makes the tensors
    before = everything(model, opt)
    damping, step = opt.param_groups[0]["damping"], opt.steps.fallback.optimizer.step
    closure = make(model, opt, good)
    with pytest.raises(error, match=message):
        opt.step(closure)
    kept = [n for n in before if n.startswith(("param", "wanted")) or which not in LATE]
    if which not in ("hyperparameter", "no closure"):  # a forward pass has run
        kept = [name for name in kept if not name.startswith("buffer")]
    after = everything(model, opt)
    assert_same({name: before[name] for name in kept}, after)
    opt.param_groups[0]["damping"], opt.steps.fallback.optimizer.step = damping, step
    weights = model[0].weight.detach().clone()
    assert torch.isfinite(opt.step(good))
    assert not torch.equal(weights, model[0].weight)


@METHODS
def test_a_sparse_gradient_that_the_fallback_cannot_take(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 3)).double()
    with pytest.warns(UserWarning, match="go to torch.optim.AdamW"):
        opt = method(model)
    tokens = torch.arange(12) % 7
    before = everything(model, opt)
    with pytest.raises(RuntimeError, match="sparse gradients of 0.weight.*sparse=False"):
        train(model, opt, backward_of(lambda m: m(tokens).square().mean()), 1)
    assert_same(before, everything(model, opt))
    train(model, opt, backward_of(lambda m: m[1](rows(12, 4)).square().mean()), 1)


@pytest.mark.parametrize("which", ["first pass", "second pass"])
def test_an_error_in_the_plain_loop(which):
    model, opt = build(KBFGS)
    run(model, opt, range(2))
    good = closure_of(model, opt, rows(12, 4), rows(12, 3, seed=1))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with contextlib.suppress(KeyError):
        four_calls(opt, ERRORS[which][0](model, opt, good))
    assert_same(before, model.state_dict())
    four_calls(opt, good)


@METHODS
def test_an_empty_list_of_gradients_in_the_second_pass(method):
    """A model without biases has none there: what chokes on that is told what to do."""
    chokes = {
        "clip": lambda m: clip_grad_value_(m.parameters(), 1.0),
        "stack": lambda m: torch.stack(
            [p.grad.norm() for p in m.parameters() if p.grad is not None]
        ),
        "max": lambda m: max(p.grad.norm() for p in m.parameters() if p.grad is not None),
    }
    for choke in chokes.values():

        def work(m, choke=choke):
            loss = PLAIN(m)
            choke(m)
            return loss

        model = net(bias=False)
        with pytest.raises(RuntimeError, match="freeze_second_pass=False"):
            train(model, method(model), work, 1)
        train(model, method(model, freeze_second_pass=False), work)


# ---------------------------------------------------------------------- reports


def test_explain_names_every_op_that_is_on_the_reference(monkeypatch):
    model, opt = build(KBFGS, None, backend="reference")
    run(model, opt, range(2))
    first, *rest = opt.explain().splitlines()
    ops = {line.split("/")[1].split(":")[0] for line in rest}
    named = set(first.split("on the reference: ")[1].split(", "))
    assert named == ops >= {"kron_step_", "factor_ema_", "curvature_update_", "output_change_"}
    monkeypatch.setenv("KBFGS_BACKEND", "reference")
    model, opt = build(KBFGS, None)
    assert "KBFGS_BACKEND=reference" in opt.explain()
    run(model, opt, range(2))
    assert opt.explain().splitlines()[0] == first


def test_coverage_tells_every_parameter():
    _, opt = build(KBFGS, exclude="3")
    found = {row.name: (row.covered, row.parameters, row.reason) for row in opt.coverage()}
    assert found == {
        "0": (True, 30, ""),
        "1.weight": (False, 6, "LayerNorm is no kind of layer that is covered"),
        "1.bias": (False, 6, "LayerNorm is no kind of layer that is covered"),
        "3.weight": (False, 18, "excluded"),
    }
    assert opt.coverage().share == 30 / 60
    assert "fallback: excluded" in str(opt.coverage())


@pytest.mark.parametrize(
    ("exclude", "error", "message"),
    [
        ("head", ValueError, "no layer of the model has a name like 'head'"),
        (["0", "x.*"], ValueError, "has a name like 'x"),
        (nn.Linear(2, 2), ValueError, "a Linear is no part of the model"),
        ([3], TypeError, "exclude must hold modules and names, got 3"),
        (["0", "2"], ValueError, "no layer to cover.*that is not excluded"),
    ],
)
def test_what_cannot_be_excluded(exclude, error, message):
    model = mlp(4, 5, 3)
    with pytest.raises(error, match=message):
        KBFGS(model, exclude=exclude)
    assert not any(module._forward_hooks for module in model.modules())

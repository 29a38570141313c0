"""An error in a part of a step takes back what the others have moved: the fallback, the layers."""

import pytest
import torch
from torch import nn

from kbfgs_ext import KBFGS, presets
from kbfgs_ext.ops import registry
from tests.optim.loops import JUDGED, LEARNED, assert_as_before, backward_of, everything, train
from tests.optim.models import METHODS, absolute, assert_same, newton, newton_l, rows
from tests.optim.test_errors import good_of, raises_in
from tests.optim.test_saved_state import build, run

# ---------------------------------------------------------------------- the step's own ops


SETTINGS = {
    "newton": (newton, {"hessian_action": "ema"}),
    "minibatch": (newton, {"hessian_action": "minibatch"}),
    "tuned": (newton, presets.TUNED),
    "defaults": (KBFGS, {"pair_every": 1}),
    "ring": (newton_l, {"memory": 3, "factors": absolute(initial_scale=0.5), "weight_decay": 0.1}),
    "no momentum": (newton, {"momentum": 0.0, "max_grad_norm": 0.1}),
}


class Failing:
    """The ``at``-th op of a step fails, before it writes; None: all work, and are counted."""

    def __init__(self, monkeypatch, at=None):
        self.at, self.seen, run = at, [], registry.run

        def fails(op, backend, call):
            if len(self.seen) == self.at:
                self.at = None
                raise OSError(f"out of order: {op}")
            self.seen.append(op)
            run(op, backend, call)

        monkeypatch.setattr(registry, "run", fails)


def build_in_groups(name, steps):
    """Two param groups, a halved layer in the second, a fallback."""
    method, options = SETTINGS[name]
    torch.manual_seed(1)
    layers = nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5), nn.Linear(5, 3)
    model = nn.Sequential(*layers).double()
    groups = [{"params": [model[3], model[4]], "lr": 0.2, "weight_decay": 0.01}]
    opt = method(model, groups=groups, fallback=torch.optim.AdamW, **options)
    run(model, opt, range(steps))
    if steps:
        model[4].bias.requires_grad_(False)
    opt.state_dict()
    return model, opt


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "later"])
def test_an_error_of_any_op_takes_the_step_back(name, steps, monkeypatch):
    model, opt = build_in_groups(name, steps)
    with monkeypatch.context() as patch:
        ops = Failing(patch)
        opt.step(good_of(model, opt))
    assert {"judge_", "output_change_"} <= set(ops.seen)
    assert ("slope_" in ops.seen) == (name != "defaults")
    for at, op in enumerate(ops.seen):
        model, opt = build_in_groups(name, steps)
        before, good = everything(model, opt), good_of(model, opt)
        with monkeypatch.context() as patch:
            failing = Failing(patch, at)
            with pytest.raises(OSError, match=f"out of order: {op}"):
                opt.step(good)
        judged = JUDGED if "judge_" in failing.seen[:at] else ()
        assert_as_before(before, model, opt, LEARNED, judged)
        assert opt.steps.due == "first_pass()"
        assert all(layer.started == bool(steps) for layer in opt.layers)
        assert not any(layer.observer.has_inputs() for layer in opt.layers)
        opt.step(good)
        assert not torch.equal(before["param 0.weight"], model[0].weight)


def test_a_restart_that_was_ordered_is_not_lost(monkeypatch):
    """The safeguard's order for the activation sides waits for a step that reaches its end."""
    model, opt = build_in_groups("tuned", 2)
    opt.steps.guard.tensors()["order_a"].fill_(True)
    with monkeypatch.context() as patch:
        ops = Failing(patch)
        ops.at = 2
        with pytest.raises(OSError, match="out of order"):
            opt.step(good_of(model, opt))
    assert opt.steps.guard.tensors()["order_a"]
    opt.step(good_of(model, opt))
    assert [int(d["restarts_a"]) for d in opt.diagnostics().values()] == [1, 1, 1]
    assert not opt.steps.guard.tensors()["order_a"]


def test_an_op_that_takes_no_such_call_takes_the_step_back():
    """A backend that was asked for by name, and the fallback, which steps first."""
    model, opt = build(newton, "AdamW", backend="cuda")
    opt.state_dict()
    before = everything(model, opt)
    with pytest.raises(Exception, match="cuda"):
        opt.step(good_of(model, opt))
    assert_as_before(before, model, opt)


@METHODS
@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_in_16_bits_is_taken_back_to_the_bit(method, frozen):
    """The 32-bit copies come back with the parameters, and the frozen half of a layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).bfloat16()
    opt, x = method(model), rows(12, 4).bfloat16()
    work = backward_of(lambda m: m(x).float().square().mean())
    train(model, opt, work, 2)
    model[0].bias.requires_grad_(not frozen)
    before = everything(model, opt)
    with pytest.raises(KeyError):
        opt.step(raises_in(2)(model, opt, lambda: (opt.zero_grad(), work(model))[1]))
    after = everything(model, opt)
    for name, value in before.items():
        if name.endswith(" M"):
            torch.testing.assert_close(after[name], value)
        elif not name.endswith(tuple(f" {x}" for x in LEARNED)):
            assert torch.equal(value, after[name]), name


# ---------------------------------------------------------------------- the fallback


class OfOwnKind(torch.optim.Optimizer):
    """Counts on the host, replaces its tensors, and fails at its last parameter."""

    def __init__(self, parameters, fails=OSError):
        super().__init__(parameters, {"lr": 0.1})
        self.fails = fails

    @torch.no_grad()
    def step(self, closure=None):
        for i, p in enumerate(self.param_groups[0]["params"]):
            state = self.state[p]
            state["count"] = state.get("count", 0) + 1
            state["mean"] = 0.9 * state.get("mean", torch.zeros_like(p)) + p.grad
            p.sub_(state["mean"], alpha=0.1)
            if self.fails is not None and i:
                raise self.fails("at the last")


@METHODS
@pytest.mark.parametrize("fails", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "later"])
def test_a_fallback_that_fails_half_way(method, fails, steps):
    """Also by Ctrl-C, in the step that makes its state, and whatever that holds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    opt = method(model, fallback=lambda ps: OfOwnKind(ps, None))
    run(model, opt, range(steps))
    opt.state_dict()
    inner, before = opt.steps.fallback.optimizer, everything(model, opt)
    inner.fails = fails
    with pytest.raises(fails, match="at the last"):
        opt.step(good_of(model, opt))
    assert_as_before(before, model, opt)
    assert len(inner.state) == (2 if steps else 0)
    inner.fails = None
    opt.step(good_of(model, opt))
    assert [entry["count"] for entry in inner.state.values()] == [steps + 1] * 2


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

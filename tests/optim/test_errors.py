"""A step at an error leaves everything as it was, whoever raises it and wherever the step is."""

import contextlib
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_value_

from kbfgs_ext.optim import passes
from kbfgs_ext.optim.factors import ActivationMatrix
from tests.optim.loops import (
    LEARNED,
    assert_as_before,
    assert_one_run,
    backward_of,
    everything,
    train,
)
from tests.optim.models import METHODS, absolute, closure_of, four_calls, newton, rows
from tests.optim.test_closures import PLAIN, net
from tests.optim.test_saved_state import build, run


def good_of(model, opt):
    return closure_of(model, opt, rows(12, 4), rows(12, 3, seed=1))


# ---------------------------------------------------------------------- closures, hyperparameters


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


def another_loss_in_the_second_pass(model, opt, good):
    return lambda: "none" if opt.second_pass_due and good() is not None else good()


ERRORS = {
    "first pass": (raises_in(1), KeyError, "the user's own"),
    "second pass": (raises_in(2), KeyError, "the user's own"),
    "stale": (stale, RuntimeError, "gradients from before the step"),
    "weight gradients": (reads_weight_gradients, RuntimeError, "freeze_second_pass=False"),
    "hyperparameter": (bad_damping, ValueError, "damping must be in"),
    "empty": (empty_batch, ValueError, "is empty: shape"),
    "fallback": (failing_fallback, OSError, "the fallback's own"),
    "no scalar": (no_scalar, TypeError, "real scalar"),
    "no scalar later": (another_loss_in_the_second_pass, TypeError, "real scalar"),
    "no gradients": (in_the_dark, RuntimeError, r"ran under torch.no_grad\(\)"),
    "no closure": (lambda *_: None, TypeError, "closure must be a function"),
}
LATE = ("second pass", "weight gradients", "no scalar later")  # the factors have seen the minibatch
BUFFERS = ("buffer 4.running_mean", "buffer 4.running_var", "buffer 4.num_batches_tracked")


def build_with_norm(method, steps, **options):
    """Covered layers, a fallback with momentum, a buffer; ``steps`` taken."""
    model, opt = build(method, "momentum", "ema" if steps else "minibatch", **options)
    model.append(nn.BatchNorm1d(3, affine=False).double())
    run(model, opt, range(steps))
    opt.state_dict()  # makes the tensors
    return model, opt


@METHODS
@pytest.mark.parametrize("which", list(ERRORS))
@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "later"])
@pytest.mark.parametrize("plain_loop", [False, True], ids=["closure", "plain loop"])
def test_an_error_leaves_everything_as_it_was(method, which, steps, plain_loop):
    model, opt = build_with_norm(method, steps)
    make, error, message = ERRORS[which]
    good, before = good_of(model, opt), everything(model, opt)
    damping, step = opt.param_groups[0]["damping"], opt.steps.fallback.optimizer.step
    closure = make(model, opt, good)
    if plain_loop and which == "no closure":
        return
    with pytest.raises(error, match=message):
        four_calls(opt, closure) if plain_loop else opt.step(closure)
    assert opt.steps.due == "first_pass()"
    passed = () if which in ("hyperparameter", "no closure") else BUFFERS  # by a forward pass
    assert_as_before(before, model, opt, LEARNED if which in LATE else (), passed)
    opt.param_groups[0]["damping"], opt.steps.fallback.optimizer.step = damping, step
    weights = model[0].weight.detach().clone()
    assert torch.isfinite(opt.step(good))
    assert not torch.equal(weights, model[0].weight)


@METHODS
@pytest.mark.parametrize("action", ["ema", "minibatch"])
@pytest.mark.parametrize("which", [name for name in ERRORS if name != "no closure"])
def test_a_first_step_that_failed_has_never_been(method, action, which):
    """The run that follows is that of an optimizer that has seen no error."""
    runs = []
    for make, error, _ in (ERRORS[which], (None, None, None)):
        model, opt = build(method, "momentum", action)
        damping, step = opt.param_groups[0]["damping"], opt.steps.fallback.optimizer.step
        if error is not None:
            with pytest.raises(error):
                opt.step(make(model, opt, good_of(model, opt)))
            opt.param_groups[0]["damping"], opt.steps.fallback.optimizer.step = damping, step
            if opt.layers[0].kept:
                for layer in opt.layers:
                    torch._foreach_zero_([layer["counts_a"], layer["marks_a"]])
        opt.zero_grad()
        run(model, opt, range(4))
        runs.append((model, opt))
    assert_one_run(*runs)


def test_an_error_after_a_warm_start_keeps_the_start():
    """Its average has become a factor in place: the layer goes on with that."""
    model, opt = build(newton, None)
    opt.warm_start([rows(30, 4, seed=8)])
    good = good_of(model, opt)
    with pytest.raises(KeyError):
        opt.step(raises_in(2)(model, opt, good))
    assert all(layer.started for layer in opt.layers)
    losses = [opt.step(good).item() for _ in range(5)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("block_size", [None, 3], ids=["second layer", "second block"])
def test_an_error_in_a_start_inverts_no_factor_twice(block_size, monkeypatch):
    """Such as one of memory: the first has its inverse by then, in the place of the average of the
    warm start, which is that of the minibatch here."""
    inverses = []
    for failing in (False, True):
        model, opt = build(newton, None, block_size=block_size)
        opt.warm_start([rows(12, 4)])
        good = good_of(model, opt)
        if failing:
            with monkeypatch.context() as patch:
                patch.setattr(ActivationMatrix, "start", fails_after(1, ActivationMatrix.start))
                with pytest.raises(MemoryError):
                    opt.step(good)
        opt.step(good)
        inverses.append([f["H_a"] for layer in opt.layers for f in layer.activations])
    for H_a, wanted in zip(*inverses, strict=True):
        torch.testing.assert_close(H_a, wanted)


def fails_after(calls, function):
    """``function``, which raises MemoryError from some call on."""
    made = []

    def failing(*args):
        made.append(1)
        if len(made) > calls:
            raise MemoryError
        return function(*args)

    return failing


def halves(opt):
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad.mul_(0.5)


@METHODS
@pytest.mark.parametrize(
    "lose",
    [lambda opt: opt.zero_grad(), lambda opt: opt.zero_grad(set_to_none=False), halves],
    ids=["dropped", "zeroed", "changed"],
)
def test_an_error_once_the_gradients_are_gone(method, lose):
    """What the caller has done to them between the passes is no obstacle: but for the momentum,
    which stays as the step has made it, all is as before."""
    model, opt = build_with_norm(method, 2)
    good, before = good_of(model, opt), everything(model, opt)
    with opt.first_pass():
        loss = good()
    opt.descend(loss)
    stepped = everything(model, opt)
    with opt.second_pass():
        good()
    lose(opt)
    with pytest.raises(TypeError, match="real scalar"):
        opt.finish("no scalar")
    moved = {name: M for name, M in stepped.items() if name.endswith(" M")}
    assert moved and not any(torch.equal(M, before[name]) for name, M in moved.items())
    assert_as_before(before | moved, model, opt, LEARNED, BUFFERS)


# ---------------------------------------------------------------------- around the step


def hook_that_fails(*_):
    raise OSError("a hook's own")


@pytest.mark.parametrize("plain_loop", [False, True], ids=["closure", "plain loop"])
def test_hooks_of_the_step(plain_loop):
    """Before a step it has not begun; after it it is a whole one."""
    (model, opt), (twin, other) = (build(newton, "AdamW") for _ in range(2))
    for m, o in ((model, opt), (twin, other)):
        run(m, o, range(2))
    good, before = good_of(model, opt), everything(model, opt)

    def step():
        return four_calls(opt, good) if plain_loop else opt.step(good)

    handle = opt.register_step_pre_hook(hook_that_fails)
    with pytest.raises(OSError, match="a hook's own"):
        step()
    handle.remove()
    assert_as_before(before, model, opt)
    handle = opt.register_step_post_hook(hook_that_fails)
    with pytest.raises(OSError, match="a hook's own"):
        step()
    handle.remove()
    other.step(good_of(twin, other))
    assert_one_run((model, opt), (twin, other))


def test_a_warning_that_is_an_error():
    """It is given before anything moves."""
    model, opt = build(newton, "AdamW")
    opt.state_dict()
    before = everything(model, opt)
    by_hand = backward_of(lambda m: m[0].forward(rows(12, 4)).square().mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="no call of the layer"):
            train(model, opt, by_hand, 1)
    assert_as_before(before, model, opt)


def test_a_scaler_that_has_unscaled_already():
    model, opt = build(newton, "AdamW")
    scaler, good = torch.amp.GradScaler("cpu", init_scale=4.0), good_of(model, opt)

    def scaled():
        opt.zero_grad()
        loss = (model(rows(12, 4)) - 1).square().mean()
        scaler.scale(loss).backward()
        return loss

    opt.step(scaled, scaler=scaler)
    before = everything(model, opt)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        opt.step(scaled, scaler=scaler)
    assert_as_before(before, model, opt)
    scaler.update()
    opt.step(scaled, scaler=scaler)
    opt.step(good)


@pytest.mark.parametrize(
    "door", [(passes.RandomState, "restore"), (passes.Buffers, "restore")], ids=["enter", "exit"]
)
def test_an_error_at_the_doors_of_the_second_pass(door, monkeypatch):
    """Parameters want their gradients afterwards, and have them."""
    model, opt = build(newton, "AdamW")
    run(model, opt, range(2))
    before, good = everything(model, opt), good_of(model, opt)
    with monkeypatch.context() as patch:
        patch.setattr(*door, hook_that_fails)
        with pytest.raises(OSError, match="a hook's own"):
            opt.step(good)
    assert_as_before(before, model, opt, LEARNED)
    assert all(p.grad is not None for p in model.parameters())
    opt.step(good)


def test_a_replay_that_fails_is_no_step():
    model, opt = build(newton, "AdamW")
    run(model, opt, range(2))
    before = everything(model, opt)
    with contextlib.suppress(OSError), opt.replayed_step():
        raise OSError
    assert_as_before(before, model, opt)


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
        train(model, method(model, factors=absolute(freeze_second_pass=False)), work)

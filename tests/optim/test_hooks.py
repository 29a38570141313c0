"""Hooks of users beside ours, and models that optimizers have left."""

import copy
import gc
import pickle

import pytest
import torch

from kbfgs_ext import KBFGS
from tests.optim.loops import (
    assert_one_run,
    assert_trains_as,
    backward_of,
    train,
)
from tests.optim.models import METHODS, problem
from tests.optim.test_closures import BIAS, PLAIN, error_of, net, x_of


def doubles(m, **where):
    m[0].register_forward_hook(lambda module, args, out: 2 * out, **where)
    return lambda m: m(x_of())


def halves_the_input(m, **where):
    m[0].register_forward_pre_hook(lambda module, args: (args[0] / 2,), **where)
    return lambda m: m(x_of())


def reads_gradients(m, **where):
    m[0].register_full_backward_hook(lambda module, grad_in, grad_out: None, **where)
    return lambda m: m(x_of())


def doubled(m):
    return m[2](torch.tanh(2 * m[0](x_of())))


HOOKS = {
    "replace the output": (doubles, doubled),
    "change the input": (halves_the_input, lambda m: m(x_of() / 2)),
    "full backward": (reads_gradients, lambda m: m(x_of())),
}


@METHODS
@BIAS
@pytest.mark.parametrize("how", list(HOOKS))
@pytest.mark.parametrize("when", ["theirs first", "ours first", "put before ours"])
def test_hooks_of_users(method, bias, how, when):
    register, plainly = HOOKS[how]
    model, twin = net(bias), net(bias)
    run = register(model) if when == "theirs first" else None
    opt, other = method(model), method(twin)
    run = run or register(model, prepend=when == "put before ours")
    train(model, opt, backward_of(lambda m: error_of(run(m))))
    train(twin, other, backward_of(lambda m: error_of(plainly(m))))
    assert_one_run((model, opt), (twin, other))


@METHODS
def test_a_hook_that_the_closure_puts_before_ours(method):
    """With a bias it changes nothing; without one it hides the layer's output, and is refused."""

    def work(m):
        handle = m[0].register_forward_hook(lambda module, args, out: 2 * out, prepend=True)
        out = m(x_of())
        handle.remove()
        return error_of(out)

    assert_trains_as(net(), backward_of(work), backward_of(lambda m: error_of(doubled(m))), method)
    model = net(bias=False)
    with pytest.raises(RuntimeError, match=r"layer '0' may change its output: register it before"):
        train(model, method(model), backward_of(work), 1)


@METHODS
@BIAS
@pytest.mark.parametrize("first", [True, False], ids=["theirs first", "ours first"])
def test_a_hook_that_penalises_outputs(method, bias, first):
    """The penalty is in g_bar, that of a virtual bias too."""
    seen = []

    def register(m):
        m[0].register_forward_hook(lambda module, args, out: seen.append(out))

    def hooked(m):
        seen.clear()
        out = m(x_of())
        return error_of(out) + 0.1 * seen[0].square().mean()

    def plainly(m):
        h = m[0](x_of())
        return error_of(m[2](torch.tanh(h))) + 0.1 * h.square().mean()

    model, twin = net(bias), net(bias)
    if first:
        register(model)
    opt, other = method(model), method(twin)
    if not first:
        register(model)
    train(model, opt, backward_of(hooked))
    train(twin, other, backward_of(plainly))
    assert_one_run((model, opt), (twin, other))


@BIAS
@pytest.mark.parametrize("how", ["del", "close"])
def test_nothing_is_left_on_a_model(bias, how):
    model = net(bias)
    for k in range(3):
        opt = KBFGS(model)
        train(model, opt, PLAIN, 1)
        if k == 2 and how == "close":
            opt.close()
            opt.close()
            assert opt.closed
            with pytest.raises(RuntimeError, match="this optimizer is closed"):
                train(model, opt, PLAIN, 1)
            assert opt.state_dict()["state"]
        else:
            del opt
            gc.collect()
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_hooks_with_kwargs
        assert not module._forward_pre_hooks and not module._backward_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    expected = model(x_of())
    torch.testing.assert_close(torch.jit.script(model)(x_of()), expected)
    torch.testing.assert_close(copy.deepcopy(model)(x_of()), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x_of()), expected)


@METHODS
@BIAS
def test_optimizers_that_follow_each_other(method, bias):
    """Each is as one on a model that never had another."""
    model, twin = net(bias), net(bias)
    for _ in range(3):
        opt = method(model)
        train(model, opt, PLAIN, 2)
        fresh = net(bias)
        fresh.load_state_dict(twin.state_dict())
        twin, other = fresh, method(fresh)
        train(twin, other, PLAIN, 2)
        assert_one_run((model, opt), (twin, other))


@METHODS
def test_a_profiler_sees_the_phases_by_name(method):
    _, opt, closure = problem(method, pair_every=1)
    opt.step(closure)
    with torch.profiler.profile() as seen:
        opt.step(closure)
    names = {event.key for event in seen.key_averages() if event.key.startswith("kbfgs_ext: ")}
    phases = ("first pass", "statistics", "direction", "second pass", "curvature")
    assert names == {f"kbfgs_ext: {phase}" for phase in phases}

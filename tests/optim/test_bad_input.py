"""Bad input: an error that names the argument and its value, and state untouched."""

import math
import re

import pytest
import torch
from torch import nn

from kbfgs_ext import KBFGS, KBFGSL
from tests.optim.models import METHODS, assert_same, closure_of, mlp, newton, rows, snapshot

OUT_OF_RANGE = [
    ("lr", -0.1),
    ("lr", math.nan),
    ("lr", math.inf),
    ("damping", 0.0),
    ("damping", -1.0),
    ("damping_a", 0.0),
    ("damping_g", -2.0),
    ("momentum", 1.0),
    ("momentum", -0.1),
    ("stat_decay", 1.5),
    ("pair_decay", 1.0),
    ("powell", -0.2),
    ("weight_decay", -1e-5),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be in .*got {re.escape(str(value))}"):
        KBFGS(mlp(4, 3), **{name: value})


@pytest.mark.parametrize("name", ["lr", "damping", "momentum"])
def test_not_a_number(name):
    with pytest.raises(TypeError, match=f"{name} must be a number, got 'x'"):
        KBFGS(mlp(4, 3), **{name: "x"})


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-3, ValueError), (2.5, TypeError)])
def test_memory(value, error):
    with pytest.raises(error, match=f"memory must be .*got {value}"):
        KBFGSL(mlp(4, 3), memory=value)


@pytest.mark.parametrize("name", ["hessian_action", "backend"])
def test_choices(name):
    with pytest.raises(ValueError, match=f"{name} must be .*'nonsense'"):
        KBFGS(mlp(4, 3), **{name: "nonsense"})


def test_out_of_range_later_is_caught_before_the_step():
    model = mlp(4, 3)
    opt = KBFGS(model)
    closure = closure_of(model, opt, rows(8, 4), rows(8, 3))
    opt.step(closure)
    before = snapshot(model, opt)
    opt.param_groups[0]["damping"] = -1.0
    with pytest.raises(ValueError, match="damping must be in"):
        opt.step(closure)
    assert_same(before, snapshot(model, opt))


def test_parameters_in_place_of_the_model():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got generator"):
        KBFGS(mlp(4, 3).parameters())


@pytest.mark.parametrize(
    "model",
    [nn.ReLU(), nn.LayerNorm(3), nn.Linear(3, 3).requires_grad_(False)],
    ids=["no parameters", "norm", "frozen"],
)
def test_no_covered_layer(model):
    with pytest.raises(ValueError, match="model has no layer to cover"):
        KBFGS(model)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])
def test_weights_that_are_not_real(dtype):
    model = mlp(4, 5, 3)
    model[2].weight = nn.Parameter(torch.ones(3, 5).to(dtype), requires_grad=False)
    with pytest.raises(TypeError, match=f"layer '2' is {dtype}"):
        KBFGS(model)


def test_lazy_layers():
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"parameter '1.weight' is not initialised"):
        KBFGS(model)


def test_mixed_devices():
    model = mlp(4, 5, 3)
    model[2].to("meta")
    with pytest.raises(ValueError, match="different devices: '0' on cpu, '2' on meta"):
        KBFGS(model)


def broken_closures(model, opt, x):
    def none():
        closure_of(model, opt, x, x[:, :3])()

    def no_backward():
        opt.zero_grad()
        return model(x).square().mean()

    def vector():
        opt.zero_grad()
        out = model(x).square().mean(1)
        out.sum().backward()
        return out

    def empty():
        return closure_of(model, opt, x[:0], x[:0, :3])()

    def elsewhere():
        w = torch.ones((), requires_grad=True)
        (w * 2).backward()
        return w

    return {
        "none": (none, TypeError, "closure must return the loss as a real scalar, got NoneType"),
        "no backward": (no_backward, RuntimeError, r"closure must call backward\(\)"),
        "vector": (vector, TypeError, r"real scalar, got Tensor of shape \(8,\)"),
        "empty batch": (empty, ValueError, r"input of layer '0' is empty: shape \(0, 4\)"),
        "elsewhere": (elsewhere, RuntimeError, "depends on the covered layers"),
        "not callable": (3, TypeError, "closure must be a function that returns the loss, got 3"),
        "missing": (None, TypeError, "closure must be a function"),
    }


@pytest.mark.parametrize("which", list(broken_closures(None, None, rows(8, 4))))
@pytest.mark.parametrize("warm", [False, True], ids=["first step", "later"])
def test_broken_closure(which, warm):
    model = mlp(4, 5, 3)
    opt = KBFGS(model)
    x = rows(8, 4)
    if warm:
        opt.step(closure_of(model, opt, x, x[:, :3]))
    before = snapshot(model, opt)
    closure, error, message = broken_closures(model, opt, x)[which]
    with pytest.raises(error, match=message):
        opt.step(closure)
    assert_same(before, snapshot(model, opt))
    assert math.isfinite(opt.step(closure_of(model, opt, x, x[:, :3])).item())


def test_error_in_the_second_pass_takes_the_step_back():
    model = mlp(4, 5, 3)
    opt = newton(model)
    x = rows(8, 4)
    good = closure_of(model, opt, x, x[:, :3])
    opt.step(good)
    before = snapshot(model, opt)
    calls = []

    def second_fails():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return good()

    with pytest.raises(KeyboardInterrupt):
        opt.step(second_fails)
    after = snapshot(model, opt)
    for name, value in before.items():
        if name.startswith("param"):
            assert torch.equal(value, after[name])
    assert all(p.requires_grad for p in model.parameters())
    opt.step(good)


class NonFinite:
    """Ways for a batch to be bad, each as closure(model, opt, x) with the given value in it."""

    @staticmethod
    def input(model, opt, x, value):
        x = x.clone()
        x[2, 1] = value
        return closure_of(model, opt, x, x[:, :3].nan_to_num(0, 0, 0))

    @staticmethod
    def loss(model, opt, x, value):
        good = closure_of(model, opt, x, x[:, :3])
        return lambda: good() + value

    @staticmethod
    def gradient(model, opt, x, value):
        good = closure_of(model, opt, x, x[:, :3])

        def closure():
            loss = good()
            if model[0].weight.grad is not None:  # not in the second pass
                model[0].weight.grad[1, 2] = value
            return loss

        return closure


@pytest.mark.parametrize("kind", ["input", "loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@METHODS
@pytest.mark.parametrize("action", ["ema", "minibatch"])
def test_non_finite_is_skipped_and_counted(kind, value, method, action):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3)).double()
    opt = method(model, hessian_action=action, fallback=torch.optim.AdamW)
    x = rows(8, 4)
    good = closure_of(model, opt, x, x[:, :3])
    bad = getattr(NonFinite, kind)(model, opt, x, value)

    opt.step(bad)  # as the very first batch: the factors wait for a sound one
    assert int(opt.counters()["skipped"]) == 1
    for _ in range(3):
        opt.step(good)
    before, adam = snapshot(model, opt), str(opt.steps.fallback.optimizer.state)
    opt.step(bad)
    assert int(opt.counters()["skipped"]) == 2
    assert_same(before, snapshot(model, opt))
    assert adam.replace("tensor(4.)", "tensor(3.)") == str(
        opt.steps.fallback.optimizer.state
    ).replace("tensor(4.)", "tensor(3.)")
    assert math.isfinite(opt.step(good).item())


def test_second_pass_non_finite_keeps_pairs_and_takes_the_step_back():
    model = mlp(4, 5, 3)
    opt = newton(model)
    x = rows(8, 4)
    good = closure_of(model, opt, x, x[:, :3])
    opt.step(good)
    before = snapshot(model, opt)
    calls = []

    def closure():
        calls.append(1)
        return good() * (math.nan if len(calls) == 2 else 1.0)

    opt.step(closure)
    after = snapshot(model, opt)
    assert_same(before, after, but=(" M", " H_a", "counts_a", "marks_a"))
    assert opt.counters()["scale"] == 0.5 and int(opt.counters()["undone"]) == 1


def test_warm_start_errors():
    model = mlp(4, 5, 3)
    opt = KBFGS(model)
    with pytest.raises(ValueError, match="batches is empty"):
        opt.warm_start([])
    bad = rows(8, 4)
    bad[0, 0] = math.nan
    with pytest.raises(ValueError, match="batch 1 gives non-finite activations"):
        opt.warm_start([rows(8, 4), bad])
    opt.warm_start([rows(8, 4)])
    x = rows(8, 4)
    opt.step(closure_of(model, opt, x, x[:, :3]))
    with pytest.raises(RuntimeError, match="before the first step"):
        opt.warm_start([x])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.optim.AdamW(mlp(4, 5, 3).parameters()), "not made by KBFGS"),
        (
            lambda: KBFGS(mlp(4, 6, 3)),
            r"another model: layer '0' .* is \[6, 5\] there and \[5, 5\]",
        ),
        (lambda: KBFGS(mlp(4, 5, 3, 3)), "another model: layer '4'"),
        (lambda: KBFGSL(mlp(4, 5, 3)), "method = 'K-BFGS.L.', this optimizer has"),
        (lambda: KBFGS(mlp(4, 5, 3), hessian_action="ema"), "hessian_action = 'ema'"),
    ],
    ids=["adamw", "other width", "other depth", "kbfgsl", "other action"],
)
def test_state_dict_of_another(make, message):
    model = mlp(4, 5, 3)
    opt = KBFGS(model)
    x = rows(8, 4)
    opt.step(closure_of(model, opt, x, x[:, :3]))
    before = snapshot(model, opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(make().state_dict())
    assert_same(before, snapshot(model, opt))

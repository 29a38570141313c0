"""The contract of torch.optim: groups, schedulers, hooks, checkpoints, copies, clear refusals."""

import copy
import gc
import io
import json
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_post_hook

from kbfgs_ext import KBFGS
from tests.optim.models import (
    METHODS,
    assert_same_weights,
    closure_of,
    four_calls,
    mlp,
    newton,
    problem,
    rows,
    snapshot,
)

# ---------------------------------------------------------------------- param groups


@METHODS
def test_groups_have_their_own_hyperparameters(method):
    """lr 0 in one group holds its layer still; the other moves as if it were alone in that."""
    torch.manual_seed(0)
    model = mlp(5, 7, 3)
    opt = method(model, lr=0.2, groups=[{"params": model[2], "lr": 0.0, "damping": 1.0}])
    assert [group["lr"] for group in opt.param_groups] == [0.2, 0.0]
    assert [group["damping"] for group in opt.param_groups] == [0.3, 1.0]
    before = snapshot(model, opt)
    opt.step(closure_of(model, opt, rows(12, 5), rows(12, 3, seed=1)))
    after = snapshot(model, opt)
    assert torch.equal(before["param 2.weight"], after["param 2.weight"])
    assert not torch.equal(before["param 0.weight"], after["param 0.weight"])


@pytest.mark.parametrize("option", ["damping", "weight_decay", "momentum", "damping_a"])
def test_a_group_s_option_is_that_of_a_whole_optimizer(option):
    """One group that holds every layer is the same as the argument."""
    a, opt_a, closure_a = problem(**{option: 0.5})
    torch.manual_seed(0)
    b = mlp(5, 7, 3)
    opt_b = newton(b, groups=[{"params": b, option: 0.5}])
    assert len(opt_b.param_groups) == 1
    closure_b = closure_of(b, opt_b, rows(12, 5), rows(12, 3, seed=1))
    for _ in range(4):
        opt_a.step(closure_a)
        opt_b.step(closure_b)
    assert_same_weights(a, b)


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (lambda m: [{"params": nn.Linear(2, 2)}], ValueError, r"groups\[0\].*none that the model"),
        (
            lambda m: [{"params": m[0]}, {"params": m[0].bias}],
            ValueError,
            r"groups\[1\].*groups\[0",
        ),
        (
            lambda m: [{"params": m[0], "damping": -1.0}],
            ValueError,
            "damping must be in .*got -1.0",
        ),
        (lambda m: [{"lr": 1.0}], TypeError, r"groups\[0\] must be a dict with an entry 'params'"),
        (lambda m: [{"params": m[0], "maximize": True}], ValueError, "maximize=True"),
    ],
    ids=["foreign", "twice", "out of range", "no params", "keyword"],
)
def test_bad_groups(groups, error, message):
    model = mlp(5, 7, 3)
    with pytest.raises(error, match=message):
        KBFGS(model, groups=groups(model))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_group_added_on_another_device_changes_nothing():
    model, opt, closure = problem()
    model.append(nn.Linear(3, 3, device="meta"))
    with pytest.raises(ValueError, match="different devices"):
        opt.add_param_group({"params": model[3].parameters()})
    assert len(opt.param_groups) == 1 and not model[3]._forward_hooks
    del model[3]
    opt.step(closure)


# ---------------------------------------------------------------------- schedulers

SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda k: 0.9**k),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda k: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.3, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.3, total_steps=8),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=1e9),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1), schedulers.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, 3),
}


def test_every_scheduler_of_torch_is_here():
    known = {name for name in schedulers.__all__ if name not in ("LRScheduler",)}
    assert known <= set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
def test_scheduler(name, tensor_lr):
    """It runs without a warning, reaches every group, and each step takes the lr it has set."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()
    opt = KBFGS(
        model,
        lr=torch.tensor(0.2, dtype=torch.float64) if tensor_lr else 0.2,
        groups=[{"params": model[2], "lr": 0.1}],
        fallback=lambda ps: torch.optim.AdamW(ps, lr=1e-3),
    )
    closure = closure_of(model, opt, rows(12, 5), rows(12, 3, seed=1))
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # SequentialLR calls its parts with an epoch, which torch itself has deprecated
        warnings.filterwarnings("ignore", message="The epoch parameter in")
        schedule = SCHEDULERS[name](opt)
        for _ in range(6):
            loss = opt.step(closure)
            used = [float(group["lr"]) for group in opt.param_groups]
            seen.append(used)
            for covered, lr in zip(opt.steps.parts.groups, used, strict=False):
                assert covered.scalars.lr.item() == pytest.approx(lr, rel=1e-12)
            schedule.step(loss.item()) if name == "ReduceLROnPlateau" else schedule.step()
    assert all(len({step[i] for step in seen}) > 1 for i in range(3))


# ---------------------------------------------------------------------- scalars as tensors


@METHODS
@pytest.mark.parametrize("name", ["lr", "damping", "damping_a", "damping_g"])
def test_scalar_tensors_are_their_numbers(method, name):
    a, opt_a, closure_a = problem(method, **{name: 0.2})
    b, opt_b, closure_b = problem(method, **{name: torch.tensor(0.2, dtype=torch.float64)})
    for k in range(4):
        opt_a.step(closure_a)
        opt_b.step(closure_b)
        opt_a.param_groups[0][name] = 0.1 + k / 10
        opt_b.param_groups[0][name].fill_(0.1 + k / 10)
    assert_same_weights(a, b)


@pytest.mark.parametrize("name", ["lr", "damping", "damping_a", "damping_g"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor(-1.0), "must be in .*got -1.0"),
        (torch.tensor([1.0, 2.0]), "must be a number or a floating-point scalar tensor"),
        (torch.tensor(1), "must be a number or a floating-point scalar tensor"),
    ],
    ids=["negative", "vector", "integer"],
)
def test_bad_scalar_tensors(name, value, message):
    with pytest.raises(ValueError, match=f"{name} {message}"):
        KBFGS(mlp(4, 3), **{name: value})


def test_a_loaded_tensor_lr_is_not_shared():
    _, opt, closure = problem(lr=torch.tensor(0.2))
    opt.step(closure)
    _, other, _ = problem(lr=torch.tensor(0.5))
    other.load_state_dict(opt.state_dict())
    opt.param_groups[0]["lr"].fill_(0.9)
    assert other.param_groups[0]["lr"].item() == pytest.approx(0.2)


def test_loaded_tensors_go_where_the_optimizer_has_its_own():
    """An lr on the device stays there, whatever map_location the checkpoint was read with."""
    model = mlp(5, 7, 3)
    state = KBFGS(model, lr=torch.tensor(0.1), damping=torch.tensor(0.2)).state_dict()
    opt = KBFGS(model, lr=torch.tensor(0.3, device="meta"), damping=0.3)
    opt.load_state_dict(state)
    group = opt.param_groups[0]
    assert group["lr"].device.type == "meta"
    assert group["damping"].item() == pytest.approx(0.2)


# ---------------------------------------------------------------------- keywords of torch


@METHODS
@pytest.mark.parametrize("name", ["foreach", "fused", "capturable", "maximize", "differentiable"])
@pytest.mark.parametrize("value", [None, False, True])
def test_keywords_of_torch(method, name, value):
    if value and name in ("maximize", "differentiable"):
        with pytest.raises(ValueError, match=f"{name}=True is not supported"):
            method(mlp(4, 3), **{name: value})
    else:
        method(mlp(4, 3), **{name: value})


def test_unknown_keywords():
    with pytest.raises(TypeError, match="unexpected keyword argument 'betas'"):
        KBFGS(mlp(4, 3), betas=(0.9, 0.99))
    with pytest.raises(TypeError, match="foreach must be a bool, got 'yes'"):
        KBFGS(mlp(4, 3), foreach="yes")


@pytest.mark.parametrize("name", ["pair_every", "max_grad_norm"])
def test_bad_options(name):
    with pytest.raises((TypeError, ValueError), match=f"{name} must be .*got -1"):
        KBFGS(mlp(4, 3), **{name: -1})


# ---------------------------------------------------------------------- hooks


@METHODS
@pytest.mark.parametrize("plain", [False, True], ids=["closure", "plain loop"])
def test_step_hooks(method, plain):
    _, opt, closure = problem(method)
    heard = []
    opt.register_step_pre_hook(lambda o, args, kwargs: heard.append(("pre", o is opt)))
    opt.register_step_post_hook(lambda o, args, kwargs: heard.append(("post", o is opt)))
    everywhere = register_optimizer_step_post_hook(
        lambda o, args, kwargs: heard.append(("global", o is opt))
    )
    try:
        four_calls(opt, closure) if plain else opt.step(closure)
    finally:
        everywhere.remove()
    assert heard == [("pre", True), ("post", True), ("global", True)]


def test_state_dict_hooks_see_the_whole_state():
    _, opt, closure = problem()
    opt.step(closure)
    heard = []
    opt.register_state_dict_pre_hook(lambda o: heard.append("before saving"))
    opt.register_state_dict_post_hook(lambda o, state: {**state, "mine": sorted(state)})
    state = opt.state_dict()
    assert heard == ["before saving"] and state["mine"] == ["param_groups", "state"]

    _, other, _ = problem()
    other.register_load_state_dict_pre_hook(lambda o, state: {**state, "state": state["kept"]})
    other.register_load_state_dict_post_hook(lambda o: heard.append("loaded"))
    given = {"param_groups": state["param_groups"], "kept": state["state"]}
    other.load_state_dict(given)
    assert heard[1:] == ["loaded"] and "state" not in given
    assert int(other.counters()["steps"]) == 1


def test_param_groups_are_saved_as_torch_saves_them():
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    opt = KBFGS(model, fallback=torch.optim.SGD, groups=[{"params": model[2], "lr": 0.1}])
    plain = torch.optim.Optimizer.state_dict(opt)["param_groups"]
    saved = opt.state_dict()["param_groups"]
    assert plain[0].pop("kbfgs") == {}  # the place of it
    assert json.loads(json.dumps(saved[0].pop("kbfgs")))["layers"] == {"0": [7, 6], "2": [3, 8]}
    assert saved == plain


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    model, opt, _ = problem()
    twin, opt_twin, closure = problem()
    x, target = rows(12, 5), rows(12, 3, seed=1)

    def zeroing():
        opt.zero_grad(set_to_none=set_to_none)
        loss = (model(x) - target).square().sum() / 24
        loss.backward()
        return loss

    for _ in range(3):
        opt.step(zeroing)
        opt_twin.step(closure)
    assert_same_weights(model, twin)
    opt.zero_grad(set_to_none=set_to_none)
    for p in model.parameters():
        assert p.grad is None if set_to_none else not p.grad.any()


# ---------------------------------------------------------------------- copies


@METHODS
def test_state_is_pickled_and_optimizers_are_not(method):
    model, opt, closure = problem(method)
    opt.step(closure)
    other_model, other, other_closure = problem(method)
    other_model.load_state_dict(pickle.loads(pickle.dumps(model.state_dict())))
    other.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
    opt.step(closure)
    other.step(other_closure)
    assert_same_weights(model, other_model)
    for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled or copied.*state_dict"):
            duplicate(opt)


@METHODS
@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_a_copied_model_has_nothing_to_do_with_the_optimizer(method, how):
    """A copy made beside a live optimizer, even in a pass, trains alone and disturbs nothing."""
    model, opt, closure = problem(method)
    alone, opt_alone, closure_alone = problem(method)
    opt.step(closure)
    opt_alone.step(closure_alone)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    own = method(twin)
    train_twin = closure_of(twin, own, rows(12, 5, seed=7), rows(12, 3, seed=8))

    def closure_beside_the_twin():
        copy.deepcopy(model)(rows(4, 5, seed=9))
        loss = closure()
        twin(rows(4, 5, seed=9)).sum().backward()
        return loss

    first = own.step(train_twin).item()
    for _ in range(3):
        opt.step(closure_beside_the_twin)
        opt_alone.step(closure_alone)
        last = own.step(train_twin).item()
    assert_same_weights(model, alone)
    assert last < first


def test_an_optimizer_that_is_gone_leaves_no_work_behind():
    model, opt, closure = problem()
    opt.step(closure)
    del opt, closure
    gc.collect()
    for module in model.modules():
        for hook in module._forward_hooks.values():
            assert hook._recorder() is None
    second = KBFGS(model)
    second.step(closure_of(model, second, rows(12, 5), rows(12, 3, seed=1)))


@METHODS
def test_the_fallback_s_warning_points_at_the_user(method):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="these parameters go to") as caught:
        method(model)
    assert [warning.filename for warning in caught] == [__file__]


def test_a_hook_removed_inside_a_forward_is_quiet():
    """The garbage collector may take an old optimizer then; torch calls the hook without kwargs."""
    model = mlp(4, 3)
    opt = KBFGS(model)
    model[0].register_forward_hook(lambda *_: opt.close(), prepend=True)
    assert model(rows(2, 4)).shape == (2, 3)
    assert opt.closed


def test_the_summary_says_what_is_not_as_it_should_be():
    model, opt, closure = problem(lr=0.25)
    assert opt.summary() == "step 0, lr 0.25"
    for _ in range(3):
        opt.step(closure)
    opt.steps.guard.scale.fill_(0.5)
    assert opt.summary() == "step 3, lr 0.25, scale 0.5"
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    opt.step(closure)
    assert opt.summary() == "step 4, lr 0.25, 1 skipped, scale 0.5"

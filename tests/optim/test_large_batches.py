"""Large batches: micro-batches, clipping, and steps that leave out the pair or the factors."""

import copy
import itertools
import math
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kbfgs_ext import KBFGS, FactorRule
from kbfgs_ext.optim.direction import Direction
from tests.optim.models import (
    METHODS,
    absolute,
    assert_same,
    closure_of,
    four_calls,
    mlp,
    newton,
    problem,
    rows,
    snapshot,
)

ACTIONS = pytest.mark.parametrize("action", ["ema", "minibatch"])
SIZES = ([4, 4, 4], [7, 4, 1], [1] * 12)


def in_parts(model, opt, x, target, sizes):
    """`closure_of` on micro-batches: each backpropagates its share of the mean, and the whole
    loss is their sum."""

    def closure():
        opt.zero_grad()
        losses = []
        for part, wanted in zip(x.split(sizes), target.split(sizes), strict=True):
            loss = (model(part) - wanted).square().sum() / (2 * x.shape[0])
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    return closure


# ---------------------------------------------------------------------- micro-batches


@METHODS
@ACTIONS
@pytest.mark.parametrize("sizes", SIZES, ids=["even", "uneven", "one by one"])
def test_micro_batches_are_the_full_batch(method, action, sizes):
    """Statistics, factors, pairs and weights after six steps, in float64 to 1e-12."""
    options = {"hessian_action": action, "weight_decay": 0.01, "max_grad_norm": 0.5}
    whole, opt, closure = problem(method, **options)
    split, opt_split, _ = problem(method, **options)
    parts = in_parts(split, opt_split, rows(12, 5), rows(12, 3, seed=1), sizes)
    for _ in range(6):
        loss, loss_split = opt.step(closure), opt_split.step(parts)
        assert loss_split.item() == pytest.approx(loss.item(), rel=1e-12)
    wanted, got = snapshot(whole, opt), snapshot(split, opt_split)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-12, atol=1e-12, msg=name)


def test_micro_batches_of_a_layer_that_is_used_twice():
    """Uses and micro-batches are rows alike; the order in which they come does not matter."""
    torch.manual_seed(0)
    whole = nn.Linear(5, 5, dtype=torch.float64)
    split = nn.Linear(5, 5, dtype=torch.float64)
    split.load_state_dict(whole.state_dict())
    a, b = KBFGS(whole), KBFGS(split)
    x, target = rows(12, 5), rows(12, 5, seed=1)

    def run(model, opt, sizes):
        def closure():
            opt.zero_grad()
            total = 0.0
            for part, wanted in zip(x.split(sizes), target.split(sizes), strict=True):
                loss = (model(model(part).tanh()) - wanted).square().sum() / 24
                loss.backward()
                total += loss.item()
            return total

        return closure

    for _ in range(5):
        a.step(run(whole, a, [12]))
        b.step(run(split, b, [5, 5, 2]))
    torch.testing.assert_close(whole.weight, split.weight, rtol=1e-12, atol=1e-12)


def test_micro_batches_with_random_numbers_and_buffers():
    """Dropout repeats in the second pass, part by part; BatchNorm advances once per part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(), nn.Linear(7, 3))
    opt = KBFGS(model, fallback=torch.optim.AdamW)
    masks = []
    model[2].register_forward_hook(lambda m, i, o: masks.append(o != 0) and None)
    x, target = rows(12, 5, torch.float32), rows(12, 3, torch.float32, seed=1)
    opt.step(in_parts(model, opt, x, target, [6, 6]))
    assert torch.equal(masks[0], masks[2]) and torch.equal(masks[1], masks[3])
    assert not torch.equal(masks[0], masks[1])
    assert int(model[1].num_batches_tracked) == 2


def test_micro_batches_in_a_plain_loop_with_a_scaler_under_autocast():
    runs = []
    for plain in (False, True):
        torch.manual_seed(0)
        model = mlp(5, 7, 3, dtype=torch.float32)
        opt = newton(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        x, target = rows(12, 5, torch.float32), rows(12, 3, torch.float32, seed=1)

        def passes(model=model, opt=opt, scaler=scaler, x=x, target=target):
            opt.zero_grad()
            total = torch.zeros(())
            for part, wanted in zip(x.split(5), target.split(5), strict=True):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = (model(part).float() - wanted).square().sum() / 24
                scaler.scale(loss).backward()
                total += loss.detach()
            return total

        for _ in range(4):
            if plain:
                with opt.first_pass():
                    loss = passes()
                opt.descend(loss, scaler=scaler)
                with opt.second_pass():
                    loss = passes()
                opt.finish(loss)
            else:
                opt.step(passes, scaler=scaler)
            scaler.update()
        runs.append(snapshot(model, opt))
    assert_same(*runs)


# ---------------------------------------------------------------------- clipping


@METHODS
@pytest.mark.parametrize("largest", [1e-3, 0.1, 1e3])
def test_clipping_is_torch_s(method, largest):
    """max_grad_norm is clip_grad_norm_ at the end of the closure; the gradient stays clipped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()
    twin = copy.deepcopy(model)
    sgd = {"fallback": lambda ps: torch.optim.SGD(ps, lr=0.1)}
    opt, opt_twin = method(model, max_grad_norm=largest, **sgd), method(twin, **sgd)
    x, target = rows(12, 5), rows(12, 3, seed=1)
    plain = closure_of(twin, opt_twin, x, target)

    def clipping():
        loss = plain()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), largest)
        return loss

    opt.step(closure_of(model, opt, x, target))
    opt_twin.step(clipping)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=0)
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm <= largest


def test_clipping_reaches_sparse_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 5, sparse=True), nn.Linear(5, 3))
    opt = KBFGS(model, max_grad_norm=1e-3, fallback=lambda ps: torch.optim.SGD(ps, lr=0.1))

    def closure():
        opt.zero_grad()
        loss = model(torch.tensor([1, 1, 4, 7])).square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    parts = [model[0].weight.grad.coalesce().values(), model[1].weight.grad, model[1].bias.grad]
    norm = torch.stack([part.norm() for part in parts]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-2)


def test_clipping_leaves_the_pair_alone():
    """g_bar and g_bar_next are gradients of the loss itself, so y is too."""
    runs = []
    for largest in (None, 1e-4):
        _, opt, closure = problem(max_grad_norm=largest, lr=0.0)
        opt.step(closure)
        runs.append([layer["g_bar"].clone() for layer in opt.layers])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_a_non_finite_gradient_is_not_clipped_into_a_step():
    model, opt, closure = problem(max_grad_norm=1.0)
    opt.step(closure)
    before = snapshot(model, opt)

    def infinite():
        loss = closure()
        if model[0].weight.grad is not None:
            model[0].weight.grad[0, 0] = math.inf
        return loss

    opt.step(infinite)
    assert_same(before, snapshot(model, opt))
    assert int(opt.counters()["skipped"]) == 1


# ---------------------------------------------------------------------- intervals


@METHODS
@ACTIONS
@pytest.mark.parametrize("pair_every", [1, 3])
@pytest.mark.parametrize("update_every", [1, 2])
def test_intervals(method, action, pair_every, update_every):
    """How often the closure runs and each side is updated in 6 steps, and that it still trains."""
    updates = absolute(update_every=update_every)
    _, opt, closure = problem(method, hessian_action=action, pair_every=pair_every, factors=updates)
    calls = itertools.count()

    def counted():
        next(calls)
        return closure()

    losses = [opt.step(counted).item() for _ in range(6)]
    assert losses[-1] < losses[0]
    pairs, factors = 6 // pair_every, 6 // update_every
    assert next(calls) == 6 + pairs
    for counts in opt.diagnostics().values():
        assert int(counts["accepted"] + counts["rejected"]) == pairs
        assert int(counts["accepted_a"] + counts["rejected_a"]) == factors
    assert int(opt.counters()["steps"]) == 6


@METHODS
@ACTIONS
def test_a_step_without_pair_and_factors_changes_the_rest_alone(method, action):
    options = {"pair_every": 2, "factors": absolute(update_every=2)}
    model, opt, closure = problem(method, hessian_action=action, **options)
    opt.step(closure)
    before = snapshot(model, opt)
    opt.step(closure)
    after = snapshot(model, opt)
    assert_same(before, after, but=("weight", "bias", " M"))
    assert not torch.equal(before["0 M"], after["0 M"])
    assert all(not layer.observer.has_inputs() for layer in opt.layers)


@METHODS
@ACTIONS
def test_factors_by_themselves_are_those_of_a_step_with_a_pair(method, action):
    """Step 9 before, with, or without the second pass: the same H_a."""
    runs = []
    for every in (1, 2):
        _, opt, closure = problem(method, hessian_action=action, pair_every=every, lr=0.0)
        for _ in range(4):
            opt.step(closure)
        runs.append([layer["H_a"] for layer in opt.layers])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_steps_between_pairs_keep_no_activations(monkeypatch):
    """With update_every, the inputs are not held through the backward pass either."""
    seen = []
    monkeypatch.setattr(
        Direction,
        "aim",
        lambda self, part, *_: seen.append([x.observer.has_inputs() for x in part.layers]),
    )
    _, opt, closure = problem(factors=absolute(update_every=3), pair_every=3)
    for _ in range(4):
        opt.step(closure)
    assert seen == [[True] * 2, [False] * 2, [False] * 2, [True] * 2]


def test_only_steps_with_a_pair_are_judged():
    """A wild step between pairs stays and leaves the scale; with a pair it is undone."""
    model, opt, closure = problem(pair_every=2)
    opt.step(closure)
    opt.param_groups[0]["lr"] = 1e4
    before = model[0].weight.detach().clone()
    opt.step(closure)
    assert int(opt.counters()["undone"]) == 0 and opt.counters()["scale"] == 1.0
    wild = model[0].weight.detach().clone()
    assert not torch.equal(before, wild) and wild.isfinite().all()
    opt.param_groups[0]["lr"] = 1e9
    opt.step(closure)
    assert int(opt.counters()["undone"]) == 1 and opt.counters()["scale"] == 0.5
    assert torch.equal(wild, model[0].weight)


def test_a_void_first_step_does_not_count_for_the_intervals():
    _, opt, closure = problem(pair_every=2, factors=absolute(update_every=2))
    opt.step(lambda: closure() * math.nan)
    assert opt.steps.number == 0
    calls = []
    opt.step(lambda: calls.append(1) or closure())
    assert len(calls) == 2 and all(layer.started for layer in opt.layers)


def test_the_plain_loop_is_told_when_no_second_pass_is_due():
    _, opt, closure = problem(pair_every=2)
    four_calls(opt, closure)
    with opt.first_pass():
        loss = closure()
    opt.descend(loss)
    assert not opt.second_pass_due
    with pytest.raises(RuntimeError, match=r"second_pass\(\) is out of order"), opt.second_pass():
        pass


def test_intervals_and_clipping_read_nothing_back():
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
        every = {"pair_every": 2, "factors": FactorRule(update_every=3)}
        opt = KBFGS(model, max_grad_norm=1.0, hessian_action="ema", **every)
        x, target = torch.randn(8, 5), torch.randn(8, 3)
        for _ in range(4):
            opt.step(closure_of(model, opt, x, target))
        for _ in range(4):
            opt.step(in_parts(model, opt, x, target, [5, 3]))


def test_a_layer_unfrozen_between_factors_starts_at_once():
    model = mlp(5, 7, 3)
    model[2].requires_grad_(False)
    opt = KBFGS(model, factors=FactorRule(update_every=4))
    closure = closure_of(model, opt, rows(12, 5), rows(12, 3, seed=1))
    opt.step(closure)
    model[2].requires_grad_(True)
    opt.add_param_group({"params": model[2].parameters()})
    before = model[2].weight.detach().clone()
    opt.step(closure)
    assert opt.layers[1].started and not torch.equal(before, model[2].weight)
    assert [int(d["accepted_a"]) for d in opt.diagnostics().values()] == [1, 1]

"""Large sides without a factor: what is computed, kept, said and saved."""

import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kbfgs_ext import KBFGS, KBFGSL
from tests.optim.models import (
    METHODS,
    assert_same,
    closure_of,
    mlp,
    newton,
    newton_l,
    rows,
    snapshot,
)

ACTIONS = pytest.mark.parametrize("action", ["ema", "minibatch"])
BACKENDS = pytest.mark.parametrize("backend", ["reference", "auto"])

# n_a, n_g: layer 0 is 6, 20 and layer 2 is 21, 20 and layer 4 is 21, 3.
SIZES, LARGEST = (5, 20, 20, 3), 10


def build(method, limit: int | None = LARGEST, **options):
    torch.manual_seed(0)
    model = mlp(*SIZES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        opt = method(model, max_factor_dim=limit, **options)
    return model, opt, closure_of(model, opt, rows(12, 5), rows(12, 3, seed=1))


@METHODS
def test_a_warning_names_the_sides_once(method):
    with pytest.warns(UserWarning, match="max_factor_dim=10") as seen:
        method(mlp(*SIZES), max_factor_dim=LARGEST)
    assert len(seen) == 1
    said = str(seen[0].message)
    if method is newton:
        assert said.endswith("0: n_g 20; 2: n_a 21, n_g 20; 4: n_a 21")
    else:  # its pairs are kept
        assert said.endswith(": 2: n_a 21; 4: n_a 21")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method(mlp(*SIZES), max_factor_dim=21)


@METHODS
@ACTIONS
def test_the_default_bounds_memory(method, action):
    """A language model's head of 32,000 tokens: its side has no factor unless asked for."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32_000, bias=False))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        opt = method(model, hessian_action=action, **({"memory": 5} if method is newton_l else {}))
    assert opt.memory_usage()["total"] < 6 * 4 * 64 * 32_000  # six times the head
    said = ["max_factor_dim=8192", ": 1: n_g 32000"] if method is newton else []
    assert len(seen) == bool(said) and all(part in str(seen[0].message) for part in said)
    assert opt.coverage()[1].reason == ("no factor for n_g 32000" if said else "")


def test_a_factor_larger_than_the_model_is_named():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8000, bias=False))
    with pytest.warns(UserWarning, match="more memory than the model.*: 1: H_g 244 MiB") as seen:
        KBFGS(model)
    assert len(seen) == 1


@METHODS
@ACTIONS
@BACKENDS
def test_the_direction_is_that_of_an_identity(method, action, backend):
    """P = H_g M, M H_a or M, beside a run that puts identities into full factors."""
    options = {"hessian_action": action, "safeguard": False, "lr": 0.0}
    model, opt, closure = build(method, backend=backend, **options)
    other, whole, again = build(method, None, **options)
    for _ in range(6):
        losses = opt.step(closure).item(), whole.step(again).item()
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
        for layer, full in zip(opt.layers, whole.layers, strict=True):
            for side in ("H_a", "H_g"):
                if full.has(side) and not layer.has(side):
                    full[side].copy_(torch.eye(len(full[side])))
        opt.param_groups[0]["lr"] = whole.param_groups[0]["lr"] = 0.3  # from the second step on
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@METHODS
@ACTIONS
def test_what_is_kept_and_counted(method, action):
    _, opt, closure = build(method, hessian_action=action)
    predicted = opt.memory_usage()
    opt.warm_start([rows(12, 5), rows(4, 5)])
    for _ in range(4):
        opt.step(closure)
    assert opt.memory_usage() == predicted
    assert (
        predicted["total"] < build(method, None, hessian_action=action)[1].memory_usage()["total"]
    )
    first, middle, last = opt.layers
    assert first.has("H_a") and not middle.has("H_a") and not last.has("H_a")
    assert predicted["H_a"] == 6 * 6 * 8 and predicted["product"] == 20 * 6 * 8
    assert predicted.get("A", 0) == (6 * 6 * 8 if action == "ema" else 0)
    assert predicted.get("H_g", 0) == (3 * 3 * 8 if method is newton else 0)
    report = opt.diagnostics()
    assert int(report["0"]["accepted_a"] + report["0"]["rejected_a"]) == 4
    assert int(report["2"]["accepted_a"] + report["2"]["rejected_a"]) == 0
    pairs = [int(counts["accepted"] + counts["rejected"]) for counts in report.values()]
    assert pairs == ([0, 0, 4] if method is newton else [4, 4, 4])


@METHODS
@ACTIONS
@pytest.mark.parametrize("limit", [1, LARGEST])
def test_training_and_resuming(method, action, limit):
    model, opt, closure = build(method, limit, hessian_action=action, lr=0.1)
    losses = [opt.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    copy, resumed, again = build(method, limit, hessian_action=action, lr=0.1)
    copy.load_state_dict(model.state_dict())
    resumed.load_state_dict(opt.state_dict())
    for _ in range(3):
        opt.step(closure)
        resumed.step(again)
    assert_same(snapshot(model, opt), snapshot(copy, resumed))
    with pytest.raises(ValueError, match=f"max_factor_dim = {limit}, this .* = None"):
        build(method, None, hessian_action=action)[1].load_state_dict(opt.state_dict())


@METHODS
@ACTIONS
def test_a_limit_above_all_sides_changes_nothing(method, action):
    a, opt, closure = build(method, 21, hessian_action=action)
    b, whole, again = build(method, None, hessian_action=action)
    for _ in range(5):
        opt.step(closure)
        whole.step(again)
    assert_same(snapshot(a, opt), snapshot(b, whole))


@METHODS
@ACTIONS
@BACKENDS
def test_no_host_read(method, action, backend):
    with FakeTensorMode():
        _, opt, closure = build(method, hessian_action=action, backend=backend)
        for _ in range(3):
            opt.step(closure)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (2.5, TypeError), (True, TypeError)])
def test_bad_values(value, error):
    with pytest.raises(error, match=f"max_factor_dim must be .*got {value}"):
        KBFGSL(mlp(4, 3), max_factor_dim=value)

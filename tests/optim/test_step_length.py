"""step_length: how far a layer goes along its direction P.

"layer": lr. "balanced": all layers alike, and together as far as lr*P.
"""

import pytest
import torch
from torch import nn

from kbfgs_ext import DirectionRule
from tests.optim.models import (
    METHODS,
    absolute,
    assert_same,
    closure_of,
    mlp,
    problem,
    rows,
    snapshot,
)

LR = 1e-3
LENGTHS = pytest.mark.parametrize("kind", ["balanced", "layer"])


def by(step_length):
    """The paper's direction by another length."""
    return DirectionRule("newton", step_length=step_length)


def joined(model):
    """[W, b] of every layer, copied."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [torch.cat([m.weight, m.bias[:, None]], 1).detach().clone() for m in layers]


def changes(method, steps=1, **options):
    """What the last of ``steps`` steps has added to each layer's [W, b]."""
    model, opt, closure = problem(method, **{"lr": LR, "safeguard": False, **options})
    for _ in range(steps - 1):
        opt.step(closure)
    before = joined(model)
    opt.step(closure)
    return [after - b for after, b in zip(joined(model), before, strict=True)]


@METHODS
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"factors": absolute(initial_scale=7.0)},
        {"block_size": 1},
        {"block_size": 4},
        {"momentum": 0.0},
    ],
    ids=str,
)
def test_a_layer_moves_by_lr_along_its_direction(method, backend, options):
    options = {**options, "backend": backend}
    moved = changes(method, 1, direction=by("layer"), **options)
    for step, along in zip(moved, changes(method, 1, **options), strict=True):
        length = LR * step.shape[0] ** 0.5
        assert float(step.norm()) == pytest.approx(length, rel=1e-9)
        torch.testing.assert_close(step, along * (length / along.norm()), rtol=1e-7, atol=1e-12)
    for step in changes(method, 5, direction=by("layer"), **options):  # the factors have pairs now
        assert float(step.norm()) == pytest.approx(LR * step.shape[0] ** 0.5, rel=1e-9)


@METHODS
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(
    "options", [{}, {"factors": absolute(initial_scale=7.0)}, {"block_size": 4}], ids=str
)
def test_balanced_layers_share_the_whole_length(method, backend, options):
    options = {**options, "backend": backend}
    moved = changes(method, 1, direction=by("balanced"), **options)
    plain = changes(method, 1, **options)
    for step, along in zip(moved, plain, strict=True):
        cosine = (step * along).sum() / (step.norm() * along.norm())
        assert float(cosine) == pytest.approx(1.0, rel=1e-9)
    rows_of = [float(step.norm()) / step.shape[0] ** 0.5 for step in moved]
    assert rows_of == pytest.approx([rows_of[0]] * len(rows_of), rel=1e-9)
    whole, wanted = (sum(float(s.norm()) ** 2 for s in steps) for steps in (moved, plain))
    assert whole == pytest.approx(wanted, rel=1e-9)
    later = changes(method, 5, direction=by("balanced"), **options)  # the factors have pairs now
    rows_of = [float(step.norm()) / step.shape[0] ** 0.5 for step in later]
    assert rows_of == pytest.approx([rows_of[0]] * len(rows_of), rel=1e-9)
    assert rows_of[0] > 0


@METHODS
def test_the_safeguard_shortens_it(method):
    """The next step is as long as the scale says."""
    model, opt, closure = problem(method, lr=30.0, direction=by("layer"))
    opt.step(closure)
    assert int(opt.counters()["undone"]) == 1
    scale = float(opt.counters()["scale"])
    before = joined(model)
    with opt.first_pass():
        loss = closure()
    opt.descend(loss)  # and no judgement
    for after, b in zip(joined(model), before, strict=True):
        assert float((after - b).norm()) == pytest.approx(30 * scale * b.shape[0] ** 0.5)


@METHODS
@LENGTHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_without_a_gradient_stays(method, kind, dtype):
    """P = 0 has no direction: dead units, or an output that the loss does not look at."""
    model = mlp(5, 7, 3, dtype=dtype)
    with torch.no_grad():
        model[0].bias.fill_(-1e3)  # every unit is dead
    opt = method(model, lr=0.1, direction=by(kind))
    before = joined(model)
    for seed in range(3):
        x, target = rows(8, 5, dtype, seed=seed), rows(8, 3, dtype, seed=9 + seed)
        opt.step(closure_of(model, opt, x, target))
    first, last = joined(model)
    assert torch.equal(first, before[0])
    assert torch.isfinite(last).all()
    assert not torch.equal(last, before[1])


@METHODS
@LENGTHS
def test_layers_whose_gradients_differ_in_scale_move_alike(method, kind):
    lengths = {}
    for length in ("direction", kind):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(6, 6, dtype=torch.float64) for _ in range(12)))
        opt = method(model, lr=1e-3, direction=by(length))
        before = joined(model)
        opt.step(closure_of(model, opt, rows(8, 6), rows(8, 6)))
        moved = [float((a - b).norm()) for a, b in zip(joined(model), before, strict=True)]
        lengths[length] = max(moved) / min(moved)
    assert lengths["direction"] > 100
    assert lengths[kind] == pytest.approx(1.0)


@METHODS
def test_the_paper_length_is_the_default_bit_for_bit(method):
    results = []
    for options in ({}, {"direction": by("direction")}):
        model, opt, closure = problem(method, **options)
        for _ in range(6):
            opt.step(closure)
        results.append(snapshot(model, opt))
    assert_same(*results)


@pytest.mark.parametrize("value", ["unit", 1.0])
def test_bad_values(value):
    with pytest.raises(ValueError, match=f"step_length must be one of .*got {value!r}"):
        DirectionRule(step_length=value)

"""The constructor's defaults: polar directions, Nesterov's momentum, relative dampings."""

import io
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kbfgs_ext import KBFGS, DirectionRule, FactorRule, ops
from kbfgs_ext.ops.spectral import SHIFTS, WEIGHTS
from kbfgs_ext.ops.spectral.reference import polar
from kbfgs_ext.optim import factors
from tests.optim.models import (
    DEFAULTS,
    METHODS,
    assert_same,
    closure_of,
    mlp,
    rows,
    snapshot,
)

ACTIONS = pytest.mark.parametrize("action", ["ema", "minibatch"])


def joined(model):
    layers = [m for m in model if isinstance(m, nn.Linear)]
    return [torch.cat([m.weight, m.bias[:, None]], 1).detach().clone() for m in layers]


def gradients(model):
    layers = [m for m in model if isinstance(m, nn.Linear)]
    return [torch.cat([m.weight.grad, m.bias.grad[:, None]], 1).clone() for m in layers]


def problem(method=KBFGS, **options):
    """A small model in float64, its optimizer and a closure."""
    torch.manual_seed(0)
    model = mlp(5, 7, 3, dtype=torch.float64)
    opt = method(model, **options)
    x, target = rows(12, 5, torch.float64), rows(12, 3, torch.float64, seed=1)
    return model, opt, closure_of(model, opt, x, target)


def first_step(method, **options):
    """[W, b] before and after a first step, the gradients, and the layers."""
    model, opt, closure = problem(method, safeguard=False, **options)
    before = joined(model)
    opt.step(closure)
    return before, joined(model), gradients(model), opt.layers


@METHODS
def test_a_first_step_is_the_polar_factor_of_the_preconditioned_gradient(method):
    """H_g is the identity then, and M a share of the gradient, which makes no difference. The first
    layer has more outputs than inputs, the second fewer: that one has H_a."""
    direction = DirectionRule(step_length="direction", nesterov=False)
    before, after, D, layers = first_step(method, damping=0.3, lr=0.01, direction=direction)
    assert [layer.tall for layer in layers] == [True, False]
    for b, a, d, layer, X in zip(before, after, D, layers, inputs(), strict=True):
        X = torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], 1)
        A = X.T @ X / len(X)
        H_a = torch.linalg.inv(A + 0.3**0.5 * torch.eye(layer.n_a, dtype=A.dtype))
        P = polar(d if layer.tall else d @ H_a, WEIGHTS, 0.0, SHIFTS)
        torch.testing.assert_close(b - a, 0.01 * P, rtol=1e-9, atol=1e-13)
        assert torch.linalg.svdvals((b - a) / 0.01).max() < 1.1


def inverse_factor(g):
    """H_g of a block, of K-BFGS(L) by its pairs."""
    if isinstance(g, factors.GradientMatrix):
        return g["H_g"].clone()
    H, eye = (torch.eye(g.n, dtype=torch.float64) for _ in range(2))
    ring = ([g[name]] for name in ("S", "Y", "rho", "pushed"))
    ops.lbfgs_two_loop_([H], [eye], *ring, "recursion", "reference")
    return H


@DEFAULTS
@pytest.mark.parametrize("block_size", ["auto", 3])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4)], ids=["tall", "wide"])
def test_a_direction_has_the_factor_of_the_longer_side(method, shape, block_size):
    """In a step before which both factors have learnt, in one block or in several."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*shape, dtype=torch.float64), nn.Tanh())
    direction = DirectionRule(step_length="direction", nesterov=False)
    options = {"direction": direction, "pair_every": 1, "lr": 0.01, "damping_g": 0.1}
    opt = method(model, block_size=block_size, **options)
    x, target = (rows(40, n, torch.float64, seed=n) for n in shape)
    closure = closure_of(model, opt, x, target)
    for _ in range(9):
        opt.step(closure)
    (layer,) = opt.layers
    assert layer.tall == (shape[1] > shape[0])
    H_g = torch.block_diag(*map(inverse_factor, layer.gradients))
    H_a = torch.block_diag(*(a["H_a"] for a in layer.activations))
    assert all((H - torch.eye(len(H)).double()).abs().max() > 0.01 for H in (H_g, H_a))
    (before,) = joined(model)
    opt.step(closure)
    P = polar(H_g @ layer["M"] if layer.tall else layer["M"] @ H_a, WEIGHTS, 0.0, SHIFTS)
    torch.testing.assert_close(before - joined(model)[0], 0.01 * P, rtol=1e-7, atol=1e-12)


def inputs():
    """Of both layers in the first step."""
    model, _, closure = problem()
    seen = []
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    closure()
    return seen


@DEFAULTS
@ACTIONS
def test_a_run_does_not_know_the_scale_of_the_loss(method, action):
    losses = []
    for scale in (0.01, 1.0, 100.0):
        torch.manual_seed(0)
        model = mlp(6, 9, 3, dtype=torch.float64)
        x, target = rows(32, 6, torch.float64), rows(32, 3, torch.float64, seed=1)
        opt = method(model, pair_every=1, hessian_action=action)

        def closure(model=model, opt=opt, x=x, target=target, scale=scale):
            opt.zero_grad()
            loss = scale * F.mse_loss(model(x), target)
            loss.backward()
            return loss

        losses.append([opt.step(closure).item() / scale for _ in range(25)])
    assert losses[1][-1] < 0.8 * losses[1][0]
    for other in losses[0], losses[2]:
        assert other == pytest.approx(losses[1], rel=1e-6)


@METHODS
def test_the_activation_damping_is_a_share_of_the_mean_square_input(method):
    _, _, _, layers = first_step(method, damping_a=0.25, factors=FactorRule())
    for layer in layers:
        assert float(layer["lam_a"]) == pytest.approx(0.25 * float(layer["v"]), rel=1e-12)
    model, opt, closure = problem(method, factors=FactorRule())
    seen = []
    model[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for _ in range(3):
        opt.step(closure)
    assert float(opt.layers[0]["v"]) == pytest.approx(float(seen[0].square().mean()), rel=1e-12)


@METHODS
def test_nesterov_looks_a_gradient_ahead(method):
    """After the first step M is (1-mu)*D, and what is preconditioned (1-mu)*(1+mu)*D."""
    options = {"momentum": 0.75, "lr": 0.1}
    b, plain, _, _ = first_step(method, **options)
    before, ahead, _, _ = first_step(
        method, direction=DirectionRule("newton", nesterov=True), **options
    )
    assert all(map(torch.equal, b, before))
    for start, p, a in zip(b, plain, ahead, strict=True):
        torch.testing.assert_close(a - start, 1.75 * (p - start), rtol=1e-10, atol=1e-14)


@DEFAULTS
@ACTIONS
@pytest.mark.parametrize("largest", [None, 6, 1])
def test_kernels_and_reference_agree(method, action, largest):
    runs = []
    for backend in ("reference", "auto"):
        model, opt, closure = problem(
            method,
            pair_every=2,
            hessian_action=action,
            block_size=largest,
            backend=backend,
        )
        for _ in range(8):
            opt.step(closure)
        runs.append(joined(model))
    for mine, other in zip(*runs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)


@DEFAULTS
def test_a_resumed_run_goes_on_bit_for_bit(method):
    model, opt, closure = problem(method, pair_every=3)
    for _ in range(5):
        opt.step(closure)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    model_2, opt_2, closure_2 = problem(method, pair_every=3)
    model_2.load_state_dict(saved["model"])
    opt_2.load_state_dict(saved["opt"])
    for _ in range(4):
        assert torch.equal(opt.step(closure), opt_2.step(closure_2))
    assert_same(snapshot(model, opt), snapshot(model_2, opt_2))


@DEFAULTS
def test_a_gradient_of_zero_and_one_that_is_not_finite_move_nothing(method):
    model = mlp(5, 7, 3)
    opt = method(model)
    x, target = rows(8, 5), rows(8, 3)
    opt.step(closure_of(model, opt, x, target))
    before = snapshot(model, opt)
    opt.step(closure_of(model, opt, x * float("nan"), target))
    after = snapshot(model, opt)
    assert_same(before, after)
    assert int(opt.counters()["skipped"]) == 1
    with torch.no_grad():
        model[0].bias.fill_(-1e3)  # every unit is dead
    opt = method(model)
    still = joined(model)[0]
    opt.step(closure_of(model, opt, x, target))
    assert torch.equal(joined(model)[0], still)


def test_what_it_is_not():
    with pytest.raises(ValueError, match="direction must be one of .*, got 'polar'"):
        KBFGS(mlp(5, 3), direction="polar")
    with pytest.raises(TypeError, match="direction must be a string or a DirectionRule, got 1"):
        KBFGS(mlp(5, 3), direction=1)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@DEFAULTS
def test_it_learns_digits_whatever_the_scale_of_the_loss(method, scale):
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = (torch.as_tensor(a) for a in datasets.load_digits(return_X_y=True))
    x = x.float() / 16
    torch.manual_seed(0)
    sizes = (64, 128, 128, 128, 10)
    layers = [[nn.Linear(n, k), nn.ReLU()] for n, k in itertools.pairwise(sizes)]
    model = nn.Sequential(*[m for pair in layers for m in pair][:-1])
    opt = method(model)
    for _ in range(60):
        batch = torch.randint(len(x), (300,))

        def closure(batch=batch):
            opt.zero_grad()
            loss = scale * F.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            return loss

        loss = opt.step(closure).item() / scale
    assert loss < 0.1


@DEFAULTS
@pytest.mark.parametrize("largest", [None, 6, 1])
def test_no_product_is_written_over_what_it_reads(method, largest, monkeypatch):
    """Kernels have many blocks at work on a layer at once: P must not share memory with M."""
    seen = []
    for name in ("kron_precondition_", "lbfgs_two_loop_"):
        op = getattr(factors.ops, name)

        def watched(*args, op=op):
            seen.append((args[0], [t for arg in args[1:4] for t in arg]))
            return op(*args)

        monkeypatch.setattr(factors.ops, name, watched)
    _, opt, closure = problem(method, block_size=largest)
    for _ in range(2):
        opt.step(closure)
    assert seen
    for written, read in seen:
        places = {t.data_ptr() for t in written}
        assert len(places) == len(written)
        assert not places & {t.data_ptr() for t in read if t.numel()}

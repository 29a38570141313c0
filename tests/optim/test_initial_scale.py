"""H_g starts as gamma*I: in the first step, in every later one, and for a ring of pairs alike."""

import math

import pytest
import torch

from kbfgs_ext import FactorRule
from tests.optim.models import METHODS, absolute, assert_same, newton, newton_l, problem, snapshot

SCALES = pytest.mark.parametrize("gamma", ["damping", 3.0, 0.25])


def trained(method, steps, **options):
    model, opt, closure = problem(method, **options)
    for _ in range(steps):
        opt.step(closure)
    return model, opt


@METHODS
@SCALES
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_first_step_is_gamma_times_as_long(method, gamma, backend):
    options = {"damping_g": 0.7, "backend": backend, "lr": 1e-3}
    start = [p.detach().clone() for p in problem(method)[0].parameters()]
    plain, _ = trained(method, 1, **options)
    scaled, _ = trained(method, 1, factors=absolute(initial_scale=gamma), **options)
    wanted = 1 / 0.7 if gamma == "damping" else gamma
    for w, p, q in zip(start, plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(q - w, wanted * (p - w), rtol=1e-9, atol=1e-15)


@SCALES
def test_ring_and_matrix_are_the_same_factor(gamma):
    """As long as the ring holds every pair."""
    steps = 12
    model, opt = trained(newton, steps, factors=absolute(initial_scale=gamma))
    other, ring = trained(newton_l, steps, factors=absolute(initial_scale=gamma), memory=steps)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    assert str(opt.diagnostics()) == str(ring.diagnostics())
    plain, _ = trained(newton, steps)
    assert not torch.allclose(plain[0].weight, model[0].weight, rtol=1e-3)


@METHODS
def test_the_paper_start_is_the_default_bit_for_bit(method):
    assert_same(
        snapshot(*trained(method, 6)),
        snapshot(*trained(method, 6, factors=absolute(initial_scale=1.0))),
    )


@METHODS
def test_resume(method):
    model, opt, closure = problem(method, factors=absolute(initial_scale="damping"))
    for _ in range(3):
        opt.step(closure)
    other, resumed, again = problem(method, factors=absolute(initial_scale="damping"))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(opt.state_dict())
    for _ in range(3):
        opt.step(closure)
        resumed.step(again)
    assert_same(snapshot(model, opt), snapshot(other, resumed))
    with pytest.raises(ValueError, match="initial_scale = 'damping', this .* = 1.0"):
        problem(method)[1].load_state_dict(opt.state_dict())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, "in .* got 0"),
        (math.inf, "in .* got inf"),
        ("one", "a number or 'damping', got 'one'"),
        (None, "a number, got None"),
    ],
)
def test_bad_values(value, message):
    with pytest.raises((ValueError, TypeError), match=f"initial_scale must be {message}"):
        FactorRule(initial_scale=value)

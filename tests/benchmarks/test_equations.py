"""The problems of benchmarks.physics: their solutions solve them, and their losses know it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.equations import PROBLEMS, Burgers, Poisson, Problem

pytestmark = pytest.mark.parametrize("kind", PROBLEMS.values(), ids=list(PROBLEMS))


def shifted(x: Tensor, coordinate: int, by: float) -> Tensor:
    moved = x.clone()
    moved[:, coordinate] += by
    return moved


def test_the_solution_vanishes_in_the_loss(kind: type[Problem]) -> None:
    problem = kind(seed=0, points=200)
    x = problem.inside.requires_grad_()
    assert problem.residual(x, problem.exact(x)).abs().max() < 1e-11
    assert problem.loss(problem.exact) < 1e-22
    assert problem.error(problem.exact) == 0


def test_the_solution_solves_the_equation_by_finite_differences(kind: type[Problem]) -> None:
    """Without the gradients of the loss: the equations written anew."""
    torch.manual_seed(0)
    low, high = (torch.tensor(corner, dtype=torch.float64) for corner in (kind.low, kind.high))
    x = low + (high - low) * (0.05 + 0.9 * torch.rand(100, 2, dtype=torch.float64))
    problem, h = kind(seed=0, points=10), 1e-4
    u = problem.exact(x)
    right, left, above, below = (
        problem.exact(shifted(x, i, by)) for i, by in ((0, h), (0, -h), (1, h), (1, -h))
    )
    if kind is Poisson:
        laplacian = (right + left + above + below - 4 * u) / h**2
        f = 2 * math.pi**2 * sum(torch.sin(k * math.pi * x).prod(1) for k in (1, 2, 4))
        torch.testing.assert_close(-laplacian[:, 0], f, rtol=1e-5, atol=1e-5)
    else:
        u_x, u_xx, u_t = (right - left) / (2 * h), (right - 2 * u + left) / h**2, above - below
        left_side, right_side = u_t / (2 * h) + u * u_x, 0.01 / math.pi * u_xx
        torch.testing.assert_close(
            left_side, right_side, rtol=1e-3, atol=1e-3 * float(u_x.abs().max())
        )


def test_the_edge_has_the_values_of_the_problem(kind: type[Problem]) -> None:
    problem = kind(seed=0, points=100)
    x, t = problem.edge.unbind(1)
    wanted = torch.zeros_like(x)
    if kind is Burgers:
        wanted = torch.where(t == 0, -torch.sin(math.pi * x), wanted)
        assert ((t == 0) | (x.abs() == 1)).all()
    torch.testing.assert_close(problem.edge_values[:, 0], wanted, rtol=0, atol=1e-14)


def test_the_quadrature_has_converged(kind: type[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    values = kind(seed=0, points=10).grid[1]
    monkeypatch.setattr(kind, "nodes", 200, raising=False)
    torch.testing.assert_close(kind(seed=0, points=10).grid[1], values, rtol=0, atol=1e-14)


def test_points_and_network_are_the_seeds(kind: type[Problem]) -> None:
    first, again, other = (kind(seed=seed, points=50) for seed in (1, 1, 2))
    assert torch.equal(first.inside, again.inside) and torch.equal(first.edge, again.edge)
    assert not torch.equal(first.inside, other.inside)
    assert len(first.inside) == 50 and len(first.edge) == 5 * len(kind.sides)
    torch.manual_seed(1)
    model = kind.network(7)
    assert [layer.out_features for layer in model[::2]] == [7, 7, 7, 1]
    loss = first.loss(model)
    loss.backward()
    assert loss.dtype == torch.float64
    assert all(p.grad is not None for p in model.parameters())

"""Partial differential equations with known solutions, as losses for a network u(x).

    loss(u)  = mean r(x)^2 over points inside + edge_weight * mean (u(x) - u*(x))^2 over the edge
    error(u) = |u - u*| / |u*|, Euclidean norms over a grid

r is what u leaves of the equation and u* its solution, of which the loss knows the edge alone. All
in float64; the points are drawn once, by the seed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]  # (n, 2) -> (n, 1)


class Problem(ABC):
    """An equation on a box, with the values of its solution on some of the box's sides."""

    title: ClassVar[str]
    low: ClassVar[tuple[float, float]]  # the box's corners
    high: ClassVar[tuple[float, float]]
    sides: ClassVar[tuple[tuple[int, float], ...]]  # a coordinate and its value there
    edge_weight: ClassVar[float]
    points: ClassVar[int]  # inside; a tenth as many on each side
    width: ClassVar[int]  # of the network's hidden layers
    grid_shape: ClassVar[tuple[int, int]]

    def __init__(
        self, seed: int, points: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        sobol = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed)
        count = points or self.points
        low, high = (torch.tensor(corner, dtype=torch.float64) for corner in (self.low, self.high))

        def draw(n: int) -> Tensor:
            return low + (high - low) * sobol.draw(n, dtype=torch.float64)

        inside = draw(count)
        sides = []
        for coordinate, value in self.sides:
            sides.append(draw(max(count // 10, 1)))
            sides[-1][:, coordinate] = value
        self.inside = inside.to(device)
        self.edge = torch.cat(sides).to(device)
        self.edge_values = self.exact(self.edge)

    @abstractmethod
    def exact(self, x: Tensor) -> Tensor:
        """The solution."""

    @abstractmethod
    def residual(self, x: Tensor, u: Tensor) -> Tensor:
        """What values ``u`` at ``x``, which wants a gradient, leave of the equation."""

    def loss(self, u: Function) -> Tensor:
        """Mean squares of the residual and, weighted, of the difference on the edge."""
        x = self.inside.detach().requires_grad_()
        residual = self.residual(x, u(x))
        difference = u(self.edge) - self.edge_values
        return residual.square().mean() + self.edge_weight * difference.square().mean()

    @torch.no_grad()
    def error(self, u: Function) -> float:
        """The relative error in the Euclidean norm over the grid."""
        x, values = self.grid
        return float((u(x) - values).norm() / values.norm())

    @cached_property
    def grid(self) -> tuple[Tensor, Tensor]:
        """Points on a grid over the box, its boundary included, and the solution there."""
        lines = [
            torch.linspace(*ends, dtype=torch.float64)
            for ends in zip(self.low, self.high, self.grid_shape, strict=True)
        ]
        x = torch.cartesian_prod(*lines).to(self.inside.device)
        return x, self.exact(x)

    @classmethod
    def network(cls, width: int | None = None) -> nn.Sequential:
        """Three hidden layers with tanh, Glorot's normal weights, no biases at first."""
        widths = (2, *[width or cls.width] * 3, 1)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out, dtype=torch.float64), nn.Tanh()]
            nn.init.xavier_normal_(layers[-2].weight)
            nn.init.zeros_(layers[-2].bias)
        return nn.Sequential(*layers[:-1])


def gradient(u: Tensor, x: Tensor) -> Tensor:
    """du/dx by rows, (n, 2), where u (n or (n, 1)) depends on x row by row; differentiable."""
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


class Poisson(Problem):
    """-Laplace u = f on the unit square, u = 0 around it, with three frequencies in f:

        u* = sum_k sin(k pi x) sin(k pi y) / k^2,    f = 2 pi^2 sum_k sin(k pi x) sin(k pi y)

    Both sides are divided by 2 pi^2, so that the residual is of the order of 1 at first.
    """

    title = "Poisson, three frequencies"
    low, high = (0.0, 0.0), (1.0, 1.0)
    sides = ((0, 0.0), (0, 1.0), (1, 0.0), (1, 1.0))
    edge_weight = 10.0
    points = 1_000
    width = 50
    grid_shape = (101, 101)
    frequencies = (1, 2, 4)

    def _sum(self, x: Tensor, power: int) -> Tensor:
        waves = (
            torch.sin(k * math.pi * x).prod(1, keepdim=True) / k**power for k in self.frequencies
        )
        return torch.stack(list(waves)).sum(0)

    def exact(self, x: Tensor) -> Tensor:
        """u*, above."""
        return self._sum(x, 2)

    def residual(self, x: Tensor, u: Tensor) -> Tensor:
        """(Laplace u + f) / (2 pi^2), (n)."""
        slope = gradient(u, x)
        laplacian = sum(gradient(slope[:, i], x)[:, i] for i in range(2))
        return laplacian / (2 * math.pi**2) + self._sum(x, 0)[:, 0]


class Burgers(Problem):
    """u_t + u u_x = nu u_xx for x in [-1, 1], t in [0, 1], with nu = 0.01/pi, u = -sin(pi x) at
    t = 0 and u = 0 at both ends. By Cole's and Hopf's transformation

        u* = -E[sin(pi y) w(y)] / E[w(y)],    w(y) = exp(-cos(pi y) / (2 pi nu)),

    y normal about x with variance 2 nu t: Gauss-Hermite quadrature, the weights by a softmax. The
    columns of the points are x and t.
    """

    title = "Burgers, viscosity 0.01/π"
    low, high = (-1.0, 0.0), (1.0, 1.0)
    sides = ((1, 0.0), (0, -1.0), (0, 1.0))
    edge_weight = 10.0
    points = 2_000
    width = 50
    grid_shape = (257, 101)
    viscosity = 0.01 / math.pi
    nodes = 100  # doubling them changes the values on the grid by 1e-14 at most (tested)

    def exact(self, x: Tensor) -> Tensor:
        """u*, above."""
        z, weights = (torch.as_tensor(a).to(x) for a in np.polynomial.hermite.hermgauss(self.nodes))
        y = x[:, :1] - 2 * (self.viscosity * x[:, 1:]).sqrt() * z
        exponents = weights.log() - torch.cos(math.pi * y) / (2 * math.pi * self.viscosity)
        return -(exponents.softmax(1) * torch.sin(math.pi * y)).sum(1, keepdim=True)

    def residual(self, x: Tensor, u: Tensor) -> Tensor:
        """u_t + u u_x - nu u_xx, (n)."""
        u_x, u_t = gradient(u, x).unbind(1)
        return u_t + u[:, 0] * u_x - self.viscosity * gradient(u_x, x)[:, 0]


PROBLEMS: dict[str, type[Problem]] = {"poisson": Poisson, "burgers": Burgers}

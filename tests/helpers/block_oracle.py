"""K-BFGS with block-diagonal factors in plain PyTorch and float64: docs/algorithm.md, dense.

Every factor is written out as one block-diagonal matrix where it is applied, and every block is
updated by the product form of BFGS; autograd gives the gradients of whole layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn

from tests.helpers import oracles

Rows = list[slice]


def slices(sizes: list[int]) -> Rows:
    """Blocks of these sizes, one after the other."""
    ends = [0, *itertools.accumulate(sizes)]
    return [slice(begin, end) for begin, end in itertools.pairwise(ends)]


class BlockLayer:
    """A Linear layer: ``W`` is [W, b], and each side has one factor for every one of its blocks."""

    def __init__(self, layer: nn.Linear, n_g: list[int], n_a: list[int], method: dict) -> None:
        self.layer, self.method = layer, method
        self.g, self.a = slices(n_g), slices(n_a)
        self.M: torch.Tensor | float = 0.0
        self.s, self.y = torch.zeros(2, sum(n_g), dtype=torch.float64)
        self.H_g = [torch.eye(n, dtype=torch.float64) for n in n_g]
        self.pairs: list[list] = [[] for _ in n_g]
        self.A: list[torch.Tensor] = []
        self.H_a: list[torch.Tensor] = []
        self.counts_g, self.counts_a = [[0] * 4 for _ in n_g], [[0] * 2 for _ in n_a]

    def W(self) -> torch.Tensor:
        W, b = self.layer.weight.detach(), self.layer.bias
        return W.clone() if b is None else torch.cat([W, b.detach()[:, None]], 1)

    def D(self) -> torch.Tensor:
        dW, b = self.layer.weight.grad, self.layer.bias
        return dW.clone() if b is None else torch.cat([dW, b.grad[:, None]], 1)

    def see(self, X: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """X~, the mean output, and the gradient of the bias, from one pass."""
        X = X if self.layer.bias is None else oracles.with_ones(X)
        return X.detach(), h.detach().mean(0), h.grad.sum(0)

    def start(self, X: torch.Tensor) -> None:
        self.A = [X[:, j].T @ X[:, j] / len(X) for j in self.a]
        lam = self.method["lam_a"]
        self.H_a = [torch.linalg.inv(A + lam * torch.eye(len(A), dtype=A.dtype)) for A in self.A]

    def direction(self) -> torch.Tensor:
        H_g, H_a = torch.block_diag(*self.H_g), torch.block_diag(*self.H_a)
        return oracles.kron_direction(H_g, self.M, H_a)

    def update_a(self, X: torch.Tensor) -> None:
        for j, rows in enumerate(self.a):
            a_bar = X[:, rows].mean(0)
            s = self.H_a[j] @ a_bar
            A = self.A[j] if self.method["keep_A"] else X[:, rows].T @ X[:, rows] / len(X)
            y = A @ s + self.method["lam_a"] * s
            if gate(s, y, a_bar):
                self.H_a[j] = oracles.bfgs_inverse(self.H_a[j], s, y)
            self.counts_a[j][not gate(s, y, a_bar)] += 1

    def update_g(self, h_change: torch.Tensor, g: torch.Tensor, g_next: torch.Tensor) -> None:
        decay, mu1, mu2 = (self.method[name] for name in ("pair_decay", "powell", "lam_g"))
        self.s = decay * self.s + (1 - decay) * h_change
        self.y = decay * self.y + (1 - decay) * (g_next - g)
        for i, rows in enumerate(self.g):
            s, y, H = self.s[rows], self.y[rows], self.H_g[i]
            yHy = y @ H @ y
            if not s @ y > mu1 * yHy:
                t = (1 - mu1) * yHy / (yHy - s @ y)
                s = t * s + (1 - t) * H @ y
                self.counts_g[i][2] += 1
            if not s @ y > mu2 * s @ s:
                t = (1 - mu2) * (s @ s) / (s @ s - s @ y)
                y = t * y + (1 - t) * s
                self.counts_g[i][3] += 1
            accepted = gate(s, y, g[rows])
            self.counts_g[i][not accepted] += 1
            if accepted and self.method["memory"] is None:
                self.H_g[i] = oracles.bfgs_inverse(H, s, y)
            elif accepted:
                self.pairs[i] = [*self.pairs[i], (s, y)][-self.method["memory"] :]
                self.H_g[i] = oracles.lbfgs_inverse(self.pairs[i], len(s))


def gate(s: torch.Tensor, y: torch.Tensor, c: torch.Tensor) -> bool:
    return bool(s @ y > 0 and s @ y > 1e-4 * (s @ s) * c.norm())


def step(
    layers: list[BlockLayer],
    run: Callable[[], tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]],
    lr: float,
    momentum: float,
    stat_decay: float,
) -> float:
    """One step; ``run`` returns the loss, backward and all, and each layer's input and output."""
    for p in [p for one in layers for p in one.layer.parameters()]:
        p.grad = None
    loss, seen = run()
    first = [one.see(*xh) for one, xh in zip(layers, seen, strict=True)]
    for one, (X, _, _) in zip(layers, first, strict=True):
        one.M = momentum * one.M + (1 - momentum) * one.D()
        if not one.A:
            one.start(X)
        elif one.method["keep_A"]:
            for j, rows in enumerate(one.a):
                new = X[:, rows].T @ X[:, rows] / len(X)
                one.A[j] = stat_decay * one.A[j] + (1 - stat_decay) * new
        W = one.W() - lr * one.direction()
        with torch.no_grad():
            one.layer.weight.copy_(W[:, : one.layer.in_features])
            if one.layer.bias is not None:
                one.layer.bias.copy_(W[:, -1])
    _, seen = run()
    for one, xh, (X, h, g) in zip(layers, seen, first, strict=True):
        _, h_next, g_next = one.see(*xh)
        one.update_g(h_next - h, g, g_next)
        one.update_a(X)
    return loss.item()

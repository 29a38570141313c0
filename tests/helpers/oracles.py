"""Independent statements of the mathematics, in float64 and from textbooks, and matrices to try on.

These are not the ops' reference implementations: they form dense matrices and follow another route.
"""

from __future__ import annotations

import functools

import torch


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> torch.Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@functools.lru_cache(maxsize=64)
def _spd(n: int, condition: float, seed: int) -> torch.Tensor:
    exponents = torch.linspace(0, 1, n, dtype=torch.float64)
    matrix = torch.diag(condition**-exponents)
    for k in range(3):  # reflections: a dense basis for O(n^2), no factorisation
        u = randn(n, seed=seed + 1000 * k)
        u /= u.norm()
        Mu = matrix @ u
        matrix -= 2 * torch.outer(u, Mu) + 2 * torch.outer(Mu, u)
        matrix += 4 * (u @ Mu) * torch.outer(u, u)
    return (matrix + matrix.T) / 2


def spd(n: int, condition: float = 10.0, seed: int = 0) -> torch.Tensor:
    """A symmetric positive definite n x n matrix in float64, eigenvalues 1/condition to 1."""
    return _spd(n, condition, seed).clone()


def bfgs_inverse(H: torch.Tensor, s: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(I - rho s y') H (I - rho y s') + rho s s': the product form of the BFGS update."""
    rho = 1 / (s @ y)
    V = torch.eye(len(s), dtype=H.dtype) - rho * torch.outer(y, s)
    return V.T @ H @ V + rho * torch.outer(s, s)


def lbfgs_inverse(pairs: list[tuple[torch.Tensor, torch.Tensor]], n: int) -> torch.Tensor:
    """The dense inverse factor that the pairs (oldest first) make of the identity."""
    H = torch.eye(n, dtype=torch.float64)
    for s, y in pairs:
        H = bfgs_inverse(H, s.double(), y.double())
    return H


def with_ones(X: torch.Tensor) -> torch.Tensor:
    """[X, 1]"""
    return torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], dim=1)


def kron_direction(H_g: torch.Tensor, M: torch.Tensor, H_a: torch.Tensor) -> torch.Tensor:
    """(H_g x H_a) vec(M), with vec by rows and the Kronecker product written out."""
    return (torch.kron(H_g, H_a) @ M.reshape(-1)).reshape(M.shape)

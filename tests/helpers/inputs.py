"""What the builders of cases are made of: seeded numbers, layouts, rings."""

from __future__ import annotations

import torch

from tests.helpers import calls
from tests.helpers.oracles import randn, spd

NAN = float("nan")


def in_dtype(dtype: torch.dtype, values: list) -> list:
    """Lists of tensors, or what else is an argument, with float64 rounded."""

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.dtype == torch.float64 else tensor

    return [calls.changed(value, rounded) for value in values]


def scalars(value: float, count: int) -> list[torch.Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for _ in range(count)]


def some_counts(count: int) -> list[torch.Tensor]:
    return [torch.tensor([3, 1, 4, 1]) for _ in range(count)]


def nan_filled(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.full(shape, NAN, dtype=torch.float64) for shape in shapes]


def random_vectors(sizes: tuple[int, ...], seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    return [scale * randn(n, seed=seed + i) for i, n in enumerate(sizes)]


def random_spds(sizes: tuple[int, ...], seed: int, condition: float = 10.0) -> list[torch.Tensor]:
    return [spd(n, condition, seed + i) for i, n in enumerate(sizes)]


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with a gap after every column."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), NAN, dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def row_strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers as a slice of a wider matrix."""
    wide = torch.full((len(tensor), tensor.shape[1] + 5), NAN, dtype=tensor.dtype)
    wide[:, 2:-3] = tensor
    return wide[:, 2:-3]


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, columns contiguous."""
    return tensor.T.contiguous().T


def random_ring(p: int, n: int, pushed: int, condition: float, seed: int) -> tuple:
    """S, Y, rho, pushed after ``pushed`` pairs with s'y > 0 went through a ring of p rows."""
    S, Y = torch.full((2, p, n), NAN, dtype=torch.float64)  # a row without a pair is not read
    rho = torch.full((p,), NAN, dtype=torch.float64)
    B = spd(n, condition, seed) * condition  # eigenvalues 1 to condition
    for k in range(pushed):
        s = randn(n, seed=seed + 100 + k)
        s /= s.norm()
        y = B @ s
        S[k % p], Y[k % p], rho[k % p] = s, y, 1 / (s @ y)
    return S, Y, rho, torch.tensor(pushed)

"""What is timed: a kernel, the layers it is called on, and the numbers it is given.

The numbers are such that a call can be repeated on its own results for as long as timing takes:
pairs are accepted and undamped each time, and nothing grows or fades.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer's sizes."""

    d_in: int
    d_out: int
    bias: bool = True

    @property
    def n_a(self) -> int:
        """Size of the activation factor."""
        return self.d_in + self.bias

    @property
    def n_g(self) -> int:
        """Size of the gradient factor."""
        return self.d_out


Layers = Sequence[Layer]
Arguments = dict[str, Any]


class Numbers:
    """Seeded float32 numbers on a device."""

    seed = 0
    batch = 1000  # rows of the minibatch

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._generator = torch.Generator("cpu").manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, generator=self._generator, device="cpu").to(self.device)

    def vector(self, n: int) -> Tensor:
        """A vector of length near 1."""
        return self.normal(n) / math.sqrt(n)

    def spd(self, n: int) -> Tensor:
        """A dense symmetric positive definite matrix of condition near 3."""
        u = self.normal(n)
        return torch.outer(u, u) / n + 0.5 * torch.eye(n, device=self.device)

    def pair(self, H: Tensor) -> tuple[Tensor, Tensor]:
        """s, y that H takes as they are: neither damping changes them, and the gate opens."""
        y = self.vector(len(H))
        return 1.1 * (H @ y), y

    def unset(self, *shape: int) -> Tensor:
        """NaN, for what an op only writes: reading it would be seen."""
        return torch.full(shape, math.nan, device=self.device)

    def scalar(self, value: float) -> Tensor:
        """A float64 scalar on the device."""
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    def counts(self) -> Tensor:
        """A layer's counters."""
        return torch.zeros(4, dtype=torch.int64, device=self.device)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An op with the way it is called."""

    name: str
    op: str
    build: Callable[[Layers, Numbers], Arguments]  # by name, without `backend`
    blas: Callable[..., None] | None = None  # the same from torch's MKL or cuBLAS calls

"""Small models, data and closures for the optimizer's tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn


def mlp(*sizes: int, dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Sequential:
    """Linear layers of the given sizes with ReLU between them."""
    modules: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(sizes):
        modules += [nn.Linear(d_in, d_out, bias=bias, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def rows(m: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """m x d normal numbers."""
    return torch.randn(m, d, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def closure_of(
    model: nn.Module, opt: torch.optim.Optimizer, x: torch.Tensor, target: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Half squared error, summed over features, mean over the batch."""

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = (model(x) - target).square().sum() / (2 * x.shape[0])
        loss.backward()
        return loss

    return closure


def snapshot(model: nn.Module, opt) -> dict[str, torch.Tensor]:
    """Copies of every parameter and of every kept tensor, by name."""
    tensors = {f"param {name}": p for name, p in model.named_parameters()}
    for layer in opt._layers():
        tensors |= {f"{layer.name} {name}": t for name, t in layer.kept.items()}
    return {name: t.detach().clone() for name, t in tensors.items()}


def assert_same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], but=()) -> None:
    """Every tensor is bit for bit the same, but for names ending in one of ``but``."""
    for name, tensor in before.items():
        if not name.endswith(tuple(but) or ("\0",)):
            assert torch.equal(tensor, after[name]), name

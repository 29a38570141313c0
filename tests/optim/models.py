"""Small models, data and closures for the optimizer's tests."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kbfgs_ext import KBFGS, KBFGSL, DirectionRule, FactorRule, presets

# The paper's direction, length and dampings, with the safeguard and the rest of the defaults.
PAPER = {name: presets.PUBLISHED[name] for name in ("lr", "damping", "direction", "pair_every")}
PAPER["factors"] = FactorRule(relative_damping=False)
BALANCED = DirectionRule("newton", step_length="balanced")
newton, newton_l = (functools.partial(method, **PAPER) for method in (KBFGS, KBFGSL))
DEFAULTS = pytest.mark.parametrize("method", [KBFGS, KBFGSL], ids=["kbfgs", "kbfgsl"])
METHODS = pytest.mark.parametrize("method", [newton, newton_l], ids=["kbfgs", "kbfgsl"])


def absolute(**fields: Any) -> FactorRule:
    """The factors of `PAPER`, but for ``fields``."""
    return dataclasses.replace(PAPER["factors"], **fields)


def mlp(*sizes: int, dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Sequential:
    """Linear layers of the given sizes with ReLU between them."""
    modules: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(sizes):
        modules += [nn.Linear(d_in, d_out, bias=bias, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def rows(m: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """m x d normal numbers, the same on every device."""
    numbers = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(m, d, dtype=dtype, generator=numbers, device="cpu")
    return drawn.to(torch.get_default_device())


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
    for layer in opt.layers:
        tensors |= {f"{layer.name} {name}": t for name, t in layer.kept.items()}
    return {name: t.detach().clone() for name, t in tensors.items()}


def assert_same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], but=()) -> None:
    """Every tensor is bit for bit the same, but for names ending in one of ``but``."""
    for name, tensor in before.items():
        if not name.endswith(tuple(but) or ("\0",)):
            assert torch.equal(tensor, after[name]), name


def problem(method=newton, **options):
    """A small model, its optimizer and a closure."""
    torch.manual_seed(0)
    model = mlp(5, 7, 3)
    opt = method(model, **options)
    return model, opt, closure_of(model, opt, rows(12, 5), rows(12, 3, seed=1))


def four_calls(opt, passes):
    """A step of a loop that owns forward and backward; ``passes`` does both."""
    with opt.first_pass():
        loss = passes()
    opt.descend(loss)
    if opt.second_pass_due:
        with opt.second_pass():
            loss_next = passes()
        opt.finish(loss_next)
    return loss


def assert_resumes(build: Callable[[], tuple[nn.Module, Any, Any]]) -> tuple[Any, Any]:
    """Three steps, a checkpoint into another of what ``build`` makes, and three more of both end
    alike, bit for bit; returns the optimizer and its closure."""
    model, opt, closure = build()
    for _ in range(3):
        opt.step(closure)
    other, resumed, again = build()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(3):
        opt.step(closure)
        resumed.step(again)
    assert_same(snapshot(model, opt), snapshot(other, resumed))
    return opt, closure


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    """Every parameter is bit for bit the same."""
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)

"""What is compared on the tasks, each over as many learning rates, but for K-BFGS: its
constructor's defaults are the one setting for all tasks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kbfgs_ext import KBFGS, presets

Point = dict[str, Any]  # what the optimizer is told

GRIDS: dict[str, tuple[Point, ...]] = {
    "kbfgs": ({},),
    "muon": tuple({"lr": lr} for lr in (0.01, 0.02, 0.05, 0.1, 0.2)),
    "adamw": tuple({"lr": lr} for lr in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "sgdm": tuple({"lr": lr} for lr in (1e-3, 1e-2, 0.1, 0.3, 1.0)),
    "tuned": tuple({"lr": lr} for lr in (0.03, 0.1, 0.3, 1.0, 3.0)),
}
LABELS = {
    "kbfgs": "K-BFGS, defaults",
    "muon": "Muon",
    "adamw": "AdamW",
    "sgdm": "SGD, momentum 0.9",
    "tuned": "K-BFGS, `presets.TUNED`",
}
REST = 3e-3  # AdamW's learning rate for what Muon does not take


def build(name: str, model: nn.Module, point: Point) -> torch.optim.Optimizer | Muon:
    """The optimizer ``name`` over all parameters of ``model``; stepped by ``step(closure)``."""
    if name in ("kbfgs", "tuned"):
        with warnings.catch_warnings():  # what the fallback takes is no news here
            warnings.simplefilter("ignore")
            return KBFGS(model, **(presets.TUNED if name == "tuned" else {}) | point)
    if name == "muon":
        return Muon(model, **point)
    if name == "sgdm":
        return torch.optim.SGD(model.parameters(), momentum=0.9, **point)
    return torch.optim.AdamW(model.parameters(), weight_decay=0.0, **point)


class Muon:
    """torch's Muon for the weights of linear layers and convolutions, these as matrices with an
    output a row, and AdamW for everything else."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        self.weights = [m.weight for m in model.modules() if isinstance(m, kinds)]
        taken = {id(p) for p in self.weights}
        rest = [p for p in model.parameters() if id(p) not in taken]
        self.matrices = [nn.Parameter(p.detach().flatten(1)) for p in self.weights]
        self.muon = torch.optim.Muon(
            self.matrices, lr=lr, momentum=0.95, weight_decay=0.0, adjust_lr_fn="original"
        )
        self.rest = torch.optim.AdamW(rest, lr=REST, weight_decay=0.0)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of both."""
        return self.muon.param_groups + self.rest.param_groups

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self.weights:
            p.grad = None
        self.rest.zero_grad()

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step of both."""
        loss = closure()
        for p, matrix in zip(self.weights, self.matrices, strict=True):
            matrix.grad = None if p.grad is None else p.grad.flatten(1)
        self.muon.step()
        self.rest.step()
        return loss

"""What is compared on the tasks, each over as many learning rates, but for K-BFGS: its
constructor's defaults are the one setting for all tasks."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from benchmarks.optimizers import MuonWithAdamW
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


def build(name: str, model: nn.Module, point: Point) -> torch.optim.Optimizer | MuonWithAdamW:
    """The optimizer ``name`` over all parameters of ``model``; stepped by ``step(closure)``."""
    if name in ("kbfgs", "tuned"):
        with warnings.catch_warnings():  # what the fallback takes is no news here
            warnings.simplefilter("ignore")
            return KBFGS(model, **(presets.TUNED if name == "tuned" else {}) | point)
    if name == "muon":
        return MuonWithAdamW(model, **point, rest_lr=REST)
    if name == "sgdm":
        return torch.optim.SGD(model.parameters(), momentum=0.9, **point)
    return torch.optim.AdamW(model.parameters(), weight_decay=0.0, **point)

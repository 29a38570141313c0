"""What is compared on the tasks, each over as many learning rates, K-FAC with two dampings, but for
K-BFGS: its constructor's defaults are the one setting for all tasks, and beside them another lr."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from benchmarks.baselines.kfac import KFAC
from benchmarks.optimizers import MuonWithAdamW, soap
from benchmarks.optimizers import missing as absent
from benchmarks.tasks.problems import Task
from kbfgs_ext import KBFGS, presets

Point = dict[str, Any]  # what the optimizer is told

GRIDS: dict[str, tuple[Point, ...]] = {
    "kbfgs": ({},),
    "shorter": ({"lr": 0.03},),
    "muon": tuple({"lr": lr} for lr in (0.01, 0.02, 0.05, 0.1, 0.2)),
    "adamw": tuple({"lr": lr} for lr in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "sgdm": tuple({"lr": lr} for lr in (1e-3, 1e-2, 0.1, 0.3, 1.0)),
    "soap": tuple({"lr": lr} for lr in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "kfac": tuple(
        {"lr": lr, "damping": damping}
        for damping in (3.0, 0.1)
        for lr in (0.03, 0.1, 0.3, 1.0, 3.0)
    ),
    "tuned": tuple({"lr": lr} for lr in (0.03, 0.1, 0.3, 1.0, 3.0)),
}
LABELS = {
    "kbfgs": "K-BFGS, defaults",
    "shorter": "K-BFGS, shorter steps",
    "muon": "Muon",
    "adamw": "AdamW",
    "sgdm": "SGD, momentum 0.9",
    "soap": "SOAP",
    "kfac": "K-FAC",
    "tuned": "K-BFGS, `presets.TUNED`",
}
OURS = ("kbfgs", "shorter", "tuned")
REST = 3e-3  # AdamW's learning rate for what Muon does not take


def build(name: str, task: Task, point: Point) -> torch.optim.Optimizer | MuonWithAdamW:
    """The optimizer ``name`` over all parameters of the task's network, for ``step(closure)``."""
    model = task.model
    if name in OURS:
        with warnings.catch_warnings():  # what the fallback takes is no news here
            warnings.simplefilter("ignore")
            return KBFGS(model, **(presets.TUNED if name == "tuned" else {}) | point)
    if name == "muon":
        return MuonWithAdamW(model, **point, rest_lr=REST)
    if name == "sgdm":
        return torch.optim.SGD(model.parameters(), momentum=0.9, **point)
    if name == "soap":
        return soap(model, **point, weight_decay=0.0)
    if name == "kfac":
        assert task.distribution is not None
        return KFAC(model, task.distribution, **point)
    return torch.optim.AdamW(model.parameters(), weight_decay=0.0, **point)


def missing(name: str, task: type[Task]) -> str | None:
    """Why ``name`` cannot take the task, or None."""
    if name == "kfac" and task.distribution is None:
        return "K-FAC is written for linear layers and losses that are a distribution's"
    if name == "soap" and task.double:
        return "heavyball's SOAP takes no float64"
    return absent(name)

"""A run of captured steps that can be saved and resumed, on any device."""

from __future__ import annotations

import io

import torch
from torch import nn
from torch.nn import functional as F

from kbfgs_ext import CapturedStep
from tests.optim.models import rows, snapshot

PARTS = ("model", "opt", "schedule")


class CapturedRun:
    """A model, its optimizer with or without a fallback, a schedule of all groups, the step."""

    def __init__(self, method, fallback, device="cpu", dtype=torch.float64, **options) -> None:
        torch.manual_seed(0)
        norm = [nn.BatchNorm1d(7)] if fallback else []
        model = nn.Sequential(nn.Linear(5, 7), *norm, nn.Tanh(), nn.Linear(7, 3))
        self.model = model.to(device, dtype)

        def capturable(parameters):
            lr = torch.tensor(1e-2, device=device)
            return torch.optim.AdamW(parameters, lr=lr, capturable=True)

        self.opt = method(self.model, fallback=capturable, **options)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.opt, 0.8)
        self.step = CapturedStep(self.opt, lambda x, target: F.mse_loss(self.model(x), target))
        self.like = torch.empty(0, dtype=dtype, device=device)

    def __call__(self, steps: range) -> list[float]:
        """Steps on batches that depend on the step's number alone; their losses."""
        losses = []
        for k in steps:
            x, target = rows(16, 5, seed=k).to(self.like), rows(16, 3, seed=100 + k).to(self.like)
            losses.append(self.step(x, target).item())
            self.schedule.step()
        return losses

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save({name: getattr(self, name).state_dict() for name in PARTS}, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO, **how) -> None:
        saved = torch.load(file, **how)
        for name in PARTS:
            getattr(self, name).load_state_dict(saved[name])

    def everything(self) -> dict[str, torch.Tensor]:
        fallback = self.opt.steps.fallback
        state = fallback.optimizer.state_dict()["state"] if fallback else {}
        return {
            **snapshot(self.model, self.opt),
            **{name: b.clone() for name, b in self.model.named_buffers()},
            **self.opt.counters(),
            **{f"{i} {k}": v.clone() for i, s in state.items() for k, v in s.items()},
            "lr": torch.tensor([float(g["lr"]) for g in self.opt.param_groups]),
        }

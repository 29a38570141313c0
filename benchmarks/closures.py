"""Steps by a closure, under a gradient scaler where the losses are scaled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kbfgs_ext import KBFGS
from kbfgs_ext.bench.precision import Precision

LossOf = Callable[[Tensor], Tensor]  # the loss of a batch
Closure = Callable[[], Tensor]


def stepper(
    how: Precision,
    opt: Any,
    loss_of: LossOf,
    device: torch.device,
    watched: Callable[[Closure], Closure] = lambda closure: closure,
) -> Callable[[Tensor], Tensor]:
    """A step of ``opt`` on a batch, by a closure that ``watched`` may wrap; gives the loss."""
    scaler = torch.amp.GradScaler(device.type, enabled=how.scaled)

    def step(x: Tensor) -> Tensor:
        def closure() -> Tensor:
            opt.zero_grad()
            loss = loss_of(x)
            scaler.scale(loss).backward()
            return loss

        if not how.scaled:
            return opt.step(watched(closure))
        if isinstance(opt, KBFGS):
            loss = opt.step(watched(closure), scaler=scaler)
        else:
            loss = watched(closure)()
            scaler.step(opt)
        scaler.update()
        return loss

    return step

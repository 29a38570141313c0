"""The safeguard: a step that has made its own minibatch worse is undone, and the next is shorter.

The second pass yields the loss at the new point on the same minibatch, with the same random
numbers, for nothing. `Safeguard.judge` compares it with the first pass's loss, on the device:

    undo     = not loss_next <= loss          (so a NaN is undone too)
    scale   <- shrink*scale                   where undone, at least `smallest`
               min(1, grow*scale)             where kept

and the step of the next iteration is lr*scale*P. The pair of an undone step is kept: it is
curvature like any other. The evidence: docs/safeguard.md.
"""

from __future__ import annotations

import dataclasses
import math

import torch


@dataclasses.dataclass(frozen=True)
class SafeguardRule:
    """The numbers of the rule: 0 < shrink < 1 <= grow, 0 < smallest <= 1.

    The evidence for the defaults is in docs/safeguard.md.
    """

    shrink: float = 0.5
    grow: float = 1.1  # seven kept steps make up for one undone
    smallest: float = 2.0**-20  # keeps a run of bad batches from freezing training for good

    def __post_init__(self) -> None:
        for name, inside in (
            ("shrink", 0 < self.shrink < 1),
            ("grow", 1 <= self.grow < math.inf),
            ("smallest", 0 < self.smallest <= 1),
        ):
            if not inside:
                raise ValueError(f"{name} is out of its range: {getattr(self, name)}")


class Safeguard:
    """The scale of the step, and the counters of steps, void steps and undone steps."""

    def __init__(self, rule: SafeguardRule, device: torch.device) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.rule = rule
        self.scale = torch.ones((), dtype=wide, device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.undone = torch.zeros((), dtype=torch.int64, device=device)

    def count(self, ok: torch.Tensor) -> None:
        """Count a step, and whether it is void."""
        self.steps.add_(1)
        self.skipped.add_(~ok)

    def judge(self, loss: torch.Tensor, loss_next: torch.Tensor, ok: torch.Tensor) -> torch.Tensor:
        """Whether to undo the step (bool scalar on the device); adapts the scale."""
        undo = ~(loss_next <= loss)
        scale = torch.where(
            undo,
            (self.scale * self.rule.shrink).clamp_(min=self.rule.smallest),
            (self.scale * self.rule.grow).clamp_(max=1.0),
        )
        self.scale.copy_(torch.where(ok, scale, self.scale))
        undo = undo & ok
        self.undone.add_(undo)
        return undo

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds."""
        names = ("steps", "skipped", "undone", "scale")
        return {name: getattr(self, name) for name in names}

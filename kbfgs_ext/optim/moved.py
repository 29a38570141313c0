"""What the step under way has moved so far, and how an error takes it back.

========================= ============================================================
parameters                to the bit: the safeguard's copies are there anyway
the fallback's state      to the bit, with what the step itself has made of it
momentum                  to rounding, by its equation (2) the other way round; it stays where the
                          caller has dropped, zeroed or changed a gradient since
counters, step number     by subtraction
factors that just started back to before the start, unless a warm start has made them
other factors             stay, with pairs and counts: nobody keeps a copy of a factor.
                          What they have learned of the minibatch is true all the same
========================= ============================================================

A normal step pays nothing for it: it copies nothing, allocates nothing and reads nothing back.
"""

from __future__ import annotations

import torch
from torch.utils.weak import TensorWeakRef

from kbfgs_ext.optim import direction, gradients
from kbfgs_ext.optim.covered import CoveredLayer
from kbfgs_ext.optim.fallback import Fallback
from kbfgs_ext.optim.parts import MOVED, STILL, Part
from kbfgs_ext.optim.safeguard import Safeguard
from kbfgs_ext.optim.shards import version


class Moved:
    """What one step has moved so far.

    Args:
        number: of steps before it.
    """

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.ok: torch.Tensor | None = None  # once the step is counted; false on the device: void
        self.fallback: Fallback | None = None  # if it has stepped
        self.fresh: list[CoveredLayer] = []  # whose factors start in this step
        self.parts: list[Part] = []
        # What the step was made of: gradients and their versions, by the parameter.
        self._gradients: dict[int, tuple[TensorWeakRef, int]] = {}

    def begin(self, part: Part) -> None:
        """``part`` goes next."""
        part.look()
        for p in [p for layer in part.layers for p in layer.moving]:
            if (g := p.grad) is not None:
                self._gradients[id(p)] = TensorWeakRef(g), version(g)
        for one in (part, part.mine):
            if one is not None:
                one.stage = STILL
        self.parts.append(part)

    def undo(self, where: torch.Tensor) -> None:
        """Put every parameter back where ``where``: the step is not kept."""
        for part in self.parts:
            direction.undo(part, where)
        if self.fallback is not None:
            self.fallback.undo(where)

    def take_back(self, guard: Safeguard) -> None:
        """Undo all that was done: the step has failed."""
        if self.fallback is not None:
            self.fallback.take_back()
        if self.ok is None:
            return
        guard.withdraw(self.ok)
        sound = gradients.known_true(self.ok)
        for part in self.parts:
            if part.stage == MOVED:
                direction.undo(part, torch.ones_like(self.ok))
            mine = part.mine
            if mine is None or mine.stage == STILL or not sound:
                continue
            if all(map(self._as_given, mine.layers)):
                turn_back(mine)
        for layer in self.fresh:
            if not layer.warm_batches:
                for factor in (*layer.activations, *layer.gradients):
                    factor.reset()
                layer.started = False

    def _as_given(self, layer: CoveredLayer) -> bool:
        """Whether the gradients that the step was made of are there still; of a sharded layer the
        owner has its own."""
        for p in () if layer.shard else layer.moving:
            gradient, known = self._gradients[id(p)]
            if p.grad is None or gradient() is not p.grad or known != version(p.grad):
                return False
        return True


def turn_back(part: Part) -> None:
    """(2) solved for the M of before, in place: M <- (M - (1-momentum)*D)/momentum, with [W, b] and
    the gradients as the step had them. Without momentum the M of before has no say any more."""
    momentum = part.group["momentum"]
    if not momentum:
        return
    *given, decay = part.given()
    share = momentum - 1
    for M, dW, db, W, b in zip(part["M"], *given, strict=True):
        d_in = W.shape[1]
        halves = [(M[:, :d_in], W, dW)] + ([(M[:, d_in], b, db)] if b.numel() else [])
        for place, p, gradient in halves:
            place.add_(gradient, alpha=share)
            if decay:
                place.add_(p, alpha=share * decay)
        M.div_(momentum)

"""The safeguard: a step that has made its own minibatch worse is undone, and the next is shorter.

The second pass yields the loss at the new point on the same minibatch, with the same random
numbers, for nothing. `Safeguard.judge` compares it with the first pass's loss, on the device:

    undo     = loss_next is not finite, or loss_next - loss > rise*|loss|
    enough   = loss - loss_next >= -sufficient*slope      (Armijo's condition)
    scale   <- shrink*scale            where undone, at least `smallest`
               min(1, grow*scale)      where kept, and the decrease was enough
               scale/grow              where kept, and it was not

and the step of the next iteration is lr*scale*P: `judge_`, (14) of ops/README.md. slope is the
derivative of the loss along the step, (13). A parabola through both losses with that slope has its
minimum beyond the step where the decrease is more than half of what the slope promises, and short
of it where it is less: with `sufficient` = 1/2 the length of the step follows that minimum.
Differences within the rounding of the losses (`resolution`) say nothing, and count for the step.
The pair of an undone step is kept: it is curvature like any other. The evidence: docs/safeguard.md.

A polar direction has a length that no gradient decides: near a minimum its steps go to and fro,
and come to rest with lr. No decrease is asked of them, and by default (`FINITE`) only the step that
ends in a loss that is not finite is undone.

Where steps are undone even at the smallest scale, the direction is no descent, and shortening it
is no help. After `restart_after` of them in a row every factor is ordered to restart (factors.py).
Factors may also lead down on every minibatch by itself and up on the next: the loss of the first
pass is that of a fresh minibatch, and where its running mean has risen to `surge` times the lowest
it has been, every factor is ordered to restart as well.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from kbfgs_ext import ops
from kbfgs_ext.ops.safeguard.api import WORDS

ROUNDINGS = 8  # of a sum over a minibatch: two passes differ by some of them


def resolution(dtype: torch.dtype) -> float:
    """The relative difference below which two losses of ``dtype`` say nothing.

    Sums are formed in 32 bits at least, and a 16-bit loss is rounded once more.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return max(torch.finfo(dtype).eps, ROUNDINGS * torch.finfo(wide).eps)


@dataclasses.dataclass(frozen=True)
class SafeguardRule:
    """The numbers of the rule: 0 < shrink < 1 <= grow, 0 <= sufficient < 1, 0 < smallest <= 1,
    1 < surge, 1 <= window, 0 <= rise.

    The evidence for the defaults is in docs/safeguard.md.
    """

    shrink: float = 0.5
    grow: float = 1.1  # seven kept steps make up for one undone
    sufficient: float = 0.5  # share of the promised decrease that is enough; 0: any is
    smallest: float = 2.0**-20  # keeps a run of bad batches from freezing training for good
    surge: float = 2.0  # inf: no loss is too high
    window: int = 50  # steps that the running mean of the loss looks back on
    rise: float = 0.0  # of the loss, as a share of it, that a kept step may bring; inf: any

    def __post_init__(self) -> None:
        for name, inside in (
            ("shrink", 0 < self.shrink < 1),
            ("grow", 1 <= self.grow < math.inf),
            ("sufficient", 0 <= self.sufficient < 1),
            ("smallest", 0 < self.smallest <= 1),
            ("surge", self.surge > 1),
            ("rise", self.rise >= 0),
            ("window", self.window >= 1 and float(self.window).is_integer()),
        ):
            if not inside:
                raise ValueError(f"{name} is out of its range: {getattr(self, name)}")


FINITE = SafeguardRule(rise=math.inf, sufficient=0.0, surge=math.inf)


class Safeguard:
    """The scale of the step, the counters of steps, and what it orders to restart.

    Args:
        rule: the numbers of the rule; None judges nothing.
        device: where everything is kept.
        restart_after: undone steps in a row at the smallest scale; None orders nothing, nor does
            a surge then.
        backend: of `judge_`.
    """

    def __init__(
        self,
        rule: SafeguardRule | None,
        device: torch.device,
        restart_after: int | None = None,
        backend: str = "auto",
    ) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.rule = rule
        self.restart_after = restart_after
        self.backend = backend
        self.scale = torch.ones((), dtype=wide, device=device)
        self._counts = torch.zeros(4, dtype=torch.int64, device=device)
        self._watched = torch.tensor([0.0, 0.0, 0.0, math.inf], dtype=wide, device=device)
        # The gradient side restarts in the step that orders it, the activation side where it is
        # updated next: without A it needs the activations, and those are gone by then.
        self._decision = torch.zeros(WORDS, dtype=torch.bool, device=device)
        self._sound = torch.ones((), dtype=torch.bool, device=device)

    @property
    def order_g(self) -> torch.Tensor:
        """Whether the gradient sides restart in this step."""
        return self._decision[1]

    @property
    def order_a(self) -> torch.Tensor:
        """Whether the activation sides restart in this step."""
        return self._decision[4]

    @property
    def sound_pair(self) -> torch.Tensor:
        """Whether the step, and the loss after it, are finite: once it is judged."""
        return self._decision[3]

    def admit(self, loss: torch.Tensor, norms: torch.Tensor, take: bool) -> torch.Tensor:
        """Whether the step is sound, a bool scalar on the device; counts it. ``take``: the
        activation sides are updated before the judgement, and restart now if they are to."""
        counts, decision = [self._counts], [self._decision]
        ops.admit_([self._sound], counts, decision, [loss], [norms], take, self.backend)
        return self._sound

    def withdraw(self, ok: torch.Tensor) -> None:
        """A step that was admitted has failed: it does not count, and the order that the
        activation sides have taken in it stays."""
        steps, skipped, _, _ = self._counts.unbind()
        steps.sub_(1)
        skipped.sub_((~ok).to(skipped.dtype))
        self._decision[2].logical_or_(self._decision[4])

    @property
    def wants_slope(self) -> bool:
        """Whether the judgement needs the slope."""
        return self.rule is not None and self.rule.sufficient > 0

    def judge(
        self,
        loss: torch.Tensor,
        loss_next: torch.Tensor,
        slope: torch.Tensor | None,
        noise: float,
        ok: torch.Tensor,
        take: bool = False,
    ) -> torch.Tensor:
        """Whether to undo the step (bool scalar on the device); adapts the scale.

        ``slope`` is None where it is not wanted; ``noise`` is the `resolution` of the losses;
        ``take``: the activation sides are updated after this, and restart if they are to.
        """
        rule = self.rule
        assert rule is not None
        ops.judge_(
            [self.scale],
            [self._watched],
            [self._counts],
            [self._decision],
            [loss],
            [loss_next],
            [] if slope is None else [slope],
            noise + rule.rise,
            rule.shrink,
            rule.grow,
            rule.sufficient,
            rule.smallest,
            rule.surge,
            int(rule.window),
            self.restart_after,
            take,
            ok,
            self.backend,
        )
        return self._decision[0]

    def reset(self) -> None:
        """Forget what earlier steps have taught; what is counted stays."""
        self.scale.fill_(1.0)
        self._watched.zero_()
        self._watched[3].fill_(math.inf)
        self._decision.zero_()

    def counters(self) -> dict[str, torch.Tensor]:
        """What people look at."""
        names = ("steps", "skipped", "undone", "restarts")
        return {**dict(zip(names, self._counts.unbind(), strict=True)), "scale": self.scale}

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds."""
        return {**self.counters(), "watched": self._watched, "order_a": self._decision[2]}

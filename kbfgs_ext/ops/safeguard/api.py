"""safeguard: the judgement of a step by the loss that its second pass has found."""

from __future__ import annotations

import torch

from kbfgs_ext.ops import checks
from kbfgs_ext.ops.checks import Tensors
from kbfgs_ext.ops.library import op


@op("safeguard", writes=("scale", "watched", "counts", "decision"))
def judge_(
    scale: Tensors,
    watched: Tensors,
    counts: Tensors,
    decision: Tensors,
    loss: Tensors,
    loss_next: Tensors,
    slope: Tensors,
    noise: float,
    shrink: float,
    grow: float,
    sufficient: float,
    smallest: float,
    surge: float,
    window: int,
    restart_after: int | None = None,
    ok: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Decide on the device whether a step is undone, how long the next is, and on restarts.

    (14)  undo   = not loss - loss_next + noise*|loss| >= 0, so that a NaN is undone too
          scale <- shrink*scale          where undone, at least `smallest`
                   min(1, grow*scale)    where the decrease is at least -sufficient*slope
                   scale/grow            otherwise

    With ``restart_after`` every factor is ordered to restart where that many steps in a row were
    undone at the smallest scale, or where the running mean of `loss` over `window` steps is above
    `surge` times the lowest (and positive) value that it has had; counting then begins anew.

    Args:
        scale: scalar each, in (0, 1]; of the next step.
        watched: (4,) each: steps undone in a row at the smallest scale, losses in the running mean,
            the mean, and its lowest value. Begins as 0, 0, 0, inf.
        counts: (4,) int64 each; the last two count steps undone and restarts ordered, the first
            two are left alone.
        decision: (3,) bool each: undo, restart the gradient side, restart the activation side. The
            first two are written, also where ``ok`` is false (they are false then); the last is
            set where the second is, and left to the caller to clear.
        loss, loss_next: scalar each, of one minibatch before and after the step.
        slope: scalar each, the sum of (13): what the gradient promises; an empty list takes any
            decrease for enough.
        noise: relative difference below which two losses say nothing.
        shrink, grow, sufficient, smallest, surge, window: the numbers of `SafeguardRule`.
        restart_after: None orders no restart, and leaves ``watched`` alone.
        ok: bool scalar on the device; where false, all but ``decision`` is left as it was.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a shape, dtype or device does not fit, or ``restart_after`` or ``window`` is
            below 1.

    Source: the sufficient decrease of Armijo (1966); docs/safeguard.md for the rest.
    """
    checks.backend(backend)
    lists = {"watched": watched, "counts": counts, "decision": decision, "loss": loss}
    lists |= {"loss_next": loss_next, **({"slope": slope} if slope else {})}
    checks.same_length(scale=scale, **lists)
    for i, own in enumerate(scale):
        checks.real("scale", i, own)
        for name, wanted in (("counts", torch.int64), ("decision", torch.bool)):
            if lists[name][i].dtype != wanted:
                raise ValueError(f"{name}[{i}] must be {wanted}, got {lists[name][i].dtype}")
        checks.shape("scale", i, own)
        checks.shape("watched", i, watched[i], 4)
        checks.shape("counts", i, counts[i], 4)
        checks.shape("decision", i, decision[i], 3)
        for name in ("loss", "loss_next", *(["slope"] if slope else [])):
            checks.shape(name, i, lists[name][i])
            checks.like(name, i, lists[name][i], own)
        checks.like("watched", i, watched[i], own)
    for name, value in (("window", window), ("restart_after", restart_after)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")

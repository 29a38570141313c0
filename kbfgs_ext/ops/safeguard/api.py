"""safeguard: what a step begins with, and its judgement by the loss of its second pass."""

from __future__ import annotations

import torch

from kbfgs_ext.ops import checks
from kbfgs_ext.ops.checks import Tensors
from kbfgs_ext.ops.library import op

WORDS = 5  # of `decision`


@op("safeguard", writes=("sound", "counts", "decision"))
def admit_(
    sound: Tensors,
    counts: Tensors,
    decision: Tensors,
    loss: Tensors,
    norms: Tensors,
    take: bool = False,
    backend: str = "auto",
) -> None:
    """Decide on the device whether a step is sound, and count it.

    (20)  sound = the loss and all norms are finite

    Args:
        sound: bool scalar each, written.
        counts: (4,) int64 each; the first two count steps, and those that are not sound.
        decision: (5,) bool each, as in `judge_`; the last is written: whether the activation sides
            restart in this step. An order that waits is taken where ``take`` and sound.
        loss: scalar each.
        norms: (k,) each: of the gradients.
        take: the activation sides are updated before the judgement.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    checks.backend(backend)
    lists = {"sound": sound, "counts": counts, "decision": decision, "loss": loss}
    checks.same_length(norms=norms, **lists)
    for i, own in enumerate(norms):
        checks.real("norms", i, own)
        checks.shape("sound", i, sound[i])
        checks.shape("loss", i, loss[i])
        checks.like("loss", i, loss[i], own)
        if own.dim() != 1:
            raise ValueError(f"norms[{i}] must be a vector, got shape {tuple(own.shape)}")
        if sound[i].dtype != torch.bool:
            raise ValueError(f"sound[{i}] must be torch.bool, got {sound[i].dtype}")
        _check_standing(i, counts[i], decision[i])


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
    take: bool = False,
    ok: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Decide on the device whether a step is undone, how long the next is, and on restarts.

    (14)  undo   = loss_next is not finite, or loss_next - loss > noise*|loss|
          scale <- shrink*scale          where undone, at least `smallest`
                   min(1, grow*scale)    where loss - loss_next + noise*|loss| >= -sufficient*slope
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
        decision: (5,) bool each: undo; restart the gradient sides; an order for the activation
            sides waits; the pair is sound (``ok``, and a finite loss_next); restart the activation
            sides. All are false where ``ok`` is, but for the order that waits: it is given with
            the gradient sides' and stays until it is taken, here or by `admit_`.
        loss, loss_next: scalar each, of one minibatch before and after the step.
        slope: scalar each, the sum of (13): what the gradient promises; an empty list takes any
            decrease for enough.
        noise: relative difference below which two losses say nothing; inf: any rise is kept, from
            a loss of 0 too.
        shrink, grow, sufficient, smallest, surge, window: the numbers of `SafeguardRule`.
        restart_after: None orders no restart, and leaves ``watched`` alone.
        take: the activation sides are updated after the judgement: an order is taken here. Else
            the last word of ``decision`` is left alone.
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
        _check_standing(i, counts[i], decision[i])
        checks.shape("scale", i, own)
        checks.shape("watched", i, watched[i], 4)
        for name in ("loss", "loss_next", *(["slope"] if slope else [])):
            checks.shape(name, i, lists[name][i])
            checks.like(name, i, lists[name][i], own)
        checks.like("watched", i, watched[i], own)
    for name, value in (("window", window), ("restart_after", restart_after)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_standing(i: int, counts: torch.Tensor, decision: torch.Tensor) -> None:
    for name, given, wanted in (
        ("counts", counts, torch.int64),
        ("decision", decision, torch.bool),
    ):
        if given.dtype != wanted:
            raise ValueError(f"{name}[{i}] must be {wanted}, got {given.dtype}")
    checks.shape("counts", i, counts, 4)
    checks.shape("decision", i, decision, WORDS)

"""The updates of matrix factors, of both sides in one call, and their restart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kbfgs_ext import ops

if TYPE_CHECKING:
    from kbfgs_ext.optim.parts import Blocks, Part

Tensors = list[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the device has decided of a step: bool scalars there."""

    ok: torch.Tensor  # false: the step is void
    ok_pair: torch.Tensor  # false: no pair comes of it
    order_a: torch.Tensor | None = None  # all activation sides restart
    order_g: torch.Tensor | None = None  # all gradient sides do


def update_activations(part: Part, X: Tensors, verdict: Verdict) -> None:
    """Step 9, with A's action from ``X``, or from A where that is empty."""
    curvature_update(part, True, False, X, verdict)
    restart(part, {"a": verdict.order_a}, X)


def update_matrices(part: Part, verdict: Verdict, with_activations: bool) -> None:
    """Steps 6 to 8, and step 9 by A in the same call if ``with_activations``.

    The op takes one block of either side at a time: where a layer has several, it goes twice.
    """
    if with_activations and not part.whole:
        curvature_update(part, True, False, [], verdict)
    curvature_update(part, with_activations and part.whole, True, [], verdict)
    orders = {"a": verdict.order_a} if with_activations else {}
    restart(part, orders | {"g": verdict.order_g})


def curvature_update(
    part: Part, activations: bool, gradients: bool, X: Tensors, verdict: Verdict
) -> None:
    """`ops.curvature_update_` on the blocks of both sides, or of one."""

    def a(name: str) -> Tensors:
        return part.a[name] if activations else []

    def g(name: str) -> Tensors:
        return part.g[name] if gradients else []

    ops.curvature_update_(
        H_a=a("H_a"),
        H_g=g("H_g"),
        s=g("s"),
        y=g("y"),
        counts_a=a("counts_a"),
        counts_g=g("counts_g"),
        work=(part.g if gradients else part.a)["work"],
        A=[] if X else a("A"),
        X=X,
        a_bar=a("a_bar"),
        h_change=g("h_change"),
        g_bar=g("g_bar"),
        g_bar_next=g("g_bar_next"),
        lam_a=part.lam_a() if activations else [],
        lam_g=part.lam_g() if gradients else [],
        pair_decay=part.group["pair_decay"],
        mu1=part.group["powell"],
        ok=verdict.ok,
        ok_pair=verdict.ok_pair,
        backend=part.backend,
    )


def restart(
    part: Part, orders: dict[str, torch.Tensor | None], X: Sequence[torch.Tensor] = ()
) -> None:
    """Put the factors of the sides in ``orders`` back to a safe start, on the device, after
    ``restart_after`` rejected pairs in a row, or where ordered.

    The gate (8) refuses a pair that would spoil H. If it refuses pair after pair, H itself no
    longer fits the loss. And if step after step is undone however short it is, the direction is no
    descent: some factor has gone wrong that the gate does not see, and the safeguard orders all to
    restart.
    """
    after = part.settings.restart_after
    if after is None or not orders:
        return
    sides: dict[str, Blocks] = {"a": part.a, "g": part.g}
    matrices = "a" in orders or part.g.has("H_g")

    def both(name: str) -> Tensors:
        return [t for side in orders for t in sides[side][name + side]]

    known = [(side, order) for side, order in orders.items() if order is not None]
    assert len(known) in (0, len(orders))
    of_a = "a" in orders
    ops.restart_(
        H=both("H_") if matrices else [],
        pushed=[] if matrices else part.g["pushed"],
        marks=both("marks_"),
        counts=both("counts_"),
        lam=part.lam_a() if of_a else [],
        A=part.a["A"] if of_a and not X else [],
        X=list(X) if of_a else [],
        force=[order for side, order in known for _ in range(len(sides[side]))],
        after=after,
        backend=part.backend,
    )

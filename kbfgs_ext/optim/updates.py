"""The updates of matrix factors, of both sides in one call, and their restart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kbfgs_ext import ops

if TYPE_CHECKING:
    from kbfgs_ext.optim.parts import Part

Tensors = list[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the device has decided of a step: bool scalars there."""

    ok: torch.Tensor  # false: the step is void
    ok_pair: torch.Tensor  # false: no pair comes of it
    order_a: torch.Tensor | None = None  # all activation sides restart
    order_g: torch.Tensor | None = None  # all gradient sides do


def update_matrices(
    part: Part, activations: bool, gradients: bool, X: Tensors, verdict: Verdict
) -> None:
    """Steps 6 to 9 on the matrix factors of both sides, or of one."""

    def of(side: bool, name: str) -> Tensors:
        return part[name] if side else []

    n = len(part.layers)
    if activations or gradients:
        ops.curvature_update_(
            H_a=of(activations, "H_a"),
            H_g=of(gradients, "H_g"),
            s=of(gradients, "s"),
            y=of(gradients, "y"),
            counts_a=of(activations, "counts_a"),
            counts_g=of(gradients, "counts_g"),
            work=part["work"],
            A=of(activations and not X, "A"),
            X=X,
            a_bar=of(activations, "a_bar"),
            h_change=of(gradients, "h_change"),
            g_bar=of(gradients, "g_bar"),
            g_bar_next=of(gradients, "g_bar_next"),
            lam_a=part.lam_a() if activations else [],
            lam_g=[part.scalars.lam_g] * n if gradients else [],
            pair_decay=part.group["pair_decay"],
            mu1=part.group["powell"],
            ok=verdict.ok,
            ok_pair=verdict.ok_pair,
            backend=part.backend,
        )
    orders = {"a": verdict.order_a} if activations else {}
    restart(part, orders | ({"g": verdict.order_g} if gradients else {}), X)


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
    n, of_a = len(part.layers), "a" in orders
    matrices = of_a or part.has("H_g")

    def both(name: str) -> Tensors:
        return [t for side in orders for t in part[name + side]]

    known = [order for order in orders.values() if order is not None]
    assert len(known) in (0, len(orders))
    ops.restart_(
        H=both("H_") if matrices else [],
        pushed=[] if matrices else part["pushed"],
        marks=both("marks_"),
        counts=both("counts_"),
        lam=part.lam_a() if of_a else [],
        A=part["A"] if of_a and not X else [],
        X=list(X) if of_a else [],
        force=[order for order in known for _ in range(n)],
        after=after,
        backend=part.backend,
    )

"""Restart: a factor that has gone wrong is put back to a safe start (`kbfgs_ext.ops.restart_`).

The gate (8) refuses a pair that would spoil H. If it refuses pair after pair, H itself no longer
fits the loss. And if step after step is undone however short it is, the direction is no descent:
some factor has gone wrong that the gate does not see, and the safeguard orders all to restart.
Everything is decided on the device.
"""

from __future__ import annotations

import dataclasses

import torch

from kbfgs_ext import ops
from kbfgs_ext.optim.factors import LayerFactors


@dataclasses.dataclass(frozen=True)
class Orders:
    """Whether a side's factors restart now, whatever their streaks: bool scalars on the device."""

    a: torch.Tensor | None = None
    g: torch.Tensor | None = None


def restart(
    layers: list[LayerFactors],
    side: str,
    after: int,
    order: torch.Tensor | None,
    lam_a: torch.Tensor,
    X: list[torch.Tensor],
    backend: str,
) -> None:
    """Restart the factors of ``side`` ("a" or "g") after so many rejected pairs in a row, or where
    ordered. On side "a", A is the layer's own, or X~'X~/m where ``X`` is given."""
    of_a = side == "a"
    matrices = layers[0].has("H_" + side)
    ops.restart_(
        H=[layer["H_" + side] for layer in layers] if matrices else [],
        pushed=[] if matrices else [layer["pushed"] for layer in layers],
        marks=[layer["marks_" + side] for layer in layers],
        counts=[layer["counts_" + side] for layer in layers],
        lam=[lam_a] * len(layers) if of_a else [],
        A=[layer["A"] for layer in layers] if of_a and not X else [],
        X=X if of_a else [],
        after=after,
        force=order,
        backend=backend,
    )

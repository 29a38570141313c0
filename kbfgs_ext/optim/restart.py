"""Restart: a factor that has rejected too many pairs in a row is put back to a safe start.

The gate (8) refuses a pair that would spoil H. If it refuses pair after pair, H itself no longer
fits the loss. Everything is decided on the device, from the counts that the ops keep:

    streak  = pairs rejected since the last accepted one, or since the last restart
    restart = streak >= restart_after
    H_g    <- I, or an empty ring
    H_a    <- I/(lam_a + tr A)

tr A bounds the largest eigenvalue of A, so that H_a is in no direction too large. (||a_bar||^2 does
not: with centred inputs it says nothing about their size.)
"""

from __future__ import annotations

import torch

from kbfgs_ext.optim.factors import LayerFactors

RING = ("S", "Y", "rho", "pushed")


def restarts(layers: list[LayerFactors], side: str, after: int) -> list[torch.Tensor]:
    """Whether each layer's ``side`` ("a" or "g") restarts now: bool scalars; counts those that do.

    A layer's marks are the accepted and rejected pairs at the streak's begin, and its restarts.
    """
    counts = torch.stack([layer["counts_" + side][:2] for layer in layers])
    marks = [layer["marks_" + side] for layer in layers]
    accepted, begin, done = torch.stack(marks).unbind(1)
    begin = torch.where(counts[:, 0] > accepted, counts[:, 1], begin)
    now = counts[:, 1] - begin >= after
    begin = torch.where(now, counts[:, 1], begin)
    torch._foreach_copy_(marks, torch.stack([counts[:, 0], begin, done + now], 1).unbind())
    return list(now.unbind())


def restart_g(layers: list[LayerFactors], after: int) -> None:
    """H_g <- I, or the ring <- empty, where it is time."""
    for layer, now in zip(layers, restarts(layers, "g", after), strict=True):
        if layer.has("H_g"):
            _identity(layer["H_g"], now, torch.ones_like(now, dtype=layer.dtype))
        else:
            for name in RING:
                layer[name].masked_fill_(now, 0)


def restart_a(layers: list[LayerFactors], X: list[torch.Tensor], lam_a, after: int) -> None:
    """H_a <- I/(lam_a + tr A) where it is time; A is the layer's own, or X~'X~/m if given."""
    for i, (layer, now) in enumerate(zip(layers, restarts(layers, "a", after), strict=True)):
        if X:
            trace = X[i].to(lam_a.dtype).square().sum() / len(X[i]) + (layer.bias is not None)
        else:
            trace = layer["A"].diagonal().sum(dtype=lam_a.dtype)
        _identity(layer["H_a"], now & torch.isfinite(trace), 1 / (lam_a + trace))


def _identity(H: torch.Tensor, now: torch.Tensor, value: torch.Tensor) -> None:
    """H <- value*I where ``now``."""
    H.masked_fill_(now, 0.0)
    H.diagonal().add_(torch.where(now, value, 0.0))

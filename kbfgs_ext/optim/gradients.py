"""Between backward and the step: the loss is looked at, and gradients are unscaled, checked and
clipped, on the device."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from kbfgs_ext.optim.process import Alone
from kbfgs_ext.optim.safeguard import resolution
from kbfgs_ext.optim.shards import local

CLIP_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_


def check_scaler(scaler: Any) -> None:
    """``scaler`` is a torch.amp.GradScaler or None."""
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")


def unscale(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, device: torch.device
) -> torch.Tensor | None:
    """Unscale the parameters' gradients; returns 1/scale for the gradients that were captured.

    The scaler notes an overflow for its `update`. Nothing is read back.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    scale = scaler.scale(torch.ones((), device=device))
    assert isinstance(scale, torch.Tensor)
    scaler.unscale_(optimizer)
    return scale.reciprocal()


class Gradients:
    """The gradients of a step and their norms: one pass over them serves both checks.

    ``unscaled`` is what they have been multiplied by since the ``process`` has seen them, if so.
    """

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        like: torch.Tensor,
        process: Alone,
        unscaled: torch.Tensor | None = None,
    ) -> None:
        moved = [p for p in parameters if p.grad is not None]
        self._gradients = [local(p.grad) for p in moved if p.grad is not None]
        norms = process.gradient_norms(moved)
        if norms is None:
            dense = [g.coalesce().values() if g.is_sparse else g for g in self._gradients]
            norms = torch.stack(torch._foreach_norm(dense))
        elif unscaled is not None:
            norms = norms * unscaled
        self.norms = norms.to(like.dtype)

    def clip(self, largest: float | None) -> torch.Tensor | None:
        """Scale all by min(1, largest/norm), in place; norm is that of all together.

        Returns that share.
        """
        if largest is None:
            return None
        norm = torch.linalg.vector_norm(self.norms)
        share = (largest / (norm + CLIP_EPSILON)).clamp(max=1.0)
        torch._foreach_mul_(self._gradients, share)
        return share


def is_finite(x: torch.Tensor) -> torch.Tensor:
    """torch.isfinite(x), in two kernels where that takes four."""
    return x.abs() < math.inf


def all_finite(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Whether every element of every tensor is finite; a bool scalar on the device."""
    return torch.stack([is_finite(t).all() for t in tensors]).all()


def scalar(loss: Any, like: torch.Tensor) -> torch.Tensor:
    """The loss as a detached scalar of ``like``'s dtype and device."""
    if isinstance(loss, torch.Tensor) and loss.numel() == 1 and not loss.is_complex():
        return loss.detach().reshape(()).to(like)
    if isinstance(loss, float):
        return torch.full_like(like, loss)
    shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else ""
    raise TypeError(
        f"closure must return the loss as a real scalar, got {type(loss).__name__}{shape}"
    )


def noise(loss: Any) -> float:
    """The relative difference below which two such losses say nothing."""
    kind = loss.dtype if isinstance(loss, torch.Tensor) and loss.is_floating_point() else None
    return resolution(kind or torch.float64)


def known_true(flag: torch.Tensor) -> bool:
    """The host's one look at the device, before the factors start: is the first batch sound?

    A fake tensor has no value; the shapes of a step are then followed through its usual course.
    """
    return isinstance(flag, FakeTensor) or bool(flag)

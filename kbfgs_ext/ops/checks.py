"""Argument checks shared by the ops' Python faces: each error names the argument and its value.

Checks look at shapes, dtypes and devices only, never at values, so they cost no device time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from kbfgs_ext.ops.registry import BACKENDS

Tensors = Sequence[torch.Tensor]


def same_length(**lists: Tensors) -> int:
    """All lists have one entry per layer; returns the number of layers."""
    lengths = {name: len(value) for name, value in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"lists must have one entry per layer, got lengths {lengths}")
    return next(iter(lengths.values()))


def shape(name: str, i: int, tensor: torch.Tensor, *wanted: int) -> None:
    """``tensor`` has exactly the shape ``wanted``."""
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{name}[{i}] must have shape {wanted}, got {tuple(tensor.shape)}")


def like(name: str, i: int, tensor: torch.Tensor, model: torch.Tensor) -> None:
    """``tensor`` has the dtype and device of ``model``."""
    if tensor.dtype != model.dtype or tensor.device != model.device:
        raise ValueError(
            f"{name}[{i}] must be {model.dtype} on {model.device},"
            f" got {tensor.dtype} on {tensor.device}"
        )


def shapes(name: str, tensors: Tensors, wanted: Sequence[Sequence[int]]) -> None:
    """`shape` of every layer: the whole list in one comparison, as a step calls it often."""
    if [t.shape for t in tensors] != wanted:
        for i, (t, dims) in enumerate(zip(tensors, wanted, strict=True)):
            shape(name, i, t, *dims)


def alike(name: str, tensors: Tensors, models: Tensors) -> None:
    """`like` of every layer."""
    kinds = [(t.dtype, t.device) for t in tensors]
    if kinds != [(t.dtype, t.device) for t in models]:
        for i, (t, model) in enumerate(zip(tensors, models, strict=True)):
            like(name, i, t, model)


def real(name: str, i: int, tensor: torch.Tensor) -> None:
    """``tensor`` holds real floating-point numbers."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name}[{i}] must be real floating point, got {tensor.dtype}")


def rows(name: str, i: int, X: torch.Tensor, n_a: int) -> None:
    """``X`` is m x d_in with m > 0 and n_a = d_in or d_in + 1."""
    if X.dim() != 2 or X.shape[0] == 0 or X.shape[1] not in (n_a, n_a - 1):
        raise ValueError(
            f"{name}[{i}] must be m x {n_a} or m x {n_a - 1} with m > 0, got {tuple(X.shape)}"
        )


def fraction(name: str, value: float) -> None:
    """0 <= value < 1."""
    if not (math.isfinite(value) and 0 <= value < 1):
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def backend(name: str) -> None:
    """``name`` is a backend or "auto"."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend must be auto, {', '.join(BACKENDS)}, got {name!r}")

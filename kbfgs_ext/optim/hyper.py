"""Hyperparameters: their ranges, and their values on the device."""

from __future__ import annotations

import math
from typing import Any

import torch


def _number(name: str, value: Any, low: float, high: float, closed_low: bool) -> None:
    """``value`` is a real number in (low, high), or in [low, high)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    inside = low <= value if closed_low else low < value
    if not (math.isfinite(value) and inside and value < high):
        left = "[" if closed_low else "("
        raise ValueError(f"{name} must be in {left}{low:g}, {high:g}), got {value}")


def check_group(group: dict[str, Any]) -> None:
    """Every hyperparameter of a param group is in its range; the error names it and its value."""
    lr = group["lr"]
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(f"lr must be a number or a floating-point scalar tensor, got {lr!r}")
    else:
        _number("lr", lr, 0.0, math.inf, closed_low=True)
    _number("damping", group["damping"], 0.0, math.inf, closed_low=False)
    for name in ("damping_a", "damping_g"):
        if group[name] is not None:
            _number(name, group[name], 0.0, math.inf, closed_low=False)
    for name in ("momentum", "stat_decay", "pair_decay", "powell"):
        _number(name, group[name], 0.0, 1.0, closed_low=True)
    _number("weight_decay", group["weight_decay"], 0.0, math.inf, closed_low=True)


def check_memory(memory: Any) -> None:
    """K-BFGS(L)'s memory is a positive int."""
    if isinstance(memory, bool) or not isinstance(memory, int):
        raise TypeError(f"memory must be an int, got {memory!r}")
    if memory < 1:
        raise ValueError(f"memory must be at least 1, got {memory}")


def lam_a(group: dict[str, Any]) -> float:
    """Damping of the activation side: damping_a, or sqrt(damping)."""
    given = group["damping_a"]
    return math.sqrt(group["damping"]) if given is None else given


def lam_g(group: dict[str, Any]) -> float:
    """Damping of the gradient side: damping_g, or sqrt(damping)."""
    given = group["damping_g"]
    return math.sqrt(group["damping"]) if given is None else given


class DeviceScalars:
    """A param group's lr, lam_a and lam_g as float64 scalars on the device.

    They are written only when the group's value has changed, so that a step uploads nothing, and
    they keep their place in memory, so that a captured graph reads what a scheduler has set.
    """

    def __init__(self, device: torch.device) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64
        self._values = torch.zeros(4, dtype=wide, device=device)
        self.lr, self.lam_a, self.lam_g, self.step_size = self._values.unbind()
        self._known: dict[str, float] = {}

    def update(self, group: dict[str, Any], scale: torch.Tensor) -> None:
        """Bring the scalars up to date; step_size = lr * scale."""
        if isinstance(group["lr"], torch.Tensor):
            self.lr.copy_(group["lr"], non_blocking=True)
            self._known.pop("lr", None)
        else:
            self._set("lr", self.lr, group["lr"])
        self._set("lam_a", self.lam_a, lam_a(group))
        self._set("lam_g", self.lam_g, lam_g(group))
        torch.mul(self.lr, scale, out=self.step_size)

    def _set(self, name: str, tensor: torch.Tensor, value: float) -> None:
        if self._known.get(name) != value:
            tensor.fill_(value)
            self._known[name] = value

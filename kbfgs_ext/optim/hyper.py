"""Hyperparameters: their ranges, and their values on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

DAMPINGS = ("damping", "damping_a", "damping_g")
TORCH_KEYWORDS = ("foreach", "fused", "capturable", "maximize", "differentiable")
# Keywords that are fields of a rule now: the rule's argument and class, and the field.
MOVED = {
    "step_length": ("direction", "DirectionRule", "step_length"),
    "nesterov": ("direction", "DirectionRule", "nesterov"),
    "initial_scale": ("factors", "FactorRule", "initial_scale"),
    "relative_damping": ("factors", "FactorRule", "relative_damping"),
    "restart_after": ("factors", "FactorRule", "restart_after"),
    "factor_every": ("factors", "FactorRule", "update_every"),
    "freeze_second_pass": ("factors", "FactorRule", "freeze_second_pass"),
    "matmul_precision": ("precision", "Precision", "matmul"),
    "master_weights": ("precision", "Precision", "master_weights"),
    "mean_over": ("ranks", "RankRule", "mean_over"),
    "shared_work": ("ranks", "RankRule", "shared_work"),
}
_REFUSED = {
    "maximize": "let the closure return (and backpropagate) -loss",
    "differentiable": "the step works in place, outside autograd",
}


def check_number(
    name: str, value: Any, low: float, high: float, closed_low: bool, tensor: bool = False
) -> None:
    """``value`` is a real number in (low, high), or in [low, high); maybe a scalar tensor.

    The value of a tensor on another device is not looked at: that would wait for the device.
    """
    if tensor and isinstance(value, torch.Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{name} must be a number or a floating-point scalar tensor, got {value!r}"
            )
        if value.device.type != "cpu" or isinstance(value, FakeTensor):
            return
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    inside = low <= value if closed_low else low < value
    if not (math.isfinite(value) and inside and value < high):
        left = "[" if closed_low else "("
        raise ValueError(f"{name} must be in {left}{low:g}, {high:g}), got {value}")


def check_group(group: Mapping[str, Any]) -> None:
    """Every hyperparameter of a param group is in its range; the error names it and its value."""
    check_number("lr", group["lr"], 0.0, math.inf, closed_low=True, tensor=True)
    for name in ("damping", "damping_a", "damping_g"):
        if name == "damping" or group[name] is not None:
            check_number(name, group[name], 0.0, math.inf, closed_low=False, tensor=True)
    for name in ("momentum", "stat_decay", "pair_decay", "powell"):
        check_number(name, group[name], 0.0, 1.0, closed_low=True)
    check_number("weight_decay", group["weight_decay"], 0.0, math.inf, closed_low=True)
    check_torch_keywords({key: group[key] for key in TORCH_KEYWORDS if key in group})


def check_torch_keywords(given: Mapping[str, Any]) -> None:
    """Keywords of torch's own optimizers: already so, or refused by name.

    Every op takes all layers in one call and a step never waits for the host, so foreach, fused
    and capturable ask for nothing more, and their absence for nothing less.

    Raises:
        TypeError: no optimizer of torch has the keyword, which may be a rule's by now, or its value
            is no bool.
        ValueError: maximize=True or differentiable=True.
    """
    for name, value in given.items():
        if name in MOVED:
            argument, rule, field = MOVED[name]
            what = "a field" if field == name else field
            raise TypeError(f"{name} is {what} of {rule} now: {argument}={rule}({field}=...)")
        if name not in TORCH_KEYWORDS:
            raise TypeError(f"unexpected keyword argument {name!r}")
        if value is not None:
            check_bool(name, value)
        if value and name in _REFUSED:
            raise ValueError(f"{name}=True is not supported: {_REFUSED[name]}")


def check_bool(name: str, value: Any) -> None:
    """``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """``value`` is a positive int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _lam(group: Mapping[str, Any], own: str) -> float | torch.Tensor:
    """Damping of one side: its own, or sqrt(damping)."""
    if group[own] is not None:
        return group[own]
    damping = group["damping"]
    return damping.double().sqrt() if isinstance(damping, torch.Tensor) else math.sqrt(damping)


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

    def refresh(self, group: Mapping[str, Any]) -> None:
        """lr, lam_a and lam_g as the group has them."""
        self._set("lr", self.lr, group["lr"])
        self._set("lam_a", self.lam_a, _lam(group, "damping_a"))
        self._set("lam_g", self.lam_g, _lam(group, "damping_g"))

    def set_step_size(self, scale: torch.Tensor) -> None:
        """step_size = lr * scale."""
        torch.mul(self.lr, scale, out=self.step_size)

    def _set(self, name: str, tensor: torch.Tensor, value: float | torch.Tensor) -> None:
        if isinstance(value, torch.Tensor):
            tensor.copy_(value.detach().reshape(()), non_blocking=True)
            self._known.pop(name, None)
        elif self._known.get(name) != value:
            tensor.fill_(value)
            self._known[name] = value

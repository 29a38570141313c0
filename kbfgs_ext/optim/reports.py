"""What an optimizer says of what it covers, and warns of what it does not."""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from kbfgs_ext.optim.factors import LayerFactors, Plan


@dataclasses.dataclass(frozen=True)
class CoverageRow:
    """One layer, or one parameter that is not covered."""

    name: str
    covered: bool
    parameters: int  # trained numbers
    n_g: int = 0
    n_a: int = 0
    factor_bytes: int = 0  # of A, H_a, H_g and the ring of pairs
    reason: str = ""  # why it is not covered, or what it goes without


class Coverage(list[CoverageRow]):
    """Rows of `CoverageRow`; as text a table with the shares."""

    @property
    def share(self) -> float:
        """Of the trained parameters, those in covered layers."""
        total = sum(row.parameters for row in self)
        return sum(row.parameters for row in self if row.covered) / max(total, 1)

    @property
    def factor_bytes(self) -> int:
        """Bytes of all factors."""
        return sum(row.factor_bytes for row in self)

    def __str__(self) -> str:
        layers = sum(row.covered for row in self)
        width = max((len(row.name) for row in self), default=0)
        lines = [
            f"{layers} layers covered, {self.share:.1%} of the trained parameters,"
            f" {self.factor_bytes / 2**20:.1f} MiB of factors"
        ]
        for row in self:
            size = f"{row.n_g} x {row.n_a}" if row.covered else ""
            said = row.reason if row.covered else f"fallback: {row.reason}"
            lines.append(
                f"  {row.name:{width}}  {row.parameters:>10}  {size:>13}"
                f"  {row.factor_bytes / 2**20:>8.1f} MiB  {said}".rstrip()
            )
        return "\n".join(lines)


FACTORS = ("A", "H_a", "H_g", "S", "Y")


def coverage(
    layers: list[LayerFactors],
    plan: Plan,
    rest: Mapping[str, nn.Parameter],
    reasons: Mapping[str, str],
) -> Coverage:
    """The report of ``layers``, and of the parameters in ``rest`` with their ``reasons``."""
    report = Coverage()
    for layer in layers:
        shapes = layer.kept_shapes(plan)
        sizes = [_bytes(*shapes[name]) for name in FACTORS if name in shapes]
        left_out = plan.left_out(layer)
        report.append(
            CoverageRow(
                layer.name,
                True,
                sum(p.numel() for p in layer.parameters()),
                layer.n_g,
                layer.n_a,
                sum(sizes),
                f"no factor for {', '.join(left_out)}" if left_out else "",
            )
        )
    for name, p in rest.items():
        report.append(CoverageRow(name, False, p.numel(), reason=reasons[name]))
    return report


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def say_what_is_left_out(layers: list[LayerFactors], plan: Plan) -> None:
    """Warn of the sides that have no factor."""
    left_out = [(layer.name, plan.left_out(layer)) for layer in layers]
    said = "; ".join(f"{name}: {', '.join(sides)}" for name, sides in left_out if sides)
    if said:
        _warn(
            f"max_factor_dim={plan.max_factor_dim}: these sides are larger and have no"
            f" factor, which leaves the identity in its place: {said}"
        )


def say_what_falls_back(optimizer: Any, names: Iterable[str], lr: float | torch.Tensor) -> None:
    """Warn of the parameters that go to the default fallback."""
    covered = sum(row.covered for row in optimizer.coverage())
    _warn(
        f"{type(optimizer).__name__} covers {covered} layers; these parameters"
        f" go to torch.optim.AdamW(lr={float(lr)}) instead (fallback=... changes that):"
        f" {', '.join(names)}"
    )


def say_what_has_thawed(names: Iterable[str]) -> None:
    """Warn of parameters that have a gradient and that nobody moves."""
    _warn(
        "these parameters were frozen when the optimizer was made and have a gradient now, but it"
        ' does not move them; optimizer.add_param_group({"params": [...]}) takes them in:'
        f" {', '.join(names)}"
    )


def say_what_is_blind(names: Iterable[str]) -> None:
    """Warn of layers whose g_bar cannot be had."""
    _warn(
        "these layers have no trained bias, and the closure takes gradients by torch.autograd.grad,"
        " or by backward(inputs=...), which leaves out what stands in for it: their curvature does"
        f" not follow the loss. Call loss.backward(): {', '.join(names)}"
    )


def say_what_is_unseen(names: Iterable[str]) -> None:
    """Warn of layers whose weight is used without a call of the layer."""
    _warn(
        "the weights of these layers have a gradient, but no call of the layer that leads to the"
        " loss was seen (F.linear(x, layer.weight), or layer.forward(x), in place of layer(x)):"
        " their factors do not follow, and before they have started the layers step along their"
        f" momentum alone: {', '.join(names)}. exclude= gives them to the fallback"
    )


def _warn(message: str) -> None:
    """Warn at the first line outside the package."""
    warnings.warn(message, stacklevel=_level_outside())


def _level_outside() -> int:
    """The stacklevel at which the caller's warning points at the first line outside the package."""
    inside = (__name__.partition(".")[0], "torch")  # torch wraps a step in code of its own
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in inside:
        frame, level = frame.f_back, level + 1
    return level

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

from kbfgs_ext.optim.covered import CoveredLayer
from kbfgs_ext.optim.memory import FACTORS


@dataclasses.dataclass(frozen=True)
class CoverageRow:
    """One layer, or one parameter that is not covered."""

    name: str
    covered: bool
    parameters: int  # trained numbers
    n_g: int = 0
    n_a: int = 0
    factor_bytes: int = 0  # of A, H_a, H_g and the ring of pairs
    reason: str = ""  # why it is not covered, or what there is to say of its factors


def summary(counters: Mapping[str, torch.Tensor], lr: float | torch.Tensor) -> str:
    """`counters` in a line."""
    values = dict(
        zip(counters, torch.stack([c.double() for c in counters.values()]).tolist(), strict=True)
    )
    said = [f"step {values['steps']:.0f}", f"lr {float(lr):.3g}"]
    said += [f"{values[name]:.0f} {name}" for name in ("skipped", "undone") if values[name]]
    said += [f"{values['restarts']:.0f} restarts"] if values["restarts"] else []
    return ", ".join(said + ([f"scale {values['scale']:.2g}"] if values["scale"] != 1 else []))


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


FEW = 3  # names in a message
LARGE = 2**26  # bytes: a factor below is never called large


def coverage(
    layers: list[CoveredLayer],
    rest: Mapping[str, nn.Parameter],
    reasons: Mapping[str, str],
) -> Coverage:
    """The report of ``layers``, and of the parameters in ``rest`` with their ``reasons``."""
    report = Coverage()
    for layer in layers:
        report.append(
            CoverageRow(
                layer.name,
                True,
                layer.n_g * layer.n_a,
                layer.n_g,
                layer.n_a,
                sum(_factor_bytes(layer).values()),
                _blocks(layer),
            )
        )
    for name, p in rest.items():
        report.append(CoverageRow(name, False, p.numel(), reason=reasons[name]))
    return report


def _factor_bytes(layer: CoveredLayer) -> dict[str, int]:
    """Bytes of a layer's factors by their names, of all blocks together."""
    sizes: dict[str, int] = {}
    for name, (shape, dtype) in layer.kept_shapes().items():
        factor = name.partition(".")[0]
        if factor in FACTORS:
            sizes[factor] = sizes.get(factor, 0) + math.prod(shape) * dtype.itemsize
    return sizes


def _blocks(layer: CoveredLayer) -> str:
    """What is in several blocks, or in part unseen, for people."""
    sides = (("n_g", layer.gradients), ("n_a", layer.activations))
    several = [f"{n} in {len(blocks)} blocks" for n, blocks in sides if len(blocks) > 1]
    tied = f"tied to {layer.tied}, whose gradients its factors do not see"
    return ", ".join(
        [f"{layer.groups} groups"] * (layer.groups > 1) + several + [tied] * bool(layer.tied)
    )


def say_what_is_large(layers: list[CoveredLayer], model: nn.Module) -> None:
    """Warn of the factors that take more memory than the model."""
    least = max(LARGE, sum(p.numel() * p.element_size() for p in model.parameters()))
    large = [
        f"{layer.name}: {name} {size / 2**20:.0f} MiB"
        for layer in layers
        for name, size in _factor_bytes(layer).items()
        if size > least
    ]
    if large:
        _warn(
            "these factors take more memory than the model, each of them (a smaller block_size="
            f" makes them smaller, exclude= leaves a layer out): {_few(large)}"
        )


def say_what_falls_back(optimizer: Any, lr: float | torch.Tensor) -> None:
    """Warn of the parameters that go to the default fallback: shares, by the reason."""
    coverage: Coverage = optimizer.coverage()
    total = max(sum(row.parameters for row in coverage), 1)
    covered = sum(row.covered for row in coverage)
    by_reason: dict[str, list[CoverageRow]] = {}
    for row in coverage:
        if not row.covered:
            by_reason.setdefault(row.reason, []).append(row)
    sizes = {reason: sum(x.parameters for x in rows) for reason, rows in by_reason.items()}
    said = [
        f"{_few([row.name for row in by_reason[reason]])} ({sizes[reason] / total:.1%}: {reason})"
        for reason in sorted(sizes, key=lambda reason: -sizes[reason])
    ]
    _warn(
        f"{type(optimizer).__name__} covers {covered} layer{'s' * (covered != 1)},"
        f" {coverage.share:.1%} of the trained"
        f" parameters; these parameters go to torch.optim.AdamW(lr={float(lr)}) instead"
        " (fallback=... changes that, print(optimizer.coverage()) lists all):"
        f" {_few(said, '; ')}"
    )


def _few(named: list[str], between: str = ", ") -> str:
    """The first of what is ``named``, and how many more there are."""
    more = len(named) - FEW
    return between.join(named[:FEW]) + (f" and {more} more" if more > 0 else "")


class Watch:
    """What each step's gradients show of a model, said once: layers that step without their input,
    layers without a bias gradient, and parameters that nobody moves."""

    def __init__(self, model: nn.Module) -> None:
        self._frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
        self._said: set[str] = set()

    def look(self, active: list[CoveredLayer], moved: Iterable[torch.Tensor]) -> None:
        """Name what is new among the layers that this step moves; ``moved`` are all parameters
        that a step may move."""
        # Not where gradients that were zeroed in place may be zero still.
        called = [x.observer.seen or all(map(x.observer.kept, x.moving)) for x in active]
        unseen = [x.name for x, known in zip(active, called, strict=True) if not known]
        blind = [x.name for x in active if x.observer.seen and not x.observer.filled]
        thawed = [n for n, p in self._frozen.items() if p.requires_grad and p.grad is not None]
        if thawed:
            known = {id(p) for p in moved}
            strange = [name for name in thawed if id(self._frozen[name]) not in known]
            self._frozen = {n: p for n, p in self._frozen.items() if n not in thawed}
            thawed = strange
        for names, message in ((unseen, _UNSEEN), (blind, _BLIND), (thawed, _THAWED)):
            new = sorted(name for name in names if name + message not in self._said)
            if new:
                self._said |= {name + message for name in new}
                _warn(message.format(", ".join(new)))


_THAWED = (
    "these parameters were frozen when the optimizer was made and have a gradient now, but it"
    ' does not move them; optimizer.add_param_group({{"params": [...]}}) takes them in: {}'
)
_BLIND = (
    "these layers have no trained bias, and the closure takes gradients by torch.autograd.grad,"
    " or by backward(inputs=...), which leaves out what stands in for it: their curvature does"
    " not follow the loss. Call loss.backward(): {}"
)
_UNSEEN = (
    "the weights of these layers have a gradient, but no call of the layer that leads to the"
    " loss was seen (F.linear(x, layer.weight), or layer.forward(x), in place of layer(x)):"
    " their factors do not follow, and before they have started the layers step along their"
    " momentum alone: {}. exclude= gives them to the fallback"
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

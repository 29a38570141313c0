"""The gate before the clock: a provider that is wrong gets no time.

The float64 reference is truth. A result may be twice as far from it as the reference at its own
dtype, plus a floor of a few roundings of the largest number involved.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kbfgs_ext.bench.kernel import Arguments
from kbfgs_ext.ops import registry

TIMES_REFERENCE = 2.0
FLOOR_ROUNDINGS = 8.0  # in units of the dtype's epsilon


def change(args: Arguments, to: Callable[[Tensor], Tensor]) -> Arguments:
    """The arguments with every tensor changed."""

    def changed(arg: Any) -> Any:
        if isinstance(arg, list):
            return [to(t) for t in arg]
        return to(arg) if isinstance(arg, Tensor) else arg

    return {name: changed(arg) for name, arg in args.items()}


def copies(args: Arguments) -> Arguments:
    """The arguments in tensors of their own."""
    return change(args, Tensor.clone)


class Gate:
    """Judges results of one op on one set of arguments."""

    def __init__(self, op: str, args: Arguments) -> None:
        self._op = op
        self._before = args
        run = registry.implementation(op, "reference").run
        wide = change(args, lambda t: t.double() if t.is_floating_point() else t.clone())
        run(wide)
        narrow = copies(args)
        run(narrow)
        self._truth, self._reference = wide, narrow

    def verdict(self, got: Arguments) -> str | None:
        """What is wrong with the arguments as a provider left them, or None."""
        sides = (got, self._reference, self._truth, self._before)
        for (name, g), (_, r), (_, t), (_, before) in zip(
            *(written(self._op, side) for side in sides), strict=True
        ):
            if not g.is_floating_point():
                if not torch.equal(g, r):
                    return f"{name}: {g.tolist()}, not {r.tolist()}"
                continue
            if not torch.equal(torch.isfinite(g), torch.isfinite(r)):
                return f"{name}: not finite in other places than the reference"
            largest = max(_largest(t), self._entered(before))
            floor = FLOOR_ROUNDINGS * torch.finfo(g.dtype).eps * largest
            error, allowed = _largest(g - t), TIMES_REFERENCE * _largest(r - t) + floor
            if error > allowed:
                return f"{name}: error {error:.1e}, allowed {allowed:.1e}"
        return None

    def _entered(self, before: Tensor) -> float:
        """The largest magnitude that entered a result that was ``before``."""
        if self._op == "lbfgs_two_loop_":
            return _largest(self._before["Q"][0])
        if self._op == "polar_":  # multiplies small singular values, and rounding, by so much
            coefficients, shifts = self._before["coefficients"], self._before["shifts"]
            if shifts is None:
                return math.prod(coefficients[::3])
            return coefficients[0] + sum(map(operator.truediv, coefficients[1:], shifts))
        return _largest(before)


def _largest(tensor: Tensor) -> float:
    """The largest finite magnitude."""
    return float(tensor.nan_to_num(0, 0, 0).abs().max()) if tensor.numel() else 0.0


def written(op: str, args: Arguments) -> list[tuple[str, Tensor]]:
    """(name, tensor) of what the op writes, scratch left out."""
    found = []
    for argument in getattr(torch.ops.kbfgs_ext, op).default._schema.arguments:
        name, info = argument.name, argument.alias_info
        if info is not None and info.is_write and name != "work":
            found += [(f"{name}[{i}]", t) for i, t in enumerate(args[name])]
    return found

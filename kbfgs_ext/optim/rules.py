"""What an optimizer is told by topic: frozen dataclasses, each of whose fields is checked once.

That of the safeguard, `SafeguardRule`, stands beside it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from kbfgs_ext.optim.hyper import check_bool, check_count, check_number

STEP_LENGTHS = ("direction", "balanced", "layer")
DIRECTIONS = ("newton", "spectral")
PRECISIONS = ("highest", "high", "medium")
MEANS = ("ranks", "rows")
SHARED = (False, True, "auto")
# What goes with each kind of direction where nothing else is said.
_OWN: dict[str, dict[str, Any]] = {
    "spectral": {"step_length": "layer", "nesterov": True},
    "newton": {"step_length": "direction", "nesterov": False},
}


@dataclasses.dataclass(frozen=True)
class DirectionRule:
    """Where a step goes, and how far.

    ``direction="newton"`` stands for ``DirectionRule("newton")``, with that kind's own length and
    look ahead: the paper's. Equations: (3), (16) to (19) and (23) of kbfgs_ext/ops/README.md.

    Args:
        kind: "newton" is P = H_g M H_a, the paper's. "spectral" preconditions by the factor of the
            longer side, P = M H_a or H_g M, and takes the polar factor, which has the singular
            vectors of P and singular values of 1.
        step_length: "direction" moves a layer by -lr*P, the paper's. "balanced" shares the
            length alike: -lr*(R/r)*P, with r the root mean square of the rows of a layer's P and R
            that of the rows of all P of its param group (of the layers with the same factors).
            "layer" takes from P the direction alone: -lr*P/r. None is "layer" with "spectral" and
            "direction" with "newton".
        nesterov: precondition not M but what it would be after the same gradient once more, which
            takes one more matrix of the weight's size. None does with "spectral" alone.

    Raises:
        TypeError, ValueError: a field is out of its range; the message names it and its value.
    """

    kind: str = "spectral"
    step_length: str | None = None
    nesterov: bool | None = None

    def __post_init__(self) -> None:
        if self.kind not in DIRECTIONS:
            raise ValueError(f"kind of direction must be one of {DIRECTIONS}, got {self.kind!r}")
        for name, own in _OWN[self.kind].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, own)
        if self.step_length not in STEP_LENGTHS:
            raise ValueError(f"step_length must be one of {STEP_LENGTHS}, got {self.step_length!r}")
        check_bool("nesterov", self.nesterov)

    @classmethod
    def of(cls, direction: str | DirectionRule) -> DirectionRule:
        """A rule as it is; a string is its kind."""
        if isinstance(direction, cls):
            return direction
        if isinstance(direction, str):
            return cls(direction)
        raise TypeError(f"direction must be a string or a DirectionRule, got {direction!r}")


@dataclasses.dataclass(frozen=True)
class FactorRule:
    """How factors start, what damps them, when they are updated, and when they start again.

    Args:
        initial_scale: gamma, above 0: H_g starts as gamma*I, the paper's as I. "damping" takes
            1/lam_g, the inverse of a curvature of which the damping is all that is known.
        relative_damping: the dampings are shares: lam_a of the mean square of a layer's inputs,
            lam_g of its curvature along its own steps, (21) and (22). False takes them as they
            are, in units of squared inputs and of the loss, as the paper does.
        restart_after: put a factor back to its start, on the device, after so many rejected pairs
            in a row; and all of them after so many steps in a row that the safeguard has undone at
            its smallest scale, or with direction="newton" when the loss surges. None never does.
        update_every: update the activation side (A and H_a) in every update_every-th step; the
            gradient side has its pairs in every ``pair_every``-th.
        freeze_second_pass: leave the weight gradients out of the second pass, which is made for
            the pair of H_g. They are not needed; False computes them all the same (the plain form
            of the method, for comparison, and for closures that use them).

    Raises:
        TypeError, ValueError: a field is out of its range; the message names it and its value.
    """

    initial_scale: float | str = 1.0
    relative_damping: bool = True
    restart_after: int | None = 10
    update_every: int = 1
    freeze_second_pass: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.initial_scale, str):
            if self.initial_scale != "damping":
                raise ValueError(
                    f"initial_scale must be a number or 'damping', got {self.initial_scale!r}"
                )
        else:
            check_number("initial_scale", self.initial_scale, 0.0, math.inf, closed_low=False)
        check_bool("relative_damping", self.relative_damping)
        if self.restart_after is not None:
            check_count("restart_after", self.restart_after)
        check_count("update_every", self.update_every)
        check_bool("freeze_second_pass", self.freeze_second_pass)


@dataclasses.dataclass(frozen=True)
class Precision:
    """Of the optimizer's own numbers.

    Args:
        matmul: of its own float32 products, in the words of
            `torch.set_float32_matmul_precision`; None leaves torch's setting, which is float32
            throughout unless changed.
        master_weights: keep a 32-bit copy of covered 16-bit parameters, whose rounding they are
            after every step: steps too small for 16 bits then add up. False rounds every step.

    Raises:
        TypeError, ValueError: a field is out of its range; the message names it and its value.
    """

    matmul: str | None = None
    master_weights: bool = True

    def __post_init__(self) -> None:
        if self.matmul is not None and self.matmul not in PRECISIONS:
            raise ValueError(f"matmul must be None or one of {PRECISIONS}, got {self.matmul!r}")
        check_bool("master_weights", self.master_weights)


@dataclasses.dataclass(frozen=True)
class RankRule:
    """How several processes train together: docs/distributed.md.

    Args:
        mean_over: what the objective is the mean over: "ranks", of the closures' losses, as with
            DDP; or "rows", where a rank counts as much as the rows that it has, without DDP.
        shared_work: each process makes the steps of some layers and keeps their factors, whose
            memory falls with the ranks. "auto" does so where layers are large enough. Models under
            `fully_shard` are always trained so.

    Raises:
        ValueError: a field is out of its range; the message names it and its value.
    """

    mean_over: str = "ranks"
    shared_work: bool | str = False

    def __post_init__(self) -> None:
        if self.mean_over not in MEANS:
            raise ValueError(f"mean_over must be one of {MEANS}, got {self.mean_over!r}")
        if self.shared_work not in SHARED:
            raise ValueError(f"shared_work must be one of {SHARED}, got {self.shared_work!r}")


def check_rule(name: str, rule: Any, kind: type) -> None:
    """The argument ``name`` is a rule of its ``kind``."""
    if not isinstance(rule, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {rule!r}")

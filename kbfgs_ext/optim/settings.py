"""Settings of a whole optimizer: what its constructor was told, checked once, and never changed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from kbfgs_ext.ops import checks
from kbfgs_ext.optim.hyper import check_count, check_number
from kbfgs_ext.optim.rules import DirectionRule, FactorRule, Precision, check_rule
from kbfgs_ext.optim.safeguard import FINITE, SafeguardRule

HESSIAN_ACTIONS = ("ema", "minibatch")
# The largest block of a factor where nothing is said: small ones along the polar factor, for which
# docs/tuning.md has the evidence. With large ones, 16 MiB of float32, every side of the paper's
# networks is one block.
SMALL_BLOCK, LARGE_BLOCK = 256, 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of `KBFGS` that are the same for all layers, and the fields of its rules, under
    names of their own; their meaning stands there.

    Raises:
        TypeError, ValueError: one is out of its range; the message names it and its value.
    """

    memory: int | None = None  # pairs of K-BFGS(L); None keeps H_g
    hessian_action: str = "minibatch"
    safeguard: bool | SafeguardRule = True
    backend: str = "auto"
    freeze_second_pass: bool
    max_grad_norm: float | None = None
    matmul_precision: str | None
    pair_every: int = 10
    factor_every: int
    block_size: int | str | None = "auto"
    restart_after: int | None
    initial_scale: float | str
    step_length: str
    direction: str
    nesterov: bool
    relative_damping: bool
    master_weights: bool

    @classmethod
    def of(
        cls, direction: str | DirectionRule, factors: FactorRule, precision: Precision, **rest: Any
    ) -> Settings:
        """What the rules say, and the ``rest``."""
        along = DirectionRule.of(direction)
        check_rule("factors", factors, FactorRule)
        check_rule("precision", precision, Precision)
        return cls(
            direction=along.kind,
            step_length=str(along.step_length),
            nesterov=bool(along.nesterov),
            initial_scale=factors.initial_scale,
            relative_damping=factors.relative_damping,
            restart_after=factors.restart_after,
            factor_every=factors.update_every,
            freeze_second_pass=factors.freeze_second_pass,
            matmul_precision=precision.matmul,
            master_weights=precision.master_weights,
            **rest,
        )

    def __post_init__(self) -> None:
        if self.memory is not None:
            check_count("memory", self.memory)
        if self.hessian_action not in HESSIAN_ACTIONS:
            raise ValueError(
                f"hessian_action must be one of {HESSIAN_ACTIONS}, got {self.hessian_action!r}"
            )
        checks.backend(self.backend)
        if self.max_grad_norm is not None:
            check_number("max_grad_norm", self.max_grad_norm, 0.0, math.inf, closed_low=False)
        check_count("pair_every", self.pair_every)
        if self.block_size not in (None, "auto"):
            check_count("block_size", self.block_size)
        if not isinstance(self.safeguard, (bool, SafeguardRule)):
            raise TypeError(f"safeguard must be a bool or a SafeguardRule, got {self.safeguard!r}")

    @property
    def keep_A(self) -> bool:
        """Whether the moving average A is kept."""
        return self.hessian_action == "ema"

    def largest_block(self, patches: bool = False) -> int | None:
        """Rows of the largest block of a factor; None where a side is one block, however long.

        ``patches``: the side is that of a convolution's inputs, where statistics are convolutions
        too, and take about 25 launches for every block.
        """
        if not isinstance(self.block_size, str):
            return self.block_size
        return SMALL_BLOCK if self.direction == "spectral" and not patches else LARGE_BLOCK

    @property
    def rule(self) -> SafeguardRule | None:
        """The safeguard's; None where there is no safeguard."""
        if isinstance(self.safeguard, SafeguardRule):
            return self.safeguard
        if not self.safeguard:
            return None
        return FINITE if self.direction == "spectral" else SafeguardRule()

    @property
    def fused(self) -> bool:
        """Whether one op takes a step from the gradient to the weights."""
        plain = self.direction == "newton" and self.step_length == "direction"
        return plain and not self.nesterov

    def about(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the optimizer that loads it."""
        return {
            "method": "K-BFGS" if self.memory is None else "K-BFGS(L)",
            "hessian_action": self.hessian_action,
            "memory": self.memory,
            "restart_after": self.restart_after,
            "initial_scale": self.initial_scale,
            "relative_damping": self.relative_damping,
        }

"""Settings of a whole optimizer: what its constructor was told, checked once, and never changed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from kbfgs_ext.ops import checks
from kbfgs_ext.optim.hyper import check_count, check_number
from kbfgs_ext.optim.safeguard import FINITE, SafeguardRule

HESSIAN_ACTIONS = ("ema", "minibatch")
STEP_LENGTHS = ("direction", "balanced", "layer")
DIRECTIONS = ("newton", "spectral")
PRECISIONS = ("highest", "high", "medium")
# The largest block of a factor where nothing is said: small ones along the polar factor, for which
# docs/tuning.md has the evidence. With large ones, 16 MiB of float32, every side of the paper's
# networks is one block.
SMALL_BLOCK, LARGE_BLOCK = 256, 2048


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `KBFGS` that are the same for all layers; their meaning stands there.

    Raises:
        TypeError, ValueError: one is out of its range; the message names it and its value.
    """

    memory: int | None = None  # pairs of K-BFGS(L); None keeps H_g
    hessian_action: str = "minibatch"
    safeguard: bool | SafeguardRule = True
    backend: str = "auto"
    freeze_second_pass: bool = True
    max_grad_norm: float | None = None
    matmul_precision: str | None = None
    pair_every: int = 10
    factor_every: int = 1
    block_size: int | str | None = "auto"
    restart_after: int | None = 10
    initial_scale: float | str = 1.0
    step_length: str = "layer"
    direction: str = "spectral"
    nesterov: bool = True
    relative_damping: bool = True
    master_weights: bool = True

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
        if self.matmul_precision is not None and self.matmul_precision not in PRECISIONS:
            raise ValueError(
                f"matmul_precision must be None or one of {PRECISIONS},"
                f" got {self.matmul_precision!r}"
            )
        check_count("pair_every", self.pair_every)
        check_count("factor_every", self.factor_every)
        if self.block_size not in (None, "auto"):
            check_count("block_size", self.block_size)
        if self.restart_after is not None:
            check_count("restart_after", self.restart_after)
        if self.step_length not in STEP_LENGTHS:
            raise ValueError(f"step_length must be one of {STEP_LENGTHS}, got {self.step_length!r}")
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {DIRECTIONS}, got {self.direction!r}")
        if isinstance(self.initial_scale, str):
            if self.initial_scale != "damping":
                raise ValueError(
                    f"initial_scale must be a number or 'damping', got {self.initial_scale!r}"
                )
        else:
            check_number("initial_scale", self.initial_scale, 0.0, math.inf, closed_low=False)
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

"""Builders of calls of polar_: cases.py has the calls."""

from __future__ import annotations

import math

from kbfgs_ext.ops.spectral.api import COEFFICIENTS, workspace_size
from kbfgs_ext.optim import direction
from tests.helpers.inputs import in_dtype, nan_filled
from tests.helpers.oracles import randn


def polar(shapes, iterations=4, ridge=0.0, scale=1.0):
    """``shapes`` holds (n_g, n_a) of each layer."""

    def build(dtype):
        P = [scale * randn(*shape, seed=i) for i, shape in enumerate(shapes)]
        work = nan_filled(*[(workspace_size(*shape),) for shape in shapes])
        P, work = in_dtype(dtype, [P, work])
        return dict(
            P=P, work=work, coefficients=COEFFICIENTS[: 3 * iterations], ridge=ridge, shifts=None
        )

    return build


def slope(coefficients: tuple[float, ...]) -> float:
    """What small singular values are multiplied by, and the rounding of the Gram matrix with them:
    155 of all four iterations."""
    return math.prod(coefficients[::3])


def products_alone(monkeypatch) -> None:
    """Let an optimizer on the CPU take the direction that one on a GPU takes."""
    monkeypatch.setattr(direction, "WEIGHTS", COEFFICIENTS)
    monkeypatch.setattr(direction, "SHIFTS", None)

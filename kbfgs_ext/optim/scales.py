"""The scales that relative dampings are in: a block's own, measured on the device.

    lam_a <- damping_a * v      v follows the mean square of the block's inputs, tr(A)/d_in
    y     <- sqrt(ss/yy) * y    ss, yy follow |h_bar+ - h_bar|^2 and |g_bar+ - g_bar|^2

With y in units of s, lam_g = damping_g is a share of the block's curvature. Both make a setting
independent of the scale of inputs and loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kbfgs_ext import ops
from kbfgs_ext.optim.factors import Tensors
from kbfgs_ext.optim.parts import Part

NormsOf = Callable[[Part], tuple[Tensors, list[float]]]
FOLLOW_INPUTS = 0.1  # share of a new value in the moving average
FOLLOW_PAIRS = 0.05


def measure_inputs(part: Part, norms_of: NormsOf, ok: torch.Tensor) -> None:
    """Let v follow the inputs of this step, and set lam_a; ``norms_of`` a part are those of its
    inputs, and of how many elements."""
    if not part.settings.relative_damping:
        return
    norms, elements = norms_of(part)
    ops.measure_inputs_(
        v=part.a["v"],
        lam_a=part.a["lam_a"],
        norms=norms,
        elements=elements,
        damping=[part.scalars.lam_a] * len(norms),
        share=FOLLOW_INPUTS,
        ok=ok,
        backend=part.backend,
    )


def measure_pairs(part: Part, ok: torch.Tensor) -> None:
    """Let ss and yy follow the pair of this step, and put its gradients in units of s."""
    if not part.settings.relative_damping:
        return
    ops.measure_pair_(
        ss=part.g["ss"],
        yy=part.g["yy"],
        g_bar=part.g["g_bar"],
        g_bar_next=part.g["g_bar_next"],
        h_change=part.g["h_change"],
        share=FOLLOW_PAIRS,
        ok=ok,
        backend=part.backend,
    )

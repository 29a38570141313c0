"""The scales that relative dampings are in: a block's own, measured on the device.

    lam_a <- damping_a * v      v follows the mean square of the block's inputs, tr(A)/d_in
    y     <- sqrt(ss/yy) * y    ss, yy follow |h_bar+ - h_bar|^2 and |g_bar+ - g_bar|^2

With y in units of s, lam_g = damping_g is a share of the block's curvature. Both make a setting
independent of the scale of inputs and loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kbfgs_ext.optim.factors import Tensors
from kbfgs_ext.optim.parts import Part

FOLLOW_INPUTS = 0.1  # share of a new value in the moving average
FOLLOW_PAIRS = 0.05


def measure_inputs(part: Part, squares: Callable[[], Tensors], ok: torch.Tensor) -> None:
    """Let v follow the mean ``squares`` of the inputs of this step, and set lam_a."""
    if not part.settings.relative_damping:
        return
    old = torch.stack(part.a["v"])
    new = torch.stack(squares()).to(old.dtype)
    _follow(part.a["v"], old, new, FOLLOW_INPUTS, ok)
    v = torch.stack(part.a["v"])
    lam_a = torch.where(v > 0, v, 1.0) * part.scalars.lam_a  # inputs may all be 0: dead units
    torch._foreach_copy_(part.a["lam_a"], list(lam_a.unbind()))


def measure_pairs(part: Part, ok: torch.Tensor) -> None:
    """Let ss and yy follow the pair of this step, and put its gradients in units of s."""
    if not part.settings.relative_damping:
        return
    g = part.g
    g_bar, g_bar_next = g["g_bar"], g["g_bar_next"]
    changes = [*g["h_change"], *torch._foreach_sub(g_bar_next, g_bar)]
    old = torch.stack(g["ss"] + g["yy"])
    new = torch.stack(torch._foreach_norm(changes)).to(old.dtype).square()
    _follow(g["ss"] + g["yy"], old, new, FOLLOW_PAIRS, ok)
    ss, yy = torch.stack(g["ss"]), torch.stack(g["yy"])
    units = torch.where((ss > 0) & (yy > 0), (ss / yy).sqrt(), 1.0).to(g_bar[0].dtype)
    torch._foreach_mul_(g_bar, list(units.unbind()))
    torch._foreach_mul_(g_bar_next, list(units.unbind()))


def _follow(
    places: Tensors, old: torch.Tensor, new: torch.Tensor, share: float, ok: torch.Tensor
) -> None:
    """The moving averages ``places``; they begin with the first value that is finite and not 0."""
    average = torch.where(old > 0, old.lerp(new, share), new)
    average = torch.where(ok & torch.isfinite(new), average, old)
    torch._foreach_copy_(places, list(average.unbind()))

"""The scales that relative dampings are in: a layer's own, measured on the device.

    lam_a <- damping_a * v      v follows the mean square of the layer's inputs, tr(A)/d_in
    y     <- sqrt(ss/yy) * y    ss, yy follow |h_bar+ - h_bar|^2 and |g_bar+ - g_bar|^2

With y in units of s, lam_g = damping_g is a share of the layer's curvature. Both make a setting
independent of the scale of inputs and loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kbfgs_ext.optim import gradients
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
    roots = torch._foreach_mul(norms, [n**-0.5 for n in elements])
    v = _follow(part["v"], torch.stack(roots), FOLLOW_INPUTS, ok)
    lam_a = torch.where(v > 0, v, 1.0) * part.scalars.lam_a  # inputs may all be 0: dead units
    torch._foreach_copy_(part["lam_a"], lam_a.unbind())


def measure_pairs(part: Part, ok: torch.Tensor) -> None:
    """Let ss and yy follow the pair of this step, and put its gradients in units of s."""
    if not part.settings.relative_damping or not part.gradient.live:
        return
    g_bar, g_bar_next = part["g_bar"], part["g_bar_next"]
    changes = [*part["h_change"], *torch._foreach_sub(g_bar_next, g_bar)]
    places, roots = part["ss"] + part["yy"], torch.stack(torch._foreach_norm(changes))
    ss, yy = _follow(places, roots, FOLLOW_PAIRS, ok).chunk(2)
    units = torch.where((ss > 0) & (yy > 0), (ss / yy).sqrt(), 1.0).to(g_bar[0].dtype).unbind()
    torch._foreach_mul_(g_bar + g_bar_next, units + units)


def _follow(places: Tensors, roots: torch.Tensor, share: float, ok: torch.Tensor) -> torch.Tensor:
    """Let the moving averages ``places`` follow the squares of ``roots``, and return them; they
    begin with the first value that is finite and not 0."""
    old = torch.stack(places)
    new = roots.to(old.dtype).square()
    average = torch.where(old > 0, old.lerp(new, share), new)
    average = torch.where(ok & gradients.is_finite(new), average, old)
    torch._foreach_copy_(places, average.unbind())
    return average

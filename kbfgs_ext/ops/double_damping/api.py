"""double_damping: the averaged pair and its two dampings."""

from __future__ import annotations

import torch

from kbfgs_ext.ops import checks
from kbfgs_ext.ops.checks import Tensors
from kbfgs_ext.ops.library import op


@op("double_damping", writes=("s", "y"))
def pair_ema_(
    s: Tensors,
    y: Tensors,
    h_change: Tensors,
    g_bar: Tensors,
    g_bar_next: Tensors,
    decay: float,
    ok: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Average the changes that the second pass has seen, for all layers.

    (5)  s <- decay*s + (1-decay)*h_change,  y <- decay*y + (1-decay)*(g_bar_next - g_bar)

    Args:
        s, y: (n_g,) each, updated; a layer whose new value is not finite keeps the old one.
        h_change: (n_g,) each: of the mean output, as `output_change_` gives it.
        g_bar, g_bar_next: (n_g,) each.
        decay: in [0, 1).
        ok: bool scalar on the device; where false nothing is updated.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a shape, dtype, device or ``decay`` does not fit.

    Source: step 6 of the algorithm.
    """
    checks.backend(backend)
    checks.fraction("decay", decay)
    others = {"y": y, "h_change": h_change, "g_bar": g_bar, "g_bar_next": g_bar_next}
    checks.same_length(s=s, **others)
    for name, vectors in others.items():
        for i, v in enumerate(vectors):
            checks.shape(name, i, v, s[i].shape[0])
            checks.like(name, i, v, s[i])


@op("double_damping", writes=("s", "y", "Hy", "counts"))
def double_damping_(
    s: Tensors,
    y: Tensors,
    Hy: Tensors,
    counts: Tensors,
    H: Tensors,
    lam: Tensors,
    mu1: float = 0.2,
    ok: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Powell's damping on H, then Levenberg-Marquardt damping, in place, for all layers.

    (6)  if not s'y > mu1*y'Hy:  t = (1-mu1)*y'Hy/(y'Hy - s'y),  s <- t*s + (1-t)*Hy
    (7)  if not s'y > lam*s's:   t = (1-lam)*s's/(s's - s'y),    y <- t*y + (1-t)*s

    Afterwards s'y >= mu1*y'Hy held after (6) and s'y >= lam*s's holds.

    Args:
        s, y: (n,) each, damped in place: pass copies of the moving averages.
        Hy: (n,) each. With ``H`` given it is written: H y with the damped y. With an empty ``H``
            it is read: the caller's product of the inverse factor with y.
        counts: (4,) int64 each: accepted, rejected, Powell-damped, LM-damped; the last two count.
        H: (n, n) each, symmetric, read only; or an empty list.
        lam: float64 scalar each, on the device: mu2.
        mu1: Powell's threshold, in [0, 1).
        ok: bool scalar on the device; where false nothing is damped.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a shape, dtype, device or ``mu1`` does not fit.

    Source: step 7 of the algorithm.
    """
    checks.backend(backend)
    checks.fraction("mu1", mu1)
    checks.same_length(s=s, y=y, Hy=Hy, counts=counts, lam=lam, **({"H": H} if H else {}))
    for i, v in enumerate(s):
        n = v.shape[0]
        for name, other in (("y", y[i]), ("Hy", Hy[i])):
            checks.shape(name, i, other, n)
            checks.like(name, i, other, v)
        checks.shape("counts", i, counts[i], 4)
        if H:
            checks.shape("H", i, H[i], n, n)
            checks.like("H", i, H[i], v)

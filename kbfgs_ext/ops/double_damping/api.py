"""double_damping: the averaged pair, its two dampings, and the units of relative ones."""

from __future__ import annotations

from collections.abc import Sequence

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


@op("double_damping", writes=("v", "lam_a"))
def measure_inputs_(
    v: Tensors,
    lam_a: Tensors,
    norms: Tensors,
    elements: Sequence[float],
    damping: Tensors,
    share: float,
    ok: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Let the mean squares follow the inputs of a step, and put dampings in their units.

    (21)  v <- v + share*(norm^2/elements - v),  lam_a <- damping*v

    An average begins with its first value, keeps its old one where the new is not finite, and
    counts as 1 while it is 0.

    Args:
        v, lam_a: float64 scalar each, written.
        norms: scalar each: ||X||_F.
        elements: of X, a number each.
        damping: float64 scalar each, on the device.
        share: in [0, 1), of the new value.
        ok: bool scalar on the device; where false nothing is written.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a shape, dtype, device or ``share`` does not fit.
    """
    checks.backend(backend)
    checks.fraction("share", share)
    lists = {"v": v, "lam_a": lam_a, "damping": damping}
    checks.same_length(norms=norms, elements=elements, **lists)  # type: ignore[arg-type]
    for i, norm in enumerate(norms):
        checks.shape("norms", i, norm)
        _check_scalars(i, **lists)


@op("double_damping", writes=("ss", "yy", "g_bar", "g_bar_next"))
def measure_pair_(
    ss: Tensors,
    yy: Tensors,
    g_bar: Tensors,
    g_bar_next: Tensors,
    h_change: Tensors,
    share: float,
    ok: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Let squared changes follow the pair of a step, and put its gradients in units of s.

    (22)  ss <- ss + share*(|h_change|^2 - ss),  yy <- yy + share*(|g_bar_next - g_bar|^2 - yy),
          g_bar, g_bar_next <- sqrt(ss/yy) of them

    Averages begin and stay as in `measure_inputs_`; while one is 0 gradients are left as they are.

    Args:
        ss, yy: float64 scalar each, updated.
        g_bar, g_bar_next: (n_g,) each, updated.
        h_change: (n_g,) each.
        share: in [0, 1), of the new value.
        ok: bool scalar on the device; where false nothing is written.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a shape, dtype, device or ``share`` does not fit.
    """
    checks.backend(backend)
    checks.fraction("share", share)
    others = {"g_bar_next": g_bar_next, "h_change": h_change}
    checks.same_length(g_bar=g_bar, ss=ss, yy=yy, **others)
    for i, g in enumerate(g_bar):
        _check_scalars(i, ss=ss, yy=yy)
        for name, vectors in others.items():
            checks.shape(name, i, vectors[i], g.shape[0])
            checks.like(name, i, vectors[i], g)


def _check_scalars(i: int, **lists: Tensors) -> None:
    for name, tensors in lists.items():
        checks.shape(name, i, tensors[i])
        if tensors[i].dtype != torch.float64:
            raise ValueError(f"{name}[{i}] must be torch.float64, got {tensors[i].dtype}")

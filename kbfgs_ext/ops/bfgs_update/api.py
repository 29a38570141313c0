"""bfgs_update: the gated rank-2 update, the whole curvature update of a step, and restarts."""

from __future__ import annotations

import torch

from kbfgs_ext.ops import checks
from kbfgs_ext.ops.checks import Tensors
from kbfgs_ext.ops.library import op


@op("bfgs_update", writes=("H", "counts"))
def bfgs_update_(
    H: Tensors,
    counts: Tensors,
    s: Tensors,
    y: Tensors,
    Hy: Tensors,
    c: Tensors,
    ok: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """The BFGS update of inverse factors, for all layers, gated on the device.

    (8)  accept if s'y > 0, s'y > 1e-4*s's*||c||, y'Hy >= 0, and all is finite
    (9)  H <- H - rho*(s (Hy)' + (Hy) s') + (rho^2*y'Hy + rho)*s s',   rho = 1/s'y

    Args:
        H: (n, n) each, symmetric, updated where the pair is accepted, untouched elsewhere.
        counts: (4,) int64 each: accepted, rejected, Powell-damped, LM-damped; the first two count.
        s, y: (n,) each.
        Hy: (n,) each: H y; an empty list computes it.
        c: (n,) each: reference vector of the gate.
        ok: bool scalar on the device; where false nothing happens and nothing is counted.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: step 8 of the algorithm.
    """
    checks.backend(backend)
    checks.same_length(H=H, counts=counts, s=s, y=y, c=c, **({"Hy": Hy} if Hy else {}))
    for i, h in enumerate(H):
        n = s[i].shape[0]
        checks.shape("H", i, h, n, n)
        vectors = [("s", s[i]), ("y", y[i]), ("c", c[i])] + ([("Hy", Hy[i])] if Hy else [])
        for name, v in vectors:
            checks.shape(name, i, v, n)
            checks.like(name, i, v, h)
        checks.shape("counts", i, counts[i], 4)


def workspace_size(n_a: int, n_g: int) -> int:
    """Elements of one layer's ``work`` in `curvature_update_`: s, y, Hy of both sides, scalars."""
    return 3 * (n_a + n_g) + 32


@op("bfgs_update", writes=("H_a", "H_g", "s", "y", "counts_a", "counts_g", "work"))
def curvature_update_(
    H_a: Tensors,
    H_g: Tensors,
    s: Tensors,
    y: Tensors,
    counts_a: Tensors,
    counts_g: Tensors,
    work: Tensors,
    A: Tensors,
    X: Tensors,
    a_bar: Tensors,
    h_change: Tensors,
    g_bar: Tensors,
    g_bar_next: Tensors,
    lam_a: Tensors,
    lam_g: Tensors,
    pair_decay: float,
    mu1: float = 0.2,
    ok: torch.Tensor | None = None,
    ok_pair: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Steps 6 to 9 of the algorithm for all layers in one call: both factors of every layer.

    H_a: s_a = H_a a_bar, y_a = A s_a + lam_a s_a or X~'(X~ s_a)/m + lam_a s_a (10),
         gate with c = a_bar (8), update (9).
    H_g: s, y averaged (5); copies of them damped (6), (7); gate with c = g_bar (8), update (9).

    Args:
        H_a: (n_a, n_a) each, symmetric, updated; an empty list updates the H_g alone (then
            counts_a, A, X, a_bar and lam_a are empty too).
        H_g: (n_g, n_g) each, symmetric, updated; an empty list updates the H_a alone (then s, y,
            counts_g, h_change, g_bar, g_bar_next and lam_g are empty too).
        s, y: (n_g,) each: the moving averages of the pair, updated.
        counts_a, counts_g: (4,) int64 each.
        work: scratch of `workspace_size` elements each.
        A: (n_a, n_a) each; or empty, and then ``X`` is used.
        X: (m, d_in) each, as in `factor_ema_`; or empty when ``A`` is given.
        a_bar: (n_a,) each.
        h_change: (n_g,) each: of the mean output, as `output_change_` gives it.
        g_bar, g_bar_next: (n_g,) each.
        lam_a, lam_g: float64 scalar each, on the device.
        pair_decay: decay of (5), in [0, 1).
        mu1: Powell's threshold, in [0, 1).
        ok: bool scalar on the device: the first pass was finite; where false nothing changes.
        ok_pair: bool scalar on the device: the second pass was finite too; where false, or where
            a layer's own means are not finite, that layer's s, y and H_g stay.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a shape, dtype, device, ``pair_decay`` or ``mu1`` does not fit.
    """
    checks.backend(backend)
    checks.fraction("pair_decay", pair_decay)
    checks.fraction("mu1", mu1)
    if H_a and bool(A) == bool(X):
        raise ValueError(f"give A or X, not both or neither: got {len(A)} and {len(X)} of them")
    checks.same_length(H_a=H_a, counts_a=counts_a, a_bar=a_bar, lam_a=lam_a)
    sizes = [2 * (a.shape[0],) for a in a_bar]
    checks.shapes("H_a", H_a, sizes)
    checks.alike("a_bar", a_bar, H_a)
    if A:
        checks.shapes("A", A, sizes)
        checks.alike("A", A, H_a)
    for i, x in enumerate(X):
        checks.rows("X", i, x, sizes[i][0])
    g_side = {"s": s, "y": y, "h_change": h_change, "g_bar": g_bar, "g_bar_next": g_bar_next}
    checks.same_length(H_g=H_g, counts_g=counts_g, lam_g=lam_g, **g_side)
    rows = [(h.shape[0],) for h in H_g]
    checks.shapes("H_g", H_g, [2 * n for n in rows])
    for name, vectors in g_side.items():
        checks.shapes(name, vectors, rows)
        checks.alike(name, vectors, H_g)
    if len(work) != max(len(H_a), len(H_g)):
        raise ValueError(f"work must have one entry per layer, got {len(work)}")
    for i, w in enumerate(work):
        wanted = workspace_size(H_a[i].shape[0] if H_a else 0, H_g[i].shape[0] if H_g else 0)
        if w.numel() < wanted:
            raise ValueError(f"work[{i}] must have at least {wanted} elements, got {w.numel()}")


@op("bfgs_update", writes=("H", "pushed", "marks"))
def restart_(
    H: Tensors,
    pushed: Tensors,
    marks: Tensors,
    counts: Tensors,
    lam: Tensors,
    A: Tensors,
    X: Tensors,
    force: Tensors,
    after: int,
    backend: str = "auto",
) -> None:
    """Put factors that have gone wrong back to a safe start: one side of all layers in one call, or
    both.

    (12)  where the last ``after`` pairs or more were rejected, or ``force``:
          H <- I, or H <- I/(lam + tr A), or pushed <- 0

    Nothing but ``marks`` is written elsewhere, and no matrix is read. tr A bounds the largest
    eigenvalue of A, so that such an H_a is too large in no direction; one that is not finite
    puts the restart off.

    Args:
        H: (n, n) each; or an empty list, and then ``pushed`` is given.
        pushed: int64 scalar each: the rings of `lbfgs_push_`, which are empty at 0.
        marks: (3,) int64 each, zero at first: accepted and rejected pairs where the present streak
            began, and restarts.
        counts: (4,) int64 each, as `bfgs_update_` and `lbfgs_push_` keep them.
        lam: float64 scalar of the first so many H, on the device; those without restart to I.
        A: (n, n) each, with ``lam``; or empty, and then ``X`` is used.
        X: (m, d_in) each, as in `factor_ema_`: A is X~'X~/m.
        force: bool scalar each, on the device: restart now; an empty list forces nothing.
        after: length of the streak, at least 1.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a shape, dtype, device or ``after`` does not fit.
    """
    checks.backend(backend)
    if after < 1:
        raise ValueError(f"after must be at least 1, got {after}")
    if H and pushed:
        raise ValueError(f"give H or pushed, not both: got {len(H)} and {len(pushed)} of them")
    if bool(lam) != bool(A or X) or (A and X):
        raise ValueError(f"lam goes with A or X: got {len(lam)} lam, {len(A)} A and {len(X)} X")
    lists = {"marks": marks, "counts": counts, **({"H": H} if H or lam else {"pushed": pushed})}
    checks.same_length(**lists, **({"force": force} if force else {}))
    if len(lam) > len(H):
        raise ValueError(f"lam goes with H: got {len(lam)} lam and {len(H)} H")
    checks.same_length(lam=lam, **({"A": A} if A else {"X": X}))
    checks.shapes("marks", marks, [(3,)] * len(marks))
    checks.shapes("counts", counts, [(4,)] * len(marks))
    checks.shapes("pushed", pushed, [()] * len(pushed))
    sizes = [2 * (h.shape[0],) for h in H]
    checks.shapes("H", H, sizes)
    if A:
        checks.shapes("A", A, sizes[: len(A)])
        checks.alike("A", A, H[: len(A)])
    for i, x in enumerate(X):
        checks.rows("X", i, x, sizes[i][0])
